"""Short windows as batched matrix products: O(T * W) time and memory, forward and backward, on any device.

Cut the sequence into blocks of C = W tokens. Of its own block a query sees the keys that are not later than itself; of
the block before, those that stand later in their block than it does in its own. So of the j-th keys of both blocks a
query can see exactly one, and one C x C square of scores holds all that is seen: two products, one softmax.
W = C = 3, the second block:

    key       0 1 2 | 3 4 5        the square, by j = 0, 1, 2
    query 3   . x x | x . .        3 1 2
    query 4   . . x | x x .        3 4 2
    query 5   . . . | x x x        3 4 5

Legend: B batch, T query positions, S key positions, H heads, G kv heads, R = H / G, D head size,
        N blocks, M = B * N blocks of all rows, C tokens of a block, F global tokens, K = F + C scores a query.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.places import Places, see
from model.windows import LayerSpec, visible

LEAST = 16  # tokens of a block; products of smaller ones are slower than what they save


def blocked(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None = None
) -> Tensor:
    """Attention (B, H, T, D) of a layer that sees at most C tokens back, and the first F tokens of the row.

    All blocks are one batched product; keys are not repeated for grouped queries.
    """
    b, h, t, d = q_bhtd.shape
    g, c = k_bgsd.shape[1], _block(spec)
    bias = block_bias(spec, places) if places.made is None else places.made
    n, first = bias.shape[1], min(spec.global_tokens, t)
    q = F.pad(q_bhtd, (0, 0, 0, n * c - t)).view(b, g, h // g, n, c, d)
    q = q.permute(0, 3, 1, 2, 4, 5).reshape(b * n, g, h // g * c, d)
    k, v = (_blocks(x, n, c) for x in (k_bgsd, v_bgsd))
    ahead = [_for_each_block(x[:, :, :first], n) for x in (k_bgsd, v_bgsd)] if first else [None, None]
    out = _Blocks.apply(q, k, v, *ahead, bias, sink_h)
    return out.view(b, n, g, h // g, c, d).permute(0, 2, 3, 1, 4, 5).reshape(b, h, n * c, d)[:, :, :t]


def _block(spec: LayerSpec) -> int:
    """C: no fewer than the window, so that a block and its predecessor hold all keys."""
    assert spec.ring_slots is not None
    return max(LEAST, spec.ring_slots)


def _blocks(x_bgtd: Tensor, n: int, c: int) -> Tensor:
    """Keys or values as (1 + M, G, C, D): a block of zeros first, so that every block has one before it."""
    blocks = F.pad(x_bgtd, (0, 0, 0, n * c - x_bgtd.shape[2])).unflatten(2, (n, c)).transpose(1, 2).flatten(0, 1)
    return torch.cat((torch.zeros_like(blocks[:1]), blocks))


def _for_each_block(first_bgfd: Tensor, n: int) -> Tensor:
    """Keys or values of the global tokens as (M, G, F, D)."""
    return first_bgfd[:, None].expand(-1, n, -1, -1, -1).flatten(0, 1)


class _Blocks(torch.autograd.Function):
    """q (M, G, R * C, D), k and v (1 + M, G, C, D), global ones (M, G, F, D) or none, bias (B or 1, N, C, K).

    Derived by hand because autograd gives the gradient of the keys transposed, and undoing that costs more than all
    products together. Weights are kept for the way back in the dtype of the values.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_first: Tensor | None, v_first: Tensor | None, bias: Tensor,
        sink_h: Tensor | None,
    ) -> Tensor:  # fmt: skip
        m, g, rows, d = q.shape
        scores = _against(q, k, k_first).view(-1, bias.shape[1], g, rows // bias.shape[2], *bias.shape[2:])
        sinks = None if sink_h is None else sink_h.float().view(1, 1, g, -1, 1, 1)
        weights, sunk = _shares(scores.float() * d**-0.5 + bias[:, :, None, None], sinks)
        weights = weights.to(v.dtype).view(m, g, rows, -1)
        ctx.save_for_backward(q, k, v, k_first, v_first, weights, sunk)
        return _times(weights, v, v_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_first, v_first, weights, sunk = ctx.saved_tensors
        moved = weights * _against(grad, v, v_first).float()
        mean = moved.sum(-1, keepdim=True)
        grad_scores = ((moved - weights * mean) * q.shape[-1] ** -0.5).to(q.dtype)
        grad_q = _times(grad_scores, k, k_first)
        grad_k, grad_k_first = _gathered(grad_scores, q, k_first)
        grad_v, grad_v_first = _gathered(weights, grad, v_first)
        grad_sinks = None if sunk is None else -(sunk * mean.view_as(sunk)).sum((0, 1, 4, 5)).flatten()
        return grad_q, grad_k, grad_v, grad_k_first, grad_v_first, None, grad_sinks


def _against(x: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
    """Products (M, G, R * C, K) of x (M, G, R * C, D) with the keys that each may see."""
    own, before = x @ k[1:].mT, x @ k[:-1].mT
    both = torch.where(_own(own), own, before)
    return both if first is None else torch.cat((x @ first.mT, both), -1)


def _times(weights: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
    """Sums (M, G, R * C, D) of the values by their weights (M, G, R * C, K)."""
    ahead, own, before = _apart(weights, first)
    out = own @ v[1:] + before @ v[:-1]
    return out if first is None else out + ahead @ first


def _gathered(weights: Tensor, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What each key is given: `weights` turned, times x; to keys (1 + M, G, C, D) and to global tokens."""
    ahead, own, before = _apart(weights, first)
    blocks = F.pad(own.mT @ x, (0, 0, 0, 0, 0, 0, 1, 0)) + F.pad(before.mT @ x, (0, 0, 0, 0, 0, 0, 0, 1))
    return blocks, None if first is None else ahead.mT @ x


def _apart(weights: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of global tokens, of keys of the own block, and of the one before."""
    ahead, both = weights.tensor_split((0 if first is None else first.shape[2],), -1)
    own = _own(both)
    return ahead, both * own, both * ~own


def _own(square: Tensor) -> Tensor:
    """Of (…, R * C, C) which keys are those of the query's own block: bool (R * C, C)."""
    rows, c = square.shape[-2:]
    return torch.arange(c, device=square.device) <= torch.arange(rows, device=square.device)[:, None] % c


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
    """Float (B or 1, N, C, K) to add to the scores: 0 where a query sees a key, else -inf.

    Padding has a position far below 0 as a key: nobody's window reaches it.
    """
    t, c = places.positions.shape[1], _block(spec)
    n = -(-t // c)
    pad, unseen = n * c - t, torch.iinfo(torch.int64).min // 2

    def in_blocks(x: Tensor, value: int) -> tuple[Tensor, Tensor]:
        """Of queries (B * N, C), and of keys (B * N, 2C): of the block before and of their own."""
        queries = F.pad(x, (0, pad), value=value).reshape(-1, c)
        return queries, F.pad(x, (c, pad), value=value).unfold(1, 2 * c, c).reshape(-1, 2 * c)

    window = replace(spec, global_tokens=0)
    q_pos, k_pos = in_blocks(places.positions, unseen)
    q_docs, k_docs = (None, None) if places.documents is None else in_blocks(places.documents, -1)
    seen = see(window, Places(q_pos, q_docs), Places(k_pos, k_docs)) & (k_pos >= 0)[:, None, :]
    before, own = seen.chunk(2, -1)
    seen = torch.where(_own(own), own, before)
    if spec.global_tokens:
        first = places.positions[:, : spec.global_tokens].repeat_interleave(n, 0)[:, None]
        ahead = visible(spec, q_pos[..., None], first) & ~visible(window, q_pos[..., None], first)
        seen = torch.cat((ahead, seen), -1)
    return torch.where(seen, 0.0, -torch.inf).unflatten(0, (-1, n))
