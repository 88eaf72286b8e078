"""Long windows on a CPU without a mask: rectangles and small triangles, merged by their log-sum-exp.

Cut the sequence into blocks of C = W tokens. A query sees of its own block what is not later than itself, a lower
triangle, and of the block before it the keys that stand later in their block than it does in its own, an upper one.
A triangle is a rectangle, which needs no mask, between two triangles of half its side; so on, until they are small.
The small ones are what the flash kernel calls causal; the upper ones when their queries and keys are both reversed
and shifted by one. So each scored pair is one that is wanted, but for a few in the small triangles, and nothing but
the tiles' outputs is kept. W = 4, two blocks, triangles of side 2:

    key       0 1 2 3 4 5 6 7
    query 4   . x r r | x            r: rectangle (queries 4, 5 over keys 2, 3; queries 6, 7 over keys 4, 5)
    query 5   . . r r | x x          x: small triangles
    query 6   . . . x | r r x
    query 7   . . . . | r r x x

Global tokens are one tile more: query W + a sees those that are no later than token a, which is causal again.
Dao, "FlashAttention-2" (2023), gives the merge, and why each tile's backward pass may use the merged output.

Legend: B batch, G kv heads, R query heads of a kv head, N blocks, C tokens of a block, T tokens, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAF = 128  # tokens: side from which a triangle is split; smaller tiles are slower than what they save

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Tile:
    """`rows` queries from `query` on over `columns` keys from `key` on; and the same in `blocks` blocks, C apart.

    causal: of the i-th query only the first i + 1 keys; upper: only the keys after the i-th, for as many of both.
    """

    query: int
    key: int
    rows: int
    columns: int
    blocks: int = 1
    causal: bool = False
    upper: bool = False

    def queries(self, x: Tensor, step: int) -> Tensor:
        """Of `x` (X, T, D) what belongs to its queries, (X, N, rows, D): a view."""
        return _in_blocks(x, self.query, self.rows - self.upper, self.blocks, step)

    def keys(self, x: Tensor, step: int) -> Tensor:
        """Of `x` (X, T, D) what belongs to its keys, (X, N, columns, D): a view."""
        return _in_blocks(x, self.key + self.upper, self.columns - self.upper, self.blocks, step)

    def turned(self, x: Tensor) -> Tensor:
        """The kernel's order of tokens, or back from it: reversed when the triangle is an upper one."""
        return x.flip(-2) if self.upper else x


def _in_blocks(x: Tensor, first: int, size: int, blocks: int, step: int) -> Tensor:
    return x[:, first : first + (blocks - 1) * step + size].unfold(1, size, step).mT


@cache
def tiles_of(total: int, block: int, overlap: bool, global_tokens: int) -> tuple[Tile, ...]:
    """What `total` tokens in blocks of `block` see, own triangles first: of those, every query has one.

    overlap: whether a query sees W tokens back into the block before (sliding), or no further than its own (chunked).
    """
    whole, rest = divmod(total, block)
    own = list(_triangle(0, 0, block, whole, False)) if whole else []
    own += _triangle(whole * block, whole * block, rest, 1, False) if rest else []
    far: list[Tile] = []
    if overlap and whole > 1:
        far += _triangle(block, 0, block, whole - 1, True)
    if overlap and whole and rest:
        first = (whole - 1) * block
        far += _triangle(whole * block, first, rest, 1, True)
        far.append(Tile(whole * block, first + rest, rest, block - rest))
    if global_tokens and total > block:
        far.append(Tile(block, 0, total - block, min(global_tokens, total - block if overlap else block), 1, overlap))
    return *sorted(own, key=lambda tile: not tile.causal), *(t for t in far if t.rows - t.upper and t.columns)


def _triangle(query: int, key: int, side: int, blocks: int, upper: bool) -> Iterator[Tile]:
    """Lower triangle with its diagonal, or upper one without: split until its sides are at most `LEAF`."""
    if side <= LEAF:
        yield Tile(query, key, side, side, blocks, causal=True, upper=upper)
        return
    half = side // 2
    if upper:
        yield Tile(query, key + half, half, side - half, blocks)
    else:
        yield Tile(query + half, key, side - half, half, blocks)
    yield from _triangle(query, key, half, blocks, upper)
    yield from _triangle(query + half, key + half, side - half, blocks, upper)


