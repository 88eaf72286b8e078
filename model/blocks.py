"""Short windows as batched matrix products: O(T * W) time and memory, forward and backward, on any device.

Legend: B batch, T query positions, S key positions, H heads, G kv heads, R = H / G, D head size,
        N blocks, C queries a block, K keys a block, F global tokens.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.places import Places, see
from model.windows import LayerSpec, visible


def blocked(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None = None
) -> Tensor:
    """Blocks of C queries, each against the K = 2C keys that any of them may see: O(T * W) time and memory.

    Global tokens, the first of the row (which is then one document), stand before the keys of every block.

    All blocks are one batched matrix product; keys are not repeated for grouped queries. With W = 3 and C = 4,
    block 1 (queries 4 to 7) multiplies keys 0 to 7, of which the mask leaves 2 to 7.
    """
    b, h, t, d = q_bhtd.shape
    g, c = k_bgsd.shape[1], _block(spec)
    n = -(-t // c)
    bias = block_bias(spec, places) if places.made is None else places.made
    first = min(spec.global_tokens, t)
    q = F.pad(q_bhtd.transpose(1, 2), (0, 0, 0, 0, 0, n * c - t))
    q = q.reshape(b, n, c, g, h // g, d).permute(0, 1, 3, 4, 2, 5).contiguous()
    k, v = (_pairs_of_blocks(x, n, c) for x in (k_bgsd, v_bgsd))
    if first:
        k, v = (_behind_globals(x[:, :, :first], pairs) for x, pairs in ((k_bgsd, k), (v_bgsd, v)))
    out = _Blocks.apply(q, k, v, bias, sink_h)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(b, h, n * c, d)[:, :, :t]


def _block(spec: LayerSpec) -> int:
    """C, the queries of a block: no fewer than its window, so that a block and its predecessor hold all keys."""
    assert spec.ring_slots is not None
    return max(16, spec.ring_slots)


def _pairs_of_blocks(x_bgtd: Tensor, n: int, c: int) -> Tensor:
    """Keys or values to (B, N, G, 2C, D): each block behind its predecessor (zeros before the first)."""
    blocks = F.pad(x_bgtd.transpose(1, 2), (0, 0, 0, 0, c, n * c - x_bgtd.shape[2])).unflatten(1, (n + 1, c))
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2).transpose(2, 3).contiguous()


def _behind_globals(first_bgfd: Tensor, pairs: Tensor) -> Tensor:
    """Keys or values (B, N, G, F + 2C, D): the first tokens, then those of each pair of blocks."""
    return torch.cat((first_bgfd[:, None].expand(-1, pairs.shape[1], -1, -1, -1), pairs), dim=3)


class _Blocks(torch.autograd.Function):
    """Softmax attention inside blocks: q (B, N, G, R, C, D), k and v (B, N, G, K, D), bias (B or 1, N, C, K).

    Derived by hand because autograd gives the gradient of the keys transposed, and undoing that costs more than all
    products together. Weights are kept for the way back in the dtype of the values.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink_h: Tensor | None) -> Tensor:
        scores = (q.flatten(3, 4) @ k.mT).float().view(*q.shape[:5], -1) * q.shape[-1] ** -0.5 + bias[:, :, None, None]
        sinks = None if sink_h is None else sink_h.float().view(1, 1, *q.shape[2:4], 1, 1)
        weights, sunk = _shares(scores, sinks)
        weights = weights.to(v.dtype).flatten(3, 4)
        ctx.save_for_backward(q, k, v, weights, *([] if sunk is None else [sunk]))
        return (weights @ v).view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, *sunk = ctx.saved_tensors
        grad = grad.flatten(3, 4)
        moved = weights * (grad @ v.mT).float()
        mean = moved.sum(-1, keepdim=True)
        grad_scores = ((moved - weights * mean) * q.shape[-1] ** -0.5).to(q.dtype)
        grad_q = (grad_scores @ k).view_as(q)
        grad_sinks = -(sunk[0] * mean.view_as(sunk[0])).sum((0, 1, 4, 5)).flatten() if sunk else None
        return grad_q, grad_scores.mT @ q.flatten(3, 4), weights.mT @ grad, None, grad_sinks


def _shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Softmax over the last dimension of scores, -inf where unseen, and what goes to the sinks."""
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    peak = peak if sinks is None else torch.maximum(peak, sinks)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if sinks is None:
        return weights / total, None
    sunk = torch.exp(sinks - peak)
    return weights / (total + sunk), sunk / (total + sunk)


def block_bias(spec: LayerSpec, places: Places) -> Tensor:
    """Float (B or 1, N, C, K) to add to scores in blocks: 0 where a query sees a key, else -inf.

    K = 2C, behind the global tokens if there are any. Padding has a position far below 0 as a key: nobody's window
    reaches it.
    """
    t, c = places.positions.shape[1], _block(spec)
    n = -(-t // c)
    pad, unseen = n * c - t, torch.iinfo(torch.int64).min // 2

    def in_blocks(x: Tensor, value: int) -> tuple[Tensor, Tensor]:
        queries = F.pad(x, (0, pad), value=value).reshape(-1, c)
        return queries, F.pad(x, (c, pad), value=value).unfold(1, 2 * c, c).reshape(-1, 2 * c)

    window = replace(spec, global_tokens=0)
    q_pos, k_pos = in_blocks(places.positions, unseen)
    q_docs, k_docs = (None, None) if places.documents is None else in_blocks(places.documents, -1)
    seen = see(window, Places(q_pos, q_docs), Places(k_pos, k_docs)) & (k_pos >= 0)[:, None, :]
    if spec.global_tokens:
        first = places.positions[:, : spec.global_tokens].repeat_interleave(n, 0)[:, None]
        ahead = visible(spec, q_pos[..., None], first) & ~visible(window, q_pos[..., None], first)
        seen = torch.cat((ahead, seen), -1)
    return torch.where(seen, 0.0, -torch.inf).unflatten(0, (-1, n))
