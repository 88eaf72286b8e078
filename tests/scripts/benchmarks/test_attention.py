from dataclasses import replace

import pytest
import torch

from scripts.benchmarks import attention
from scripts.benchmarks.attention import CAUSAL, DENSE, EAGER, FLEX, Shape, attention_works
from scripts.benchmarks.timing import Setup, why_not
from training.processes.precision import Machine

CPU = torch.device("cpu")


@pytest.fixture
def without_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise NotImplementedError("takes half a minute to compile for each shape")

    monkeypatch.setattr(attention, "create_block_mask", absent)


def test_peers_compute_the_same() -> None:
    """Except the one without a window, whose time alone is compared. FlexAttention has no gradient on a CPU."""
    works = attention_works(Shape(256, 32), False, "fp32", CPU)
    expected = works["ours"]()
    for name in (DENSE, FLEX):
        torch.testing.assert_close(works[name](), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(works[EAGER]().transpose(1, 2), expected, atol=1e-4, rtol=0)
    backward = attention_works(Shape(256, 32), True, "fp32", CPU)
    assert "does not support backward on CPU" in why_not(backward[FLEX])


def test_a_row_for_each_peer_direction_length_and_window(setup: Setup, without_flex: None) -> None:
    rows = attention.bench_attention(setup, lengths=[128, 160, 200], windows=[16, 64, 96])
    shapes = ["n=128 W=64", "n=160 W=64", "n=200 W=64", "n=200 W=16", "n=200 W=96"]
    assert [row.case for row in rows] == [
        f"{direction} {shape}" for shape in shapes for direction in ("forward", "forward+backward") for _ in range(4)
    ]
    assert {row.peer for row in rows if row.peer_s and row.peer_bytes} == {DENSE, CAUSAL, EAGER}
    assert {row.note for row in rows if row.peer == FLEX} == {
        "NotImplementedError: takes half a minute to compile for each shape"
    }


def test_ours_alone_on_long_sequences_has_seconds_and_bytes(setup: Setup) -> None:
    rows = attention.bench_lengths(setup, [300, 600])
    assert [row.case for row in rows] == ["forward+backward n=300 W=256", "forward+backward n=600 W=256"]
    assert all(row.note == "alone" and row.ours_s > 0 for row in rows)
    assert rows[0].ours_bytes < rows[1].ours_bytes


def test_shapes_with_an_aim_name_what_a_window_can_gain(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "AIMS", ((Shape(300, 30, heads=2, kv_heads=2), CAUSAL, 2.0),))
    (row,) = attention.bench_aims(setup, Machine(fp32_flops=1e11, bf16_flops=3e8))
    gain = sum(range(1, 301)) / sum(min(n, 30) for n in range(1, 301))
    assert row.case == f"n=300 W=30 B=1 H=2 D=32, at most {gain:.2f} x causal"
    assert (row.peer, row.limit, row.dtype) == (CAUSAL, 2.0, "fp32")


def test_dense_peers_are_left_out_where_their_scores_need_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_LIMIT", 1000)
    works = attention_works(Shape(256, 32), False, "fp32", CPU)
    reason = "MemoryError: its dense scores need 0.0 GiB, more than this benchmark allows"
    assert {name: why_not(works[name]) for name in (DENSE, EAGER, CAUSAL)} == {DENSE: reason, EAGER: reason, CAUSAL: ""}


def test_bf16_is_timed_only_where_the_machine_does_not_emulate_it(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "AIMS", ((Shape(100, 30, heads=2, kv_heads=2), CAUSAL, 2.0),))
    rows = attention.bench_aims(setup, Machine(fp32_flops=1e11, bf16_flops=8e11))
    assert [row.dtype for row in rows] == ["bf16", "fp32"]


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def test_on_a_gpu_each_of_our_backends_and_the_causal_kernel_of_cudnn_are_peers() -> None:
    q = torch.randn(1, 2, 40, 16)
    peers = attention.gpu_peers(Shape(40, 8, heads=2, kv_heads=2, head_dim=16), q, q, q)
    assert next(iter(peers)) == attention.CAUSAL_CUDNN
    assert {"ours, blocked", "ours, flex", "ours, flash"} < set(peers)
    assert "ours, reference" not in peers
    torch.testing.assert_close(peers["ours, blocked"](), peers["ours, flex"](), atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be had here")
def test_a_backend_that_needs_a_gpu_says_so() -> None:
    q = torch.randn(1, 2, 40, 16)
    peers = attention.gpu_peers(Shape(40, 8, heads=2, kv_heads=2, head_dim=16), q, q, q)
    assert "needs an NVIDIA GPU" in why_not(peers["ours, flash"])


@pytest.mark.cuda
def test_on_a_gpu_ours_and_each_backend_that_can_run_are_timed_in_bf16(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GPU_AIMS", ((Shape(1024, 256, heads=4, kv_heads=2, head_dim=64), 1.9),))
    rows = attention.bench_aims(replace(setup, device=torch.device("cuda")), Machine(1e13, 1e14))
    assert {row.dtype for row in rows} == {"bf16"}
    assert all(row.ours_bytes for row in rows)
    limits = {row.peer: row.limit for row in rows if row.bench.endswith("forward+backward")}
    assert (limits[CAUSAL], limits[attention.CAUSAL_CUDNN], limits["ours, blocked"]) == (1.9, 1.9, None)
    timed = {row.peer for row in rows if row.peer_s}
    assert {CAUSAL, FLEX, "ours, blocked", "ours, flex", "ours, flash"} <= timed
