"""Layers served through another layer's form: dilated ones, packed documents one by one, chunks behind a cache.

Legend: B batch, T query positions, S key positions, H heads, G kv heads, D head size, r dilation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.reference import Attend
from model.packing import Packing


@dataclass(frozen=True)
class Dilated:
    """A dilated layer: every r-th token forms a sequence of its own under a sliding window, r times less work.

    `sliding` is prepared for the folded rows, see `fold_packing`.
    """

    dilation: int
    sliding: Attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        b, t = q.shape[0], q.shape[2]
        q, k, v = (_fold(x, 2, self.dilation) for x in (q, k, v))
        out = self.sliding(q, k, v, sinks)
        return out.unflatten(0, (b, self.dilation)).movedim(1, 3).flatten(2, 3)[:, :, :t]


def fold_packing(packing: Packing, dilation: int, batch_size: int) -> Packing:
    """The packing (B * r, T / r) of the sequences that a dilated layer is folded into."""
    if packing.documents is None:
        return Packing.of_whole_rows(-(-packing.positions.shape[1] // dilation), packing.positions.device)
    positions, documents = (x.expand(batch_size, -1) for x in (packing.positions, packing.documents))
    padded = packing.padded or positions.shape[1] % dilation > 0
    spans = packing.spans and (packing.spans + batch_size) * dilation  # each row may end with padding
    return Packing(_fold(positions, 1, dilation) // dilation, _fold(documents, 1, dilation, -1), False, padded, spans)


def _fold(x: Tensor, dim: int, dilation: int, padding: int = 0) -> Tensor:
    """(B, …, T, …) to (B * r, …, T / r, …), T at `dim`: token i goes to sequence i mod r."""
    pad = -x.shape[dim] % dilation
    x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, pad), value=padding)
    return x.unflatten(dim, (-1, dilation)).movedim(dim + 1, 1).flatten(0, 1)


@dataclass(frozen=True)
class ByDocument:
    """Packed documents computed one at a time. documents: first and end position, rows, and the form of each."""

    documents: tuple[tuple[int, int, list[int], Attend], ...]

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(q)
        for first, end, rows, attend in self.documents:
            of_document = slice(first, end)
            out[rows, :, of_document] = attend(
                q[rows, :, of_document], k[rows, :, of_document], v[rows, :, of_document], sinks
            )
        return out


@dataclass(frozen=True)
class PaddedQueries:
    """A chunk behind a cache as the end of a whole row: its queries are padded in front to the length of the keys."""

    whole: Attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        before = k.shape[2] - q.shape[2]
        return self.whole(F.pad(q, (0, 0, before, 0)), k, v, sinks)[:, :, before:]
