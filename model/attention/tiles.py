"""Long windows on a CPU without a mask: squares and rectangles of scores, merged by their log-sum-exp.

A query sees all of the last W tokens. Cut the row into blocks of C tokens, where C <= W is LEAF times a power of 2.
The keys that a block of queries sees are a lower triangle in the block itself, an upper triangle W tokens earlier,
and a rectangle between them: W - C keys that all queries of the block see.
Each triangle is again a rectangle between two triangles of half its side. At side LEAF the recursion ends: the lower
triangle of a block and the upper one W tokens earlier form one square of scores (`model.attention.squares`). Rectangles
need no mask, and all rectangles of one size are one call of the flash kernel. W = 4, LEAF = 2:

    key       0 1 2 3 4 5 6 7
    query 4   . s r r | s            s: squares (queries 4 and 5: keys 4 and 5, but for query 4 key 1 instead of 5)
    query 5   . . r r | s s          r: rectangles
    query 6   . . . s | r r s
    query 7   . . . . | r r s s

Chunked and full layers are what the kernel calls causal. Global tokens are one more tile: query W + a sees the global
tokens up to token a, which is causal again. So every score that is computed is one that is seen, except in the kernel's
own blocks along a diagonal, and only the outputs of the tiles are kept. Dao, "FlashAttention-2" (2023), gives the merge
and shows why the backward pass of each tile may use the merged output.

Legend: B batch, G kv heads, R query heads of a kv head, X = B * G, N blocks, T tokens, D head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.squares import BLOCKS_AT_ONCE, Squares, multiply, weigh
from model.packing import Packing, document_spans

LEAF = 128  # side of the smallest squares; smaller ones cost more than they save
KERNEL_ROWS = 768  # queries; with fewer the kernel's backward pass makes small products, which gain little from bf16


@cache
def _kernel(name: str) -> Any:
    """PyTorch's flash attention for CPUs, a private operator that also returns the log-sum-exp."""
    return getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}").default


