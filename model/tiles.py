"""Sliding windows that are long, on a CPU, without a mask: causal tiles, merged by their log-sum-exp.

Cut the sequence into blocks of C = W tokens. A query sees of its own block what is not later than itself, which is a
causal tile. Of the block before, it sees the keys that stand later in their block than it does in its own: with
queries and keys both reversed, and shifted by one, that is a causal tile too. So each scored pair is one that is
wanted, all is done by the flash kernel, and no more than the tiles themselves is kept (Dao, "FlashAttention-2", 2023,
gives the merge and why each tile's backward pass may use the merged output and log-sum-exp). W = 4, two blocks:

    key       0 1 2 3 4 5 6 7
    query 4   . x x x | x            edge: queries 4 5 6 (of them 6 5 4) over keys 1 2 3 (3 2 1)
    query 5   . . x x | x x
    query 6   . . . x | x x x
    query 7   . . . . | x x x x

Legend: B batch, N blocks, G kv heads, R query heads of a kv head, C tokens of a block, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def tiled(q_bhtd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, window: int, sink_h: Tensor | None = None) -> Tensor:
    """Sliding-window attention of one document a row, (B, H, T, D) like the queries."""
    b, h, t, d = q_bhtd.shape
    g, c = k_bgtd.shape[1], min(window, t)
    n = -(-t // c)
    q, k, v = (F.pad(x, (0, 0, 0, n * c - t)).unflatten(2, (n, c)) for x in (q_bhtd, k_bgtd, v_bgtd))
    q = q.unflatten(1, (g, h // g)).permute(0, 3, 1, 2, 4, 5).contiguous()
    out = _Tiles.apply(q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), sink_h)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(b, h, n * c, d)[:, :, :t]


def causal_after(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor) -> Tensor:
    """Full attention of T queries over S keys, of which the last T are their own: what stands before, and a tile."""
    b, h, t, d = q_bhtd.shape
    before, g = k_bgsd.shape[2] - t, k_bgsd.shape[1]
    q = q_bhtd.reshape(b * g, h // g, t, d)
    k, v = (_for_heads(x, h // g) for x in (k_bgsd, v_bgsd))
    out, lse = _flash(q, k[:, :, before:], v[:, :, before:], 0.0, True)
    if before:
        far, far_lse = _flash(q, k[:, :, :before], v[:, :, :before], 0.0, False)
        total = torch.logaddexp(lse, far_lse)
        out = out * (lse - total).exp()[..., None] + far * (far_lse - total).exp()[..., None]
    return out.to(q.dtype).reshape(b, h, t, d)


class _Tiles(torch.autograd.Function):
    """q (B, N, G, R, C, D), k and v (B, N, G, C, D), sinks (G * R,) or none."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_h: Tensor | None) -> Tensor:
        out, lse = _causal(q, k, v)
        if _has_edge(q):
            edge_out, edge_lse = _causal(_late(q), _early(k), _early(v))
            own, own_lse = _late(out), _late(lse[..., None])[..., 0]
            total = torch.logaddexp(own_lse, edge_lse)
            merged = own * (own_lse - total).exp()[..., None] + edge_out * (edge_lse - total).exp()[..., None]
            _late(out, put=merged.to(out.dtype))
            _late(lse[..., None], put=total[..., None])
        if sink_h is not None:
            own_lse = lse
            lse = torch.logaddexp(lse, sink_h.to(lse.dtype).view(*q.shape[2:4], 1))
            out = (out * (own_lse - lse).exp()[..., None]).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sink_h)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink_h = ctx.saved_tensors
        grad = grad.contiguous()
        grads = _causal_backward(grad, q, k, v, out, lse)
        if _has_edge(q):
            edge = _causal_backward(
                _late(grad), _late(q), _early(k), _early(v), _late(out), _late(lse[..., None])[..., 0]
            )
            _late(grads[0], put=edge[0], add=True)
            _early(grads[1], put=edge[1], add=True)
            _early(grads[2], put=edge[2], add=True)
        if sink_h is None:
            return *grads, None
        sunk = (sink_h.to(lse.dtype).view(*q.shape[2:4], 1) - lse).exp()
        grad_sinks = -(sunk * (grad * out).sum(-1, dtype=lse.dtype)).sum((0, 1, 4)).flatten()
        return *grads, grad_sinks.to(sink_h.dtype)


def _has_edge(q: Tensor) -> bool:
    return q.shape[1] > 1 and q.shape[-2] > 1


def _late(x: Tensor, put: Tensor | None = None, add: bool = False) -> Tensor:
    """The queries that see into the block before theirs, last first: a copy; or write `put` back to them."""
    return _reversed(x[:, 1:, ..., :-1, :], put, add)


def _early(x: Tensor, put: Tensor | None = None, add: bool = False) -> Tensor:
    """The keys that are seen from the block after theirs, last first: a copy; or write `put` back to them."""
    return _reversed(x[:, :-1, ..., 1:, :], put, add)


def _reversed(part: Tensor, put: Tensor | None, add: bool) -> Tensor:
    if put is None:
        return part.flip(-2)
    return part.add_(put.flip(-2)) if add else part.copy_(put.flip(-2))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A causal tile per block: the output (..., R, C, D) and the log-sum-exp of the scores (..., R, C)."""
    heads = q.shape[-3]
    out, lse = _flash(q.flatten(0, -4), _for_heads(k, heads), _for_heads(v, heads), 0.0, True)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[-3]
    grad_q, grad_k, grad_v = _flash_backward(
        grad.flatten(0, -4), q.flatten(0, -4), _for_heads(k, heads), _for_heads(v, heads),
        out.flatten(0, -4), lse.flatten(0, -3), 0.0, True,
    )  # fmt: skip
    return grad_q.reshape(q.shape), grad_k.sum(1).view(k.shape), grad_v.sum(1).view(v.shape)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values of the tiles for each query head, without repeating them in memory."""
    return x.flatten(0, -3)[:, None].expand(-1, heads, -1, -1)
