from itertools import islice

import pytest

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from scripts.benchmarks import decode as bench_decode
from scripts.benchmarks.decode import Row, bench_prefill, bench_stream, prefill_growth
from training.settings.schema import Settings


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindreachForCausalLM, "compile_decoding", lambda self: None)


def test_decoding_holds_a_window_and_all_write_the_same_tokens(settings: Settings) -> None:
    rows = bench_decode.bench_decode(settings, rounds=1, prompt_tokens=12, new_tokens=8, batches=(1, 2))
    assert [row.ours_bytes for row in rows] == [2 * 2 * 5 * 16 * 4] * 3 + [2 * 2 * 2 * 5 * 16 * 4] * 3
    assert {row.note for row in rows} == {""}
    assert all(row.case.endswith(", same tokens") for row in rows)
    assert [row.limit for row in rows] == [3.0, 3.0, None] * 2


def test_prefill_stands_beside_sdpa_and_alone_against_n(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "PREFILL_WINDOW", 16)
    rows = bench_prefill(settings, rounds=1, beside=300, alone=(200, 400))
    assert [row.peer for row in rows] == ["transformers sdpa", "–", "–"]
    assert rows[0].limit == 5.0
    assert all(row.ours_bytes for row in rows[1:])


def test_growth_of_prefill_is_a_slope() -> None:
    rows = [
        Row("prefill", f"x, W 256, n={n}", "–", n**1.5, None, None, None, n, None, "fp32", 1, "alone")
        for n in (512, 1024, 4096)
    ]
    assert prefill_growth(rows) == "  ours, prefill: time ~ n^1.50, peak bytes ~ n^1.00"


def test_stream_sets_late_tokens_beside_early_ones(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "THOUSAND", 20)
    row, in_turns = bench_stream(settings, 60)
    for one in (row, in_turns):
        assert one.ratio == pytest.approx(one.peer_s / one.ours_s)
        assert one.limit == 1 / 1.05
    assert (row.peer, in_turns.peer) == ("tokens 10 to 30", "tokens 10 to 30 of another text, in turns")
    assert "cache 1,280 bytes" in row.case
    assert row.ours_bytes >= row.peer_bytes > 2**20
    with pytest.raises(UserError, match=r"^--tokens 49: give at least 50, to tell late ones from early ones$"):
        bench_stream(settings, 49)


def test_times_are_those_of_each_token_and_memory_is_looked_at_after_the_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_decode, "THOUSAND", 10)
    seconds, resident = bench_decode._times(islice(iter(int, 1), 45), warm=15)
    assert (len(seconds), len(resident)) == (45, 4)
