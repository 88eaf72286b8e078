"""Short windows as batched matrix products: O(T * W) time and memory, forward and backward, on any device.

The sequence is cut into blocks of C tokens: W, or MIN_BLOCK if that is more. Take C = W. Then query i of a block sees
keys 0…i of its own block and keys i+1…C−1 of the block before. So for each j it sees key j of exactly one of the two
blocks, and one C x C square of scores holds everything a block needs: two products, one softmax. Where C > W, the
bias hides the keys of the square that are outside the window. The second block with W = C = 3:

    key       0 1 2 | 3 4 5        the keys in the square
    query 3   . x x | x . .        3 1 2
    query 4   . . x | x x .        3 4 2
    query 5   . . . | x x x        3 4 5

Legend: B batch, T query positions, H heads, G kv heads, R = H / G, D head size, N blocks of a row, M = B * N,
        C tokens of a block, F global tokens, K = F + C scores of a query.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.reference import at_least_float32
from model.packing import Packing, may_see
from model.windows import LayerSpec, visible

MIN_BLOCK = 16  # tokens; matrix products of smaller blocks cost more than they save


@dataclass(frozen=True)
class Blocks:
    """A layer that sees at most C tokens back, and the first F tokens of the row.

    bias: (B or 1, N, C, K), added to the scores: 0 where a query sees a key, else -inf.
    """

    global_tokens: int
    bias: Tensor

    @staticmethod
    def of(spec: LayerSpec, packing: Packing) -> "Blocks":
        return Blocks(spec.global_tokens, _block_bias(spec, packing))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """All blocks are one batched product. Keys are not repeated for grouped queries."""
        (b, h, t, d), g, (n, c) = q.shape, k.shape[1], self.bias.shape[1:3]
        first = min(self.global_tokens, t)
        q = F.pad(q, (0, 0, 0, n * c - t)).view(b, g, h // g, n, c, d)
        q = q.permute(0, 3, 1, 2, 4, 5).reshape(b * n, g, h // g * c, d)
        # Keys and values of the global tokens are repeated for each block: (M, G, F, D).
        global_kv = [x[:, None, :, :first].expand(-1, n, -1, -1, -1).flatten(0, 1) if first else None for x in (k, v)]
        out = _Blocks.apply(q, _cut(k, n, c), _cut(v, n, c), *global_kv, self.bias, sinks)
        return out.view(b, n, g, h // g, c, d).permute(0, 2, 3, 1, 4, 5).reshape(b, h, n * c, d)[:, :, :t]


def _cut(x_bgtd: Tensor, n: int, c: int) -> Tensor:
    """Keys or values as blocks (1 + M, G, C, D). The first block is zeros, so that every block has one before it."""
    blocks = F.pad(x_bgtd, (0, 0, 0, n * c - x_bgtd.shape[2])).unflatten(2, (n, c)).transpose(1, 2).flatten(0, 1)
    return torch.cat((torch.zeros_like(blocks[:1]), blocks))


class _Blocks(torch.autograd.Function):
    """q (M, G, R * C, D), k and v (1 + M, G, C, D), global k and v (M, G, F, D) or None, bias (B or 1, N, C, K).

    The gradient is derived by hand: autograd returns that of the keys transposed, and undoing that costs more than all
    products together. The weights are kept for the backward pass in the dtype of the values.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_global: Tensor | None, v_global: Tensor | None, bias: Tensor,
        sink_h: Tensor | None,
    ) -> Tensor:  # fmt: skip
        m, g, rows, d = q.shape
        scores = _scores(q, k, k_global).view(-1, bias.shape[1], g, rows // bias.shape[2], *bias.shape[2:])
        sinks = None if sink_h is None else at_least_float32(sink_h).view(1, 1, g, -1, 1, 1)
        weights, sink_weights = _softmax(at_least_float32(scores) * d**-0.5 + bias[:, :, None, None], sinks)
        weights = weights.to(v.dtype).view(m, g, rows, -1)
        ctx.save_for_backward(q, k, v, k_global, v_global, weights, sink_weights)
        return _weighted_sum(weights, v, v_global)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_global, v_global, weights, sink_weights = ctx.saved_tensors
        weighted = weights * at_least_float32(_scores(grad, v, v_global))
        mean = weighted.sum(-1, keepdim=True)
        grad_scores = ((weighted - weights * mean) * q.shape[-1] ** -0.5).to(q.dtype)
        grad_q = _weighted_sum(grad_scores, k, k_global)
        grad_k, grad_k_global = _scatter(grad_scores, q, k_global)
        grad_v, grad_v_global = _scatter(weights, grad, v_global)
        grad_sinks = None
        if sink_weights is not None:
            grad_sinks = -(sink_weights * mean.view_as(sink_weights)).sum((0, 1, 4, 5)).flatten()
        return grad_q, grad_k, grad_v, grad_k_global, grad_v_global, None, grad_sinks


def _scores(x: Tensor, k: Tensor, k_global: Tensor | None) -> Tensor:
    """Products (M, G, R * C, K) of x (M, G, R * C, D) with the keys in each query's square."""
    own, before = x @ k[1:].mT, x @ k[:-1].mT
    square = torch.where(_own_block(own), own, before)
    return square if k_global is None else torch.cat((x @ k_global.mT, square), -1)


def _weighted_sum(weights: Tensor, v: Tensor, v_global: Tensor | None) -> Tensor:
    """Sums (M, G, R * C, D) of the values, with weights (M, G, R * C, K)."""
    of_global, own, before = _split(weights, v_global)
    out = own @ v[1:] + before @ v[:-1]
    return out if v_global is None else out + of_global @ v_global


def _scatter(weights: Tensor, x: Tensor, like_global: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Transposed `weights` times x: what each key receives, (1 + M, G, C, D), and each global token."""
    of_global, own, before = _split(weights, like_global)
    blocks = F.pad(own.mT @ x, (0, 0, 0, 0, 0, 0, 1, 0)) + F.pad(before.mT @ x, (0, 0, 0, 0, 0, 0, 0, 1))
    return blocks, None if like_global is None else of_global.mT @ x


def _split(weights: Tensor, like_global: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the global tokens, of the query's own block, and of the block before."""
    of_global, square = weights.tensor_split((0 if like_global is None else like_global.shape[2],), -1)
    own = _own_block(square)
    return of_global, square * own, square * ~own


def _own_block(square: Tensor) -> Tensor:
    """Which keys of a square (…, R * C, C) lie in the query's own block: bool (R * C, C)."""
    rows, c = square.shape[-2:]
    return torch.arange(c, device=square.device) <= torch.arange(rows, device=square.device)[:, None] % c


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Softmax over the last dimension, in which -inf marks unseen keys; and the share of the sinks."""
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    peak = peak if sinks is None else torch.maximum(peak, sinks)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if sinks is None:
        return weights / total, None
    sink_weights = torch.exp(sinks - peak)
    return weights / (total + sink_weights), sink_weights / (total + sink_weights)


def _block_bias(spec: LayerSpec, packing: Packing) -> Tensor:
    """See `Blocks.bias`. As keys, padding tokens get a position so far below 0 that no window reaches it."""
    assert spec.ring_slots is not None
    t, c = packing.positions.shape[1], max(MIN_BLOCK, spec.ring_slots)
    n = -(-t // c)
    pad, unseen = n * c - t, torch.iinfo(torch.int64).min // 2

    def in_blocks(x: Tensor, value: int) -> tuple[Tensor, Tensor]:
        """x of the queries (B * N, C), and of the keys (B * N, 2C) of the block before and their own."""
        queries = F.pad(x, (0, pad), value=value).reshape(-1, c)
        return queries, F.pad(x, (c, pad), value=value).unfold(1, 2 * c, c).reshape(-1, 2 * c)

    window = replace(spec, global_tokens=0)
    q_pos, k_pos = in_blocks(packing.positions, unseen)
    q_docs, k_docs = (None, None) if packing.documents is None else in_blocks(packing.documents, -1)
    seen = may_see(window, Packing(q_pos, q_docs), Packing(k_pos, k_docs)) & (k_pos >= 0)[:, None, :]
    before, own = seen.chunk(2, -1)
    seen = torch.where(_own_block(own), own, before)
    if spec.global_tokens:
        first = packing.positions[:, : spec.global_tokens].repeat_interleave(n, 0)[:, None]
        global_only = visible(spec, q_pos[..., None], first) & ~visible(window, q_pos[..., None], first)
        seen = torch.cat((global_only, seen), -1)
    return torch.where(seen, 0.0, -torch.inf).unflatten(0, (-1, n))
