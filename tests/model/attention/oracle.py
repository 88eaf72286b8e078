"""What the tests of attention share: random inputs and packings, the oracle, and any backend by name."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from model.attention import Attend, AttentionPlan, Device, plan, plan_attention, product_dtype
from model.attention.reference import attend_dense
from model.packing import Packing, may_see
from model.windows import LayerSpec

HEADS = 4
H100 = Device("cuda", (9, 0), frozenset({"cudnn", "triton", "xformers"}))


def draw_qkv(batch: int, groups: int, total: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, HEADS, total, 8), (batch, groups, total, 8), (batch, groups, total, 8), (HEADS,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def packed(lengths: list[int], padding: int, total: int) -> tuple[Tensor, Tensor]:
    """Positions and ids (T,) of documents of `lengths` (repeated to fill) behind `padding` tokens of padding."""
    positions, documents = list(range(padding)), [-1] * padding
    for i in range(total):
        length = lengths[i % len(lengths)]
        positions += range(length)
        documents += [i] * length
    return torch.tensor(positions[:total]), torch.tensor(documents[:total])


def whole(total: int) -> Packing:
    return Packing.of_whole_rows(total, torch.device("cpu"))


@st.composite
def packings(draw: st.DrawFn, batch: int, total: int) -> Packing:
    if draw(st.booleans()):
        return whole(total)
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=4))
    rows = [packed(lengths[row:] or lengths, draw(st.integers(0, total)), total) for row in range(batch)]
    return Packing(torch.stack([p for p, _ in rows]), torch.stack([d for _, d in rows]))


def oracle(q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, packing: Packing, sinks: Tensor | None = None) -> Tensor:
    return attend_dense(q, k, v, may_see(spec, packing, packing), sinks)


def forget_plans() -> None:
    """Plans and what they prepared are kept; a test that changes a threshold needs them made again."""
    plan._plan.cache_clear()
    plan._prepare_whole_rows.cache_clear()


def plan_for(q: Tensor, spec: LayerSpec, backend: str = "blocked") -> AttentionPlan:
    return plan_attention(
        spec, q.shape[-1], backend, q.device.type, product_dtype(q), torch.is_grad_enabled() and q.requires_grad
    )


def prepared(
    q: Tensor, spec: LayerSpec, packing: Packing, backend: str = "blocked", sinks: Tensor | None = None
) -> Attend:
    return plan_for(q, replace(spec, sink=sinks is not None), backend).prepare(packing, len(q))


def attend(
    q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, packing: Packing, backend: str, sinks: Tensor | None = None
) -> Tensor:
    return prepared(q, spec, packing, backend, sinks)(q, k, v, sinks)


def close(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal outputs, and equal gradients of every input."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