@dataclass(frozen=True)
class Tile:
    """`rows` queries from `query` on over `columns` keys from `key` on, repeated in `blocks` blocks `step` apart.

    causal: query i of the tile sees only its first i + 1 keys.
    """

    query: int
    key: int
    rows: int
    columns: int
    blocks: int = 1
    step: int = 1
    causal: bool = False

    def write(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Overwrite the tile's part of `out` (X, T, D) and `lse` (X, T, 1)."""
        tile_out, tile_lse = self._forward(q, k, v)
        self._queries(out).copy_(tile_out)
        self._queries(lse).copy_(tile_lse[..., None])

    def merge(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the tile into `out` and `lse`, which hold the result of other keys."""
        more, more_lse = self._forward(q, k, v)
        out, lse = self._queries(out), self._queries(lse)
        out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse[..., None] - lse))
        lse.copy_(torch.logaddexp(lse, more_lse[..., None]))

    def write_gradients(
        self, saved: Sequence[Tensor], out: Tensor, grads: Sequence[Tensor], beta: int, beta_q: int = 0
    ) -> None:
        """See `Squares.write_gradients`. The gradient of q keeps `beta_q` times its value."""
        if beta_q and saved[1].dtype.itemsize == 2 and self.rows < KERNEL_ROWS and not self.causal:
            return self._add_products(saved, grads)
        grad, q, k, v, _, lse = saved
        grad, out, lse = (self._queries(x) for x in (grad, out, lse))
        shares = _kernel("_backward")(grad, *self._qkv((q, k, v)), out, lse[..., 0], 0.0, self.causal)
        for to, share, keep in zip(self._qkv(grads), shares, (beta_q, beta, beta), strict=True):
            to.add_(share) if keep else to.copy_(share)

    def _add_products(self, saved: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the tile's part of the gradients as batched products, a few blocks at a time."""
        grad, q, k, v, delta, lse = saved
        dtype, at_once = lse.dtype, max(2, BLOCKS_AT_ONCE * LEAF**2 // (self.rows * self.columns))  # 1 is far slower
        operands = *self._qkv((q, k, v)), *map(self._queries, (grad, delta, lse)), *self._qkv(grads)
        for row in zip(*operands, strict=True):
            for q, k, v, grad, delta, lse, *grads in zip(*(x.split(at_once) for x in row), strict=True):
                scores, grad_weights = (q @ k.mT).to(dtype), (grad @ v.mT).to(dtype)
                both = weigh(scores, grad_weights, lse, delta, q.shape[-1] ** -0.5)
                weights, grad_scores = (x.to(q.dtype) for x in both)
                multiply(grads[0], grad_scores, k, 1)
                multiply(grads[1], grad_scores.mT, q, 1)
                multiply(grads[2], weights.mT, grad, 1)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _kernel("")(*self._qkv((q, k, v)), 0.0, self.causal)

    def _qkv(self, qkv: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tile's part of queries, keys and values, or of their gradients: views (X, N, rows or columns, D)."""
        return self._queries(qkv[0]), *(_in_blocks(x, self.key, self.columns, self.blocks, self.step) for x in qkv[1:])

    def _queries(self, x: Tensor) -> Tensor:
        return _in_blocks(x, self.query, self.rows, self.blocks, self.step)


def _in_blocks(x: Tensor, first: int, size: int, blocks: int, step: int) -> Tensor:
    """Views (X, N, size, D) of `x` (X, T, D)."""
    return x[:, first : first + (blocks - 1) * step + size].unfold(1, size, step).mT


@dataclass(frozen=True)
class Cover:
    """Tiles and squares that hold each visible pair once. `first` holds every token's own pair, and runs first."""

    first: tuple[Squares | Tile, ...]
    more: tuple[Tile, ...]


@cache
def cover(total: int, window: int, overlap: bool, global_tokens: int, leaf: int) -> Cover:
    """The cover of a row of `total` tokens under a sliding window, or without `overlap` a chunked one.

    The window is at most `total`. `leaf` is the side of the smallest squares.
    """
    if overlap and total > window:
        first, more = _cover_sliding(total, window, leaf)
    else:
        whole, rest = divmod(total, window)
        first, more = [Tile(0, 0, window, window, whole, window, causal=True)], []
        first += [Tile(whole * window, whole * window, rest, rest, causal=True)] if rest else []
    if global_tokens and total > window:
        seen = min(global_tokens, total - window if overlap else window)
        more.append(Tile(window, 0, total - window, seen, causal=overlap))
    return Cover(tuple(first), tuple(more))


def _cover_sliding(total: int, window: int, leaf: int) -> tuple[list[Squares | Tile], list[Tile]]:
    """Blocks start at W modulo the side of the squares, so that the blocks W tokens earlier start at 0."""
    leaf = side = min(leaf, window)
    start, (whole, rest) = window % leaf, divmod(total - window, leaf)
    first = [Squares(0, start, 1), Squares(start, leaf, window // leaf), Squares(window, leaf, whole, window)]
    more: list[Tile] = []
    if rest:
        last = total - rest
        first.append(Squares(last, rest, 1, window))
        more.append(Tile(last, last - window + rest, rest, leaf - rest))
    while 2 * side <= window:
        more += _rectangles(start + side, start, side, side, 2 * side, total)
        more += _rectangles(start, start - window + side, side, side, 2 * side, total)
        side *= 2
    more += _rectangles(start, start - window + side, side, window - side, side, total)
    return [s for s in first if s.side and s.blocks], more


def _rectangles(query: int, key: int, rows: int, columns: int, step: int, total: int) -> Iterator[Tile]:
    """One rectangle every `step` tokens: one tile for all that lie inside the row, one for each that is cut off."""
    inside = range(max(0, -(key // step)), (total - query - rows) // step + 1)
    if inside and columns:
        yield Tile(query + inside[0] * step, key + inside[0] * step, rows, columns, len(inside), step)
    for n in range(-(-(total - query) // step)):
        at, early = query + n * step, max(0, -(key + n * step))
        if n not in inside and min(rows, total - at) > 0 and columns > early:
            yield Tile(at, key + n * step + early, min(rows, total - at), columns - early)


@dataclass(frozen=True)
class Tiles:
    """Rows that are one document each, under a sliding window of W tokens, or without `overlap` a chunked one."""

    window: int
    overlap: bool = True
    global_tokens: int = 0

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        (b, h, t, d), g = q.shape, k.shape[1]
        grouped = q.reshape(b * g, h // g, t, d)
        k, v = (x.reshape(b * g, t, d) for x in (k, v))
        parts = cover(t, min(self.window, t), self.overlap, self.global_tokens, LEAF)
        return _Tiles.apply(grouped, k, v, sinks, parts).view(b, h, t, d)


@dataclass(frozen=True)
class CausalAfter:
    """A full layer for T queries over S keys in a cache, the last T their own: all earlier keys, and a causal tile."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        (b, h, t, d), g, before = q.shape, k.shape[1], k.shape[2] - q.shape[2]
        q = q.reshape(b * g, h // g, t, d)
        k, v = (x.flatten(0, 1)[:, None].expand(-1, h // g, -1, -1) for x in (k, v))
        out, lse = _kernel("")(q, k[:, :, before:], v[:, :, before:], 0.0, True)
        if before:
            far, far_lse = _kernel("")(q, k[:, :, :before], v[:, :, :before], 0.0, False)
            total = torch.logaddexp(lse, far_lse)
            out = out * (lse - total).exp()[..., None] + far * (far_lse - total).exp()[..., None]
        return out.to(q.dtype).reshape(b, h, t, d)


@dataclass(frozen=True)
class FullAfter:
    """A full layer for the last T tokens of rows of S tokens, one document at a time. Gradients are exact.

    documents: first and end position in the row, and the rows; None where each row is one document.
    """

    documents: tuple[tuple[int, int, list[int]], ...] | None

    @staticmethod
    def of(row: Packing) -> "FullAfter":
        if row.documents is None:
            return FullAfter(None)
        return FullAfter(tuple((*span, rows) for span, rows in document_spans(row.documents).items()))

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if self.documents is None:
            return _after(q, k, v, sinks)
        out, before = torch.zeros_like(q), k.shape[2] - q.shape[2]
        for first, end, rows in self.documents:
            keys, queries = slice(first, end), slice(max(0, first - before), end - before)
            if end > before:
                of_document = q[rows, :, queries], k[rows, :, keys], v[rows, :, keys]
                out[rows, :, queries] = _after(*of_document, sinks)
        return out


def _after(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Queries (B, H, T, D) over keys (B, G, S, D), the last T of which are their own."""
    (b, h, t, d), g, before = q.shape, k.shape[1], k.shape[2] - q.shape[2]
    grouped = q.reshape(b * g, h // g, t, d), *(x.reshape(b * g, before + t, d) for x in (k, v))
    earlier = (Tile(0, 0, t, before),) if before else ()
    return _Tiles.apply(*grouped, sinks, Cover((Tile(0, before, t, t, causal=True),), earlier)).view(b, h, t, d)


class _Tiles(torch.autograd.Function):
    """q (X, R, T, D), k and v (X, S, D), sinks (G * R,) or None. Tiles are merged in at least float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_h: Tensor | None, parts: Cover) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty((*q.shape[:-1], 1), dtype=dtype)
        for head in range(q.shape[1]):
            of_head = q[:, head], k, v, out[:, head], lse[:, head]
            for part in parts.first:
                part.write(*of_head)
            for tile in parts.more:
                tile.merge(*of_head)
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
        delta = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
        # `first` writes the gradients of the queries' own keys before `more` adds to them. Earlier keys begin at zero.
        new = torch.empty_like if k.shape[1] == q.shape[2] else torch.zeros_like
        grads = [new(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for head in range(q.shape[1]):
            saved = grad[:, head], q[:, head], k, v, delta[:, head], lse[:, head]
            of_head = grads[0][:, head], *grads[1:]
            for part in ctx.parts.first:
                part.write_gradients(saved, out[:, head], of_head, min(head, 1))
            for tile in ctx.parts.more:
                tile.write_gradients(saved, out[:, head], of_head, 1, 1)
        grad_sinks = None
        if sink_h is not None:
            shares = -((_sinks(sink_h, lse) - lse).exp() * delta).sum((2, 3))
            grad_sinks = shares.view(-1, len(sink_h)).sum(0).to(sink_h.dtype)
        return *(x.to(q.dtype) for x in grads), grad_sinks, None


def _sinks(sink_h: Tensor, lse: Tensor) -> Tensor:
    """Sink logits (H,) in the shape of `lse` (B * G, R, T, 1), with one position."""
    heads = lse.shape[1]
    return sink_h.to(lse.dtype).view(-1, heads).repeat(len(lse) * heads // len(sink_h), 1)[..., None, None]