@torch.compiler.disable
def tiled(
    q_bhtd: Tensor,
    k_bgtd: Tensor,
    v_bgtd: Tensor,
    window: int,
    sink_h: Tensor | None = None,
    overlap: bool = True,
    global_tokens: int = 0,
) -> Tensor:
    """Attention of one document a row under a sliding (or, without overlap, chunked) window: (B, H, T, D)."""
    b, h, t, d = q_bhtd.shape
    g, block = k_bgtd.shape[1], min(window, t)
    tiles = tiles_of(t, block, overlap, global_tokens)
    q = q_bhtd.reshape(b * g, h // g, t, d)
    out = _Tiles.apply(q, k_bgtd.reshape(b * g, t, d), v_bgtd.reshape(b * g, t, d), sink_h, tiles, block)
    return out.view(b, h, t, d)


def causal_after(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor) -> Tensor:
    """Full attention of T queries over S keys, of which the last T are their own: what stands before, and a tile."""
    b, h, t, d = q_bhtd.shape
    before, g = k_bgsd.shape[2] - t, k_bgsd.shape[1]
    q = q_bhtd.reshape(b * g, h // g, t, d)
    k, v = (x.flatten(0, 1)[:, None].expand(-1, h // g, -1, -1) for x in (k_bgsd, v_bgsd))
    out, lse = _flash(q, k[:, :, before:], v[:, :, before:], 0.0, True)
    if before:
        far, far_lse = _flash(q, k[:, :, :before], v[:, :, :before], 0.0, False)
        total = torch.logaddexp(lse, far_lse)
        out = out * (lse - total).exp()[..., None] + far * (far_lse - total).exp()[..., None]
    return out.to(q.dtype).reshape(b, h, t, d)


class _Tiles(torch.autograd.Function):
    """q (B * G, R, T, D), k and v (B * G, T, D), sinks (G * R,) or none. Tiles are merged in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_h: Tensor | None, tiles: tuple[Tile, ...], step: int
    ) -> Tensor:
        merged = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_zeros(q.shape, dtype=merged), q.new_full((*q.shape[:-1], 1), -torch.inf, dtype=merged)
        for tile in tiles:
            for head in range(q.shape[1]):
                _merge(tile, q[:, head], k, v, out[:, head], lse[:, head], step)
        if sink_h is not None:
            with_sink = torch.logaddexp(lse, _sinks(sink_h, lse))
            out, lse = out * (lse - with_sink).exp(), with_sink
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sink_h)
        ctx.tiles, ctx.step = tiles, step
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink_h = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        for tile in ctx.tiles:
            for head in range(q.shape[1]):
                saved = grad[:, head], q[:, head], k, v, out[:, head], lse[:, head]
                _add_gradients(tile, saved, (grads[0][:, head], *grads[1:]), ctx.step)
        grad_q, grad_k, grad_v = (x.to(q.dtype) for x in grads)
        if sink_h is None:
            return grad_q, grad_k, grad_v, None, None, None
        sunk = (_sinks(sink_h, lse) - lse).exp()
        grad_sinks = -(sunk * (grad * out).sum(-1, keepdim=True, dtype=lse.dtype)).sum((2, 3))
        return grad_q, grad_k, grad_v, grad_sinks.view(-1, len(sink_h)).sum(0).to(sink_h.dtype), None, None


def _sinks(sink_h: Tensor, lse: Tensor) -> Tensor:
    """Sink logits (H,) beside `lse` (B * G, R, T, 1)."""
    heads = lse.shape[1]
    return sink_h.to(lse.dtype).view(-1, heads).repeat(len(lse) * heads // len(sink_h), 1)[..., None, None]


def _merge(tile: Tile, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, step: int) -> None:
    """Add what the tile gives to `out` and `lse` (X, T, D or 1): the first tile of a query takes its place."""
    mine = (tile.turned(x) for x in (tile.queries(q, step), tile.keys(k, step), tile.keys(v, step)))
    more, more_lse = _flash(*mine, 0.0, tile.causal)
    more, more_lse = tile.turned(more), tile.turned(more_lse[..., None])
    out, lse = tile.queries(out, step), tile.queries(lse, step)
    out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse - lse))
    lse.copy_(torch.logaddexp(lse, more_lse))


def _add_gradients(tile: Tile, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], step: int) -> None:
    """Add the tile's share to the gradients of queries, keys and values, each (X, T, D)."""
    grad, q, k, v, out, lse = (
        tile.turned(tile.keys(x, step) if i in (2, 3) else tile.queries(x, step)) for i, x in enumerate(saved)
    )
    shares = _flash_backward(grad, q, k, v, out, lse[..., 0], 0.0, tile.causal)
    for of_all, share, cut in zip(grads, shares, (tile.queries, tile.keys, tile.keys), strict=True):
        cut(of_all, step).add_(tile.turned(share))
