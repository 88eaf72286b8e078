from dataclasses import replace

import pytest
import torch

from scripts.benchmarks.timing import Setup, compare, peak_bytes


def test_a_row_for_each_peer_has_medians_ratio_limit_and_bytes() -> None:
    works = {"ours": lambda: torch.empty(10), "big": lambda: torch.empty(1000), "small": lambda: None}
    big, small = compare("b", "c", works, 3, "fp32", {"big": 2.0}, peak_bytes)
    assert (big.peer, big.ours_bytes, big.peer_bytes, big.limit, big.note) == ("big", 40, 4000, 2.0, "")
    assert (small.peer, small.ours_bytes, small.peer_bytes, small.limit) == ("small", 40, 0, None)
    assert big.ratio == big.peer_s / big.ours_s
    (alone,) = compare("b", "c", {"ours": lambda: None}, 1, "fp32")
    assert (alone.peer, alone.peer_s, alone.ratio, alone.ours_bytes, alone.note) == ("–", None, None, None, "alone")


def test_functions_run_in_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    compare("b", "c", {"ours": lambda: calls.append("o"), "peer": lambda: calls.append("p")}, 3, "fp32")
    assert "".join(calls) == "ooooo" + "ppppp" + "opopop"


def test_a_peer_that_can_not_run_gives_the_reason_and_ours_must_run() -> None:
    def fails() -> None:
        raise NotImplementedError("no kernel\nfor this device")

    (row,) = compare("b", "c", {"ours": lambda: None, "peer": fails}, 1, "fp32")
    assert (row.peer_s, row.ratio, row.note) == (None, None, "NotImplementedError: no kernel")
    with pytest.raises(RuntimeError, match="our own side of the benchmark failed: NotImplementedError: no kernel"):
        compare("b", "c", {"ours": fails}, 1, "fp32")


def test_bytes_on_a_gpu_are_the_most_that_its_allocator_held_beyond_what_was_there(
    monkeypatch: pytest.MonkeyPatch, setup: Setup
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 170)
    assert replace(setup, device=torch.device("cuda")).peak_bytes(lambda: calls.append("work")) == 70
    assert calls == ["reset", "work"]
    assert setup.peak_bytes(lambda: torch.empty(10)) == 40
