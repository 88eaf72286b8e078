"""Packed rows: several documents in one row of a batch, and padding. Documents never see each other.

Legend: B batch, T query positions, S key positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.windows import LayerSpec, visible

Args = ParamSpec("Args")
Result = TypeVar("Result")


def kept_per_shape(make: Callable[Args, Result]) -> Callable[Args, Result]:
    """Keeps the last eight results. A CUDA graph under capture gets one of its own, because it outlives what is kept.

    Made outside of inference mode: what an evaluation prepares, training may use.
    """

    @torch.inference_mode(False)
    def fresh(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        return make(*args, **kwargs)

    kept = lru_cache(maxsize=8)(fresh)

    @wraps(make)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return fresh(*args, **kwargs) if captured else kept(*args, **kwargs)  # type: ignore[arg-type]

    call.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return call


NO_DOCUMENT = -2  # document id of a cache slot that is empty; padding has -1


@dataclass(frozen=True)
class Packing:
    """Each token's position in its document, and its document's id.

    positions: (B or 1, T), counted from the start of the document.
    documents: (B or 1, T) ids that never decrease along a row, but for padding, which has -1. None where every row is
        one document without padding.
    whole: every row is one document that starts at position 0, so that what follows depends on T alone.
    padded: there may be padding.
    spans: at most so many documents and stretches of padding are in all rows together. None if that is not known, or
        if padding may lie inside a document. Where it is known, nobody has to wait for a GPU to count them.
    part: where these tokens lie in their rows, if other processes have the rest. Positions count in the whole row.
    """

    positions: Tensor
    documents: Tensor | None = None
    whole: bool = False
    padded: bool = True
    spans: int | None = None
    part: "Part | None" = None

    @staticmethod
    @kept_per_shape
    def of_whole_rows(tokens: int, device: torch.device) -> "Packing":
        """Rows of T tokens that are one document each."""
        return Packing(torch.arange(tokens, device=device)[None], whole=True)

    @staticmethod
    def of_position_ids(position_ids: Tensor) -> "Packing":
        """Of position ids (B or 1, T): a new document starts where a position is not the previous one plus 1."""
        starts = position_ids.diff(dim=1) != 1
        return Packing(position_ids, F.pad(starts.cumsum(1), (1, 0)) if bool(starts.any()) else None)

    @staticmethod
    def of_documents(documents_bt: Tensor) -> "Packing":
        """Of document ids (B, T), -1 for padding, on the CPU. All facts are known.

        >>> Packing.of_documents(torch.tensor([[7, 7, 9, 9, -1]])).positions.tolist()
        [[0, 1, 0, 1, 2]]
        >>> Packing.of_documents(torch.tensor([[7, 7, 9, 9, -1]])).spans
        3
        """
        packing, _ = count_positions(documents_bt, RowEnds.of_empty_rows(documents_bt))
        assert packing.documents is not None
        real, starts = packing.documents >= 0, F.pad(packing.documents.diff(dim=1) != 0, (1, 0), value=True)
        padded, spans = not bool(real.all()), int(starts.sum())
        if not padded and spans == len(starts):
            return Packing.of_whole_rows(starts.shape[1], starts.device)
        gaps = bool((starts & real & (packing.positions > 0)).any())  # a document that goes on after padding
        return replace(packing, padded=padded, spans=None if gaps else spans)

    def to(self, device: torch.device) -> "Packing":
        """On a device. The host does not wait for the copy if the memory is pinned."""
        if self.whole:
            return Packing.of_whole_rows(self.positions.shape[1], device)
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        return replace(self, positions=self.positions.to(device, non_blocking=True), documents=documents)

    def pin_memory(self) -> "Packing":
        """In pinned memory."""
        if self.whole:
            return self
        documents = None if self.documents is None else self.documents.pin_memory()
        return replace(self, positions=self.positions.pin_memory(), documents=documents)

    def split(self, size: int) -> "list[Packing]":
        """The same tokens, `size` at a time."""
        parts = self.positions.split(size, 1)
        documents = [None] * len(parts) if self.documents is None else self.documents.split(size, 1)
        return [Packing(*part) for part in zip(parts, documents)]

    def is_one_document(self) -> bool:
        """Whether all tokens of all rows belong to one document. Reads the tensors."""
        ids = self.documents
        return ids is None or (bool((ids == ids[:1, :1]).all()) and bool(ids[0, 0] >= 0))


@dataclass(frozen=True)
class Part:
    """Part `index` of rows that are cut at `bounds`, among the processes of `group`. row: the whole rows, on the CPU.

    Part i is the tokens from bounds[i] up to bounds[i + 1].
    """

    bounds: tuple[int, ...]
    index: int
    row: Packing
    group: Any

    @property
    def first(self) -> int:
        return self.bounds[self.index]

    @property
    def end(self) -> int:
        return self.bounds[self.index + 1]


def bounds_of_parts(tokens: int, parts: int) -> tuple[int, ...]:
    """Where rows of `tokens` tokens are cut into parts that differ by one token at most.

    >>> bounds_of_parts(10, 4)
    (0, 2, 5, 7, 10)
    """
    return tuple(tokens * i // parts for i in range(parts + 1))


def cut(row: Packing, parts: int, index: int, group: Any) -> Packing:
    """The packing of part `index` of `parts`. Positions and documents are those of the whole row."""
    part = Part(bounds_of_parts(row.positions.shape[1], parts), index, row, group)
    own = slice(part.first, part.end)
    return Packing(row.positions[:, own], None if row.documents is None else row.documents[:, own], part=part)


def may_see(spec: LayerSpec, queries: Packing, keys: Packing) -> Tensor:
    """Which keys each query of a layer sees, bool (B or 1, T, S): the layer's mask, within one document, no padding."""
    seen = visible(spec, queries.positions[:, :, None], keys.positions[:, None, :])
    if queries.documents is not None:
        assert keys.documents is not None
        same = queries.documents[:, :, None] == keys.documents[:, None, :]
        seen = seen & same & (keys.documents >= 0)[:, None, :]
    return seen


