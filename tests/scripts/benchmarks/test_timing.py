from dataclasses import replace

import pytest
import torch

from scripts.benchmarks.timing import Row, compare, curves, exponents, peak_bytes

ROW = Row("attention", "forward n=512 W=64", "peer", 1.0, 1.0, 1.0, None, None, None, "fp32", 1)


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


def test_exponents_are_slopes_on_both_axes() -> None:
    rows = [replace(ROW, case=f"forward n={n} W=64", ours_s=n, peer_s=float(n) ** 2) for n in (512, 1024, 2048)]
    rows += [replace(ROW, case=f"forward n=1024 W={w}", ours_s=16.0 * w, peer_s=1024.0**2) for w in (16, 32)]
    assert list(exponents(rows, "forward")) == [
        "  ours, forward: time ~ n^1.00", "  peer, forward: time ~ n^2.00",
        "  ours, forward: time ~ W^1.00", "  peer, forward: time ~ W^-0.00",
    ]  # fmt: skip
    assert curves(rows, "W", "s")["ours"] == {16: 256.0, 32: 512.0, 64: 1024}


def test_bytes_have_exponents_where_they_are_known() -> None:
    rows = [replace(ROW, case=f"forward n={n} W=64", ours_bytes=n, peer_bytes=n * n) for n in (512, 1024, 2048)]
    rows += [replace(ROW, case="forward n=512 W=32", peer="silent")]
    lines = list(exponents(rows, "forward"))
    assert "  ours, forward: peak bytes ~ n^1.00" in lines
    assert "  peer, forward: peak bytes ~ n^2.00" in lines
    assert not any("silent" in line for line in lines)


def test_cases_without_a_window_have_exponents_of_n_alone() -> None:
    rows = [replace(ROW, case=f"x, W 256, n={n}", peer="–", peer_s=None, ours_s=n**1.5, ours_bytes=n)
            for n in (512, 1024, 4096)]  # fmt: skip
    assert list(exponents(rows, "prefill")) == [
        "  ours, prefill: time ~ n^1.50", "  ours, prefill: peak bytes ~ n^1.00",
    ]  # fmt: skip
