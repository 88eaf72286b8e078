import pytest

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from scripts.benchmarks import decode
from scripts.benchmarks.decode import bench_decode, bench_prefill, bench_stream
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


def test_prefill_is_timed_alone_and_beside_sdpa(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PREFILL_WINDOW", 16)
    rows = bench_prefill(setup, [200, 300], beside=300)
    assert [(row.peer, row.limit, row.case) for row in rows] == [
        ("–", None, "tiny with 4 layers, W 16, n=200"), ("transformers sdpa", 5.0, "tiny with 4 layers, W 16, n=300"),
    ]  # fmt: skip
    assert all(row.ours_bytes for row in rows)


def test_stream_compares_late_tokens_with_early_ones_in_turns(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "THOUSAND", 20)
    (row,) = bench_stream(setup, 60)
    assert row.ratio == row.peer_s / row.ours_s
    assert (row.peer, row.limit) == ("tokens 10 to 30 of another text", 1 / 1.05)
    assert row.case == "tiny: token 60, W 5, cache 1,280 bytes"
    assert row.ours_bytes >= row.peer_bytes > 2**20
    with pytest.raises(UserError, match=r"^--tokens 49: give at least 50, to compare late tokens with early ones$"):
        bench_stream(setup, 49)
