"""Long windows on a CPU without a mask: squares and rectangles, merged by their log-sum-exp.

Of the last W tokens a query sees all. So behind a row of blocks of C = 2^m * LEAF <= W tokens lie: a lower triangle in
each block, an upper one W tokens before it, and between them W - C whole columns, a rectangle. A triangle is a
rectangle between two triangles of half its side; so on, down to the side LEAF, where the lower triangle of each block
and the upper one W tokens before it are one square of scores (`model.attention.squares`). Rectangles need no mask and go to
the flash kernel, all of a size in one call. W = 4, LEAF = 2:

    key       0 1 2 3 4 5 6 7
    query 4   . s r r | s            s: squares (of queries 4, 5: keys 4 and 5, but for query 4 key 1 and not 5)
    query 5   . . r r | s s          r: rectangles
    query 6   . . . s | r r s
    query 7   . . . . | r r s s

Chunked and full layers are what the kernel calls causal. Global tokens are one tile more: query W + a sees those that
are no later than token a, which is causal again. Each scored pair is one that is wanted, but for the kernel's own
blocks along a diagonal, and nothing but the tiles' outputs is kept. Dao, "FlashAttention-2" (2023), gives the merge,
and why each tile's backward pass may use the merged output.

Legend: B batch, G kv heads, R query heads of a kv head, X = B * G, N blocks, T tokens, D head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.squares import Squares

LEAF = 128  # tokens: side of the squares in float32, twice that in bf16; smaller ones are slower than what they save

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Tile:
    """`rows` queries from `query` on over `columns` keys from `key` on; and the same in `blocks` blocks, `step` apart.

    causal: of the i-th query only the first i + 1 keys.
    """

    query: int
    key: int
    rows: int
    columns: int
    blocks: int = 1
    step: int = 1
    causal: bool = False

    def begin(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write what the tile gives to `out` and `lse`. All (X, T, D), but lse (X, T, 1)."""
        found, found_lse = self._run(q, k, v)
        self._queries(out).copy_(found)
        self._queries(lse).copy_(found_lse[..., None])

    def merge(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add what the tile gives to `out` and `lse`, which have been begun."""
        more, more_lse = self._run(q, k, v)
        out, lse = self._queries(out), self._queries(lse)
        out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse[..., None] - lse))
        lse.copy_(torch.logaddexp(lse, more_lse[..., None]))

    def begin_gradients(self, saved: Sequence[Tensor], out: Tensor, grads: Sequence[Tensor], beta: int) -> None:
        """As `Squares.begin_gradients`."""
        for to, share, factor in zip(self._of(grads), self._shares(saved, out), (0, beta, beta), strict=True):
            to.copy_(share) if not factor else to.add_(share)

    def add_gradients(self, saved: Sequence[Tensor], out: Tensor, grads: Sequence[Tensor]) -> None:
        for to, share in zip(self._of(grads), self._shares(saved, out), strict=True):
            to.add_(share)

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _flash(*self._of((q, k, v)), 0.0, self.causal)

    def _shares(self, saved: Sequence[Tensor], out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the gradients of q, k and v, by the merged output and log-sum-exp."""
        grad, q, k, v, _, lse = saved
        grad, out, lse = (self._queries(x) for x in (grad, out, lse))
        return _flash_backward(grad, *self._of((q, k, v)), out, lse[..., 0], 0.0, self.causal)

    def _of(self, qkv: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of queries, keys and values, or of their gradients, what is the tile's: views (X, N, rows or columns, D)."""
        return self._queries(qkv[0]), *(_in_blocks(x, self.key, self.columns, self.blocks, self.step) for x in qkv[1:])

    def _queries(self, x: Tensor) -> Tensor:
        return _in_blocks(x, self.query, self.rows, self.blocks, self.step)


def _in_blocks(x: Tensor, first: int, size: int, blocks: int, step: int) -> Tensor:
    """Views (X, N, size, D) of `x` (X, T, D)."""
    return x[:, first : first + (blocks - 1) * step + size].unfold(1, size, step).mT


@dataclass(frozen=True)
class Cover:
    """All that is seen, each pair once. The parts of `first` hold each token's own pair and come first."""

    first: tuple[Squares | Tile, ...]
    more: tuple[Tile, ...]


@cache
def cover(total: int, window: int, overlap: bool, global_tokens: int, leaf: int) -> Cover:
    """What `total` tokens see under a sliding (or, without overlap, chunked) window no longer than they are.

    `leaf`: side of the smallest squares.
    """
    if overlap and total > window:
        first, more = _sliding(total, window, leaf)
    else:
        whole, rest = divmod(total, window)
        first, more = [Tile(0, 0, window, window, whole, window, causal=True)], []
        first += [Tile(whole * window, whole * window, rest, rest, causal=True)] if rest else []
    if global_tokens and total > window:
        seen = min(global_tokens, total - window if overlap else window)
        more.append(Tile(window, 0, total - window, seen, causal=overlap))
    return Cover(tuple(first), tuple(more))


def _sliding(total: int, window: int, leaf: int) -> tuple[list[Squares | Tile], list[Tile]]:
    """Blocks begin at the remainder of W by the side of the squares, so that those W tokens back begin at 0."""
    leaf = side = min(leaf, window)
    begin, (whole, rest) = window % leaf, divmod(total - window, leaf)
    first = [Squares(0, begin, 1), Squares(begin, leaf, window // leaf), Squares(window, leaf, whole, window)]
    more: list[Tile] = []
    if rest:
        last = total - rest
        first.append(Squares(last, rest, 1, window))
        more.append(Tile(last, last - window + rest, rest, leaf - rest))
    while 2 * side <= window:
        more += _rectangles(begin + side, begin, side, side, 2 * side, total)
        more += _rectangles(begin, begin - window + side, side, side, 2 * side, total)
        side *= 2
    more += _rectangles(begin, begin - window + side, side, window - side, side, total)
    return [s for s in first if s.side and s.blocks], more


def _rectangles(query: int, key: int, rows: int, columns: int, step: int, total: int) -> Iterator[Tile]:
    """One rectangle every `step` tokens: those that lie inside in one tile, those that are cut off one by one."""
    inside = range(max(0, -(key // step)), (total - query - rows) // step + 1)
    if inside and columns:
        yield Tile(query + inside[0] * step, key + inside[0] * step, rows, columns, len(inside), step)
    for n in range(-(-(total - query) // step)):
        at, early = query + n * step, max(0, -(key + n * step))
        if n not in inside and min(rows, total - at) > 0 and columns > early:
            yield Tile(at, key + n * step + early, min(rows, total - at), columns - early)


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
    g = k_bgtd.shape[1]
    q = q_bhtd.reshape(b * g, h // g, t, d)
    k, v = (x.reshape(b * g, t, d) for x in (k_bgtd, v_bgtd))
    leaf = 2 * LEAF if q.dtype.itemsize == 2 else LEAF
    return _Tiles.apply(q, k, v, sink_h, cover(t, min(window, t), overlap, global_tokens, leaf)).view(b, h, t, d)


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
    """q (X, R, T, D), k and v (X, T, D), sinks (G * R,) or none. Parts are merged in float32 at least."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_h: Tensor | None, parts: Cover) -> Tensor:
        merged = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_empty(q.shape, dtype=merged), q.new_empty((*q.shape[:-1], 1), dtype=merged)
        for head in range(q.shape[1]):
            mine = q[:, head], k, v, out[:, head], lse[:, head]
            for part in parts.first:
                part.begin(*mine)
            for tile in parts.more:
                tile.merge(*mine)
        if sink_h is not None:
            with_sink = torch.logaddexp(lse, _sinks(sink_h, lse))
            out, lse = out * (lse - with_sink).exp(), with_sink
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sink_h)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink_h = ctx.saved_tensors
        grads = [torch.empty_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
        delta = (grad * out).sum(-1, keepdim=True, dtype=lse.dtype)
        for head in range(q.shape[1]):
            saved = grad[:, head], q[:, head], k, v, delta[:, head], lse[:, head]
            to = grads[0][:, head], *grads[1:]
            for part in ctx.parts.first:
                part.begin_gradients(saved, out[:, head], to, min(head, 1))
            for tile in ctx.parts.more:
                tile.add_gradients(saved, out[:, head], to)
        grad_sinks = None if sink_h is None else _gradient_of_sinks(sink_h, lse, delta)
        return *(x.to(q.dtype) for x in grads), grad_sinks, None


def _gradient_of_sinks(sink_h: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """(H,), from the log-sum-exp with sinks and the sum of gradient and output, both (X, R, T, 1)."""
    shares = -((_sinks(sink_h, lse) - lse).exp() * delta).sum((2, 3))
    return shares.view(-1, len(sink_h)).sum(0).to(sink_h.dtype)


def _sinks(sink_h: Tensor, lse: Tensor) -> Tensor:
    """Sink logits (H,) beside `lse` (B * G, R, T, 1)."""
    heads = lse.shape[1]
    return sink_h.to(lse.dtype).view(-1, heads).repeat(len(lse) * heads // len(sink_h), 1)[..., None, None]
