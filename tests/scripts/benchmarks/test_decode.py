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


def test_each_token_has_its_own_time_and_texts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the texts set forward."""
    order: list[str] = []
    now = 0.0
    monkeypatch.setattr(decode.time, "perf_counter", lambda: now)

    def text(name: str, seconds: list[float]) -> Iterator[int]:
        nonlocal now
        for s in seconds:
            order.append(name)
            now += s
            yield 0

    numbers: list[int] = []
    texts = text("a", [1.0, 8.0, 2.0]), text("b", [4.0, 0.5, 0.25])
    times = token_times(*texts, tokens=3, after_each=numbers.append)
    assert [list(one) for one in times] == [[1.0, 8.0, 2.0], [4.0, 0.5, 0.25]]
    assert ("".join(order), numbers) == ("ababab", [1, 2, 3])