def document_spans(documents_bt: Tensor) -> dict[tuple[int, int], list[int]]:
    """The (first, end) positions of each document, with the rows that hold a document there. Padding is left out.

    >>> document_spans(torch.tensor([[0, 0, 1, 1], [-1, -1, 5, 5]]))
    {(0, 2): [0], (2, 4): [0, 1]}
    """
    spans: dict[tuple[int, int], list[int]] = {}
    for row, ids in enumerate(documents_bt.tolist()):
        starts = [i for i, x in enumerate(ids) if i == 0 or x != ids[i - 1]]
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if ids[first] >= 0:
                spans.setdefault((first, end), []).append(row)
    return spans


class RowEnds(NamedTuple):
    """The state of each row after its last token, all (B,): next position, last document id, number of documents."""

    positions: Tensor
    documents: Tensor
    numbers: Tensor

    @classmethod
    def of_empty_rows(cls, like: Tensor) -> "RowEnds":
        """Rows that hold no token yet; `like` is (B, T)."""
        zeros = torch.zeros_like(like[:, 0])
        return cls(zeros, torch.full_like(zeros, NO_DOCUMENT), zeros)


def count_positions(documents: Tensor, ends: RowEnds) -> tuple[Packing, RowEnds]:
    """Positions and unique document numbers of tokens with document ids (B, T) that follow `ends`; and the new ends.

    Padding inside a document does not end it. An id that returns after another document starts a new document:

        >>> ids = torch.tensor([[-1, 0, 0, -1, 0, 1, 0]])
        >>> packing, _ = count_positions(ids, RowEnds.of_empty_rows(ids))
        >>> packing.positions.tolist(), packing.documents.tolist()
        ([[0, 0, 1, 2, 3, 0, 0]], [[-1, 1, 1, -1, 1, 2, 3]])
    """
    if documents.shape[1] == 1:
        return _count_one(documents, ends)
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    real = documents >= 0
    last_real = torch.where(real, index, -1).cummax(1).values
    last_id = torch.where(last_real >= 0, documents.gather(1, last_real.clamp_min(0)), ends.documents[:, None])
    starts = real & (documents != torch.cat((ends.documents[:, None], last_id[:, :-1]), 1))
    begin = torch.where(starts, index, -1).cummax(1).values
    positions = torch.where(begin >= 0, index - begin, ends.positions[:, None] + index)
    numbers = ends.numbers[:, None] + starts.cumsum(1)
    packing = Packing(positions, torch.where(real, numbers, -1))
    return packing, RowEnds(positions[:, -1] + 1, last_id[:, -1], numbers[:, -1])


def _count_one(documents: Tensor, ends: RowEnds) -> tuple[Packing, RowEnds]:
    """The same for one token a row: a third of the calls, which count when a small model decodes."""
    ids = documents[:, 0]
    real = ids >= 0
    starts = real & (ids != ends.documents)
    positions, numbers = ends.positions.masked_fill(starts, 0), ends.numbers + starts
    packing = Packing(positions[:, None], torch.where(real, numbers, -1)[:, None])
    return packing, RowEnds(positions + 1, torch.where(real, ids, ends.documents), numbers)
