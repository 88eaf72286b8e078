import time
from collections.abc import Iterator

import pytest

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from scripts.benchmarks import decode
from scripts.benchmarks.decode import bench_decode, bench_prefill, bench_stream, token_times
from scripts.benchmarks.timing import Setup


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindreachForCausalLM, "compile_decoding", lambda self: None)


def test_the_ring_has_the_bytes_of_a_window_and_all_write_the_same_tokens(setup: Setup) -> None:
    rows = bench_decode(setup, prompt_tokens=12, new_tokens=8, batches=[1, 2])
    assert [row.ours_bytes for row in rows] == [2 * 2 * 5 * 16 * 4] * 3 + [2 * 2 * 2 * 5 * 16 * 4] * 3
    assert {row.note for row in rows} == {""}
    assert all(row.case.endswith(", same tokens") for row in rows)
    assert [row.limit for row in rows] == [3.0, 3.0, None] * 2


def test_prefill_is_timed_beside_sdpa_and_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PREFILL_WINDOW", 16)
    (compared,), alone = bench_prefill(setup, beside=300, alone=[200, 400])
    assert (compared.peer, compared.limit) == ("transformers sdpa", 5.0)
    assert [(row.peer, row.case) for row in alone] == [
        ("–", "tiny with 4 layers, W 16, n=200"), ("–", "tiny with 4 layers, W 16, n=400"),
    ]  # fmt: skip
    assert all(row.ours_bytes for row in alone)


def test_stream_compares_late_tokens_with_early_ones(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "THOUSAND", 20)
    row, in_turns = bench_stream(setup, 60)
    for one in (row, in_turns):
        assert one.ratio == one.peer_s / one.ours_s
        assert one.limit == 1 / 1.05
    assert (row.peer, in_turns.peer) == ("tokens 10 to 30", "tokens 10 to 30 of another text, in turns")
    assert row.case == "tiny: token 60, W 5, cache 1,280 bytes"
    assert row.ours_bytes >= row.peer_bytes > 2**20
    with pytest.raises(UserError, match=r"^--tokens 49: give at least 50, to compare late tokens with early ones$"):
        bench_stream(setup, 49)


def test_each_token_has_its_own_time_and_texts_take_turns() -> None:
    order: list[str] = []

    def text(name: str, slow: int) -> Iterator[int]:
        for n in range(5):
            order.append(name)
            time.sleep(0.05 if n == slow else 0)
            yield n

    numbers: list[int] = []
    first, second = token_times(text("a", 1), text("b", 3), tokens=4, after_each=numbers.append)
    assert [t > 0.04 for t in first] == [False, True, False, False]
    assert [t > 0.04 for t in second] == [False, False, False, True]
    assert ("".join(order), numbers) == ("abababab", [1, 2, 3, 4])
