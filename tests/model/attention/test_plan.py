"""The blocked form against the oracle, and the oracle against softmax written out for one row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention.blocks import Blocks
from model.attention.plan import plan_attention
from model.attention.tiles import Tiles
from model.packing import Packing
from model.windows import LayerSpec, visible
from tests.model.attention.oracle import HEADS, attend, draw_qkv, oracle, packed, packings, whole


@st.composite
def bounded_layers(draw: st.DrawFn) -> LayerSpec:
    kind = draw(st.sampled_from(["sliding", "chunked", "dilated"]))
    return LayerSpec(
        kind,
        window=draw(st.one_of(st.just(1), st.integers(2, 40))),
        dilation=draw(st.integers(2, 5)) if kind == "dilated" else 1,
        sink=draw(st.booleans()),
    )


@settings(max_examples=100)
@given(st.data(), bounded_layers(), st.integers(1, 130), st.sampled_from([1, 2, 4]), st.integers(1, 2))
def test_blocked_equals_reference_forward_and_backward(
    data: st.DataObject, spec: LayerSpec, total: int, groups: int, batch: int
) -> None:
    packing = data.draw(packings(batch, total))
    q, k, v, sinks = draw_qkv(batch, groups, total, seed=total)
    chosen = sinks if spec.sink else None
    inputs = [q, k, v, *([sinks] if spec.sink else [])]
    expected = oracle(q, k, v, spec, packing, chosen)
    actual = Blocks.of(spec, packing)(q, k, v, chosen)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
    """One query (D,) over the keys (S, D) that it sees."""
    weights = torch.exp(k @ q * q.shape[0] ** -0.5)
    total = weights.sum() + (sink.exp() if sink is not None else 0.0)
    return (weights[:, None] * v).sum(0) / total


@settings(max_examples=25)
@given(bounded_layers(), st.sampled_from([1, 2, 4]))
def test_reference_is_softmax_over_the_visible_keys(spec: LayerSpec, groups: int) -> None:
    total = 2 * (spec.ring_slots or 0) + 5
    q, k, v, sinks = (x.detach() for x in draw_qkv(1, groups, total, seed=1))
    packing = whole(total)
    out = oracle(q, k, v, spec, packing, sinks if spec.sink else None)
    for i in (0, total // 2, total - 1):
        seen = visible(spec, torch.tensor(i), torch.arange(total))
        for head in range(HEADS):
            group = head // (HEADS // groups)
            sink = sinks[head] if spec.sink else None
            expected = softmax_by_hand(q[0, head, i], k[0, group, seen], v[0, group, seen], sink)
            torch.testing.assert_close(out[0, head, i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("documents", [None, 2])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_full_layer_gives_the_same_on_both_backends(backend: str, documents: int | None) -> None:
    q, k, v, sinks = (x.detach() for x in draw_qkv(2, 2, 40, seed=2))
    alone = whole(40)
    packing = alone if documents is None else Packing(*(x.expand(2, 40) for x in packed([17], 3, 40)))
    spec = LayerSpec("full")
    expected = oracle(q, k, v, spec, packing, None)
    torch.testing.assert_close(attend(q, k, v, spec, packing, backend, None), expected, atol=1e-5, rtol=1e-5)
    with_sink = oracle(q, k, v, spec, packing, sinks)
    torch.testing.assert_close(attend(q, k, v, spec, packing, backend, sinks), with_sink, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["reference", "blocked"])
@pytest.mark.parametrize("sink", [False, True])
def test_padded_rows_give_zeros_and_finite_gradients_whatever_comes_from_above(form: str, sink: bool) -> None:
    spec = LayerSpec("sliding", 5, sink=sink)
    q, k, v, sinks = (x.detach().float().requires_grad_() for x in draw_qkv(2, 2, 50, seed=3))
    positions, documents = (torch.stack(x) for x in zip(packed([50], 20, 50), packed([50], 50, 50)))
    packing = Packing(positions, documents)
    out = attend(q, k, v, spec, packing, form, sinks if sink else None)
    assert (out[0, :, :20] == 0).all()
    assert (out[1] == 0).all()
    out.backward(torch.full_like(out, 1e4))
    assert all(x.grad is None or x.grad.isfinite().all() for x in (q, k, v, sinks))
    assert q.grad is not None
    assert q.grad[0, :, 20:].any()


@pytest.mark.parametrize("form", ["reference", "blocked"])
def test_a_packed_document_is_what_it_is_alone(form: str) -> None:
    q, k, v, _ = (x.detach() for x in draw_qkv(1, 2, 90, seed=4))
    lengths = [31, 1, 1, 40, 17]
    for spec in (LayerSpec("sliding", 7), LayerSpec("chunked", 6), LayerSpec("dilated", 3, dilation=3)):
        together = attend(q, k, v, spec, Packing(*(x[None] for x in packed(lengths, 0, 90))), form, None)
        for part in torch.arange(90).split(lengths):
            packing = whole(len(part))
            alone = oracle(*(x[:, :, part] for x in (q, k, v)), spec, packing)
            torch.testing.assert_close(together[:, :, part], alone, atol=1e-5, rtol=1e-5)


def test_blocked_memory_grows_with_the_window_and_not_with_the_square_of_the_length() -> None:
    def widest(window: int, total: int) -> int:
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    largest = max(largest, out.numel())
                return out

        q, k, v, _ = (x.detach() for x in draw_qkv(1, 4, total, seed=5))
        with Watch():
            attend(q, k, v, LayerSpec("sliding", window), whole(total), "blocked", None)
        return largest

    assert widest(32, 2048) <= 2.1 * widest(32, 1024)
    assert widest(32, 1024) <= 0.6 * widest(64, 1024)


@pytest.mark.parametrize("window", [130, 300, 1100])
def test_bf16_is_near_the_reference_in_blocks_and_tiles(window: int) -> None:
    """With gradients blocks serve windows below 256, without them tiles do: both are near float32."""
    q, k, v, _ = draw_qkv(1, 2, 1300, seed=window)
    spec, packing = LayerSpec("sliding", window), whole(1300)
    expected = oracle(q, k, v, spec, packing, None)
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    actual = attend(*halves, spec, packing, "blocked", None)
    with torch.no_grad():
        alone = attend(*halves, spec, packing, "blocked", None)
    for ours in (actual, alone):
        torch.testing.assert_close(ours.double(), expected, atol=0.03, rtol=0.03)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    found = torch.autograd.grad(actual.double().square().sum(), halves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("dtype", "head_size", "gradients", "least"),
    [(torch.bfloat16, 128, True, 256), (torch.float32, 64, True, 256), (torch.float32, 128, True, 128),
     (torch.bfloat16, 64, False, 128)],
)  # fmt: skip
def test_tiles_begin_where_they_are_faster(dtype: torch.dtype, head_size: int, gradients: bool, least: int) -> None:
    for window in (least - 1, least):
        plan = plan_attention(LayerSpec("sliding", window), head_size, "blocked", "cpu", dtype, gradients)
        assert isinstance(plan.prepare(whole(4096)), Tiles if window == least else Blocks)
