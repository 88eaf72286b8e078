import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import bench
from scripts.benchmarks import attention as bench_attention
from scripts.benchmarks.attention import FLEX, Shape
from scripts.benchmarks.timing import Row, why_not
from training.processes.precision import Machine

ROW = Row("attention", "forward n=512 W=64", "peer", 1.0, 1.0, 1.0, None, None, None, "fp32", 1)
KEYS = ["bench", "case", "peer", "ours_s", "peer_s", "ratio", "limit", "ours_bytes", "peer_bytes", "dtype", "threads"]


def test_exponents_are_slopes_on_both_axes() -> None:
    rows = [replace(ROW, case=f"forward n={n} W=64", ours_s=n, peer_s=float(n) ** 2) for n in (512, 1024, 2048)]
    rows += [replace(ROW, case=f"forward n=1024 W={w}", ours_s=16.0 * w, peer_s=1024.0**2) for w in (16, 32)]
    rows = [r for r in rows for r in (r, replace(r, case=r.case.replace("forward", "forward+backward")))]
    fits = bench_attention.exponents(rows)
    assert fits["ours, forward: time ~ n^"] == pytest.approx(1)
    assert fits["peer, forward: time ~ n^"] == pytest.approx(2)
    assert fits["ours, forward+backward: time ~ W^"] == pytest.approx(1)
    assert fits["peer, forward+backward: time ~ W^"] == pytest.approx(0)


def test_bytes_have_exponents_where_they_are_known() -> None:
    rows = [replace(ROW, case=f"forward n={n} W=64", ours_bytes=n, peer_bytes=n * n) for n in (512, 1024, 2048)]
    rows += [replace(ROW, case="forward n=512 W=32", peer="silent")]
    fits = bench_attention.exponents(rows)
    assert fits["ours, forward: peak bytes ~ n^"] == pytest.approx(1)
    assert fits["peer, forward: peak bytes ~ n^"] == pytest.approx(2)
    assert not any("silent" in name for name in fits)


def test_peers_compute_the_same() -> None:
    """But for the one without a window, a peer in time only. FlexAttention has no gradient on a CPU."""
    works = bench_attention.attention_works(Shape(256, 32), False, "fp32")
    expected = works["ours"]()
    for name in (bench_attention.DENSE, FLEX):
        torch.testing.assert_close(works[name](), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(works[bench_attention.EAGER]().transpose(1, 2), expected, atol=1e-4, rtol=0)
    backward = bench_attention.attention_works(Shape(256, 32), True, "fp32")
    assert "does not support backward on CPU" in why_not(backward[FLEX])


def test_attention_rows_and_json_have_the_fixed_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> object:
        def work() -> None:
            raise NotImplementedError("takes half a minute to compile for each shape")

        return work

    monkeypatch.setattr(bench_attention, "_flex", absent)
    rows = bench_attention.bench_attention("fp32", 1, lengths=(128, 160, 200), windows=(16, 64, 96))
    bench.write_json(rows, tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert all(set(KEYS) <= row.keys() for row in written)
    assert {row["peer"] for row in written if row["peer_s"]} == {
        "sdpa, dense window mask", "sdpa, causal, no window", "transformers eager",
    }  # fmt: skip
    bench_attention.plot_attention(rows, tmp_path / "attention.png")
    assert bench.table_of(rows).row_count == len(rows)


def test_precisions_that_a_machine_emulates_are_left_out() -> None:
    assert bench_attention.precisions(Machine(fp32_flops=1e11, bf16_flops=3e8)) == ("fp32",)
    assert bench_attention.precisions(Machine(fp32_flops=1e11, bf16_flops=8e11)) == ("bf16", "fp32")
