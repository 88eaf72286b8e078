"""Where tokens stand: their positions in documents, and who may see whom.

Legend: B batch, T query positions, S key positions.
`positions` count from the start of the document; `documents` are ids, -1 for padding. Both are (B or 1, T).
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from model.windows import LayerSpec, visible


@dataclass(frozen=True)
class Places:
    """Positions and, if there is more than one document or padding, document ids.

    `made` is what a backend's `prepare` makes of them for one kind of layer, so that layers of a kind share it.
    """

    positions: Tensor
    documents: Tensor | None = None
    made: Any = None


def see(spec: LayerSpec, q: Places, k: Places) -> Tensor:
    """Bool (B or 1, T, S): visibility by position, and never across documents or from padding."""
    seen = visible(spec, q.positions[:, :, None], k.positions[:, None, :])
    if q.documents is not None:
        assert k.documents is not None
        same = q.documents[:, :, None] == k.documents[:, None, :]
        seen = seen & same & (k.documents >= 0)[:, None, :]
    return seen


def restarts(position_ids: Tensor) -> Tensor | None:
    """Ids of the documents that positions (B or 1, T) tell apart by not going on by one; None if they all go on."""
    jumps = position_ids.diff(dim=1) != 1
    return F.pad(jumps.cumsum(1), (1, 0)) if bool(jumps.any()) else None


def stretches(documents_bt: Tensor) -> dict[tuple[int, int], list[int]]:
    """Where documents lie: (first, end) to the rows that have one there. Padding belongs to none.

    >>> import torch
    >>> stretches(torch.tensor([[0, 0, 1, 1], [-1, -1, 5, 5]]))
    {(0, 2): [0], (2, 4): [0, 1]}
    """
    found: dict[tuple[int, int], list[int]] = {}
    for row, ids in enumerate(documents_bt.tolist()):
        starts = [i for i, x in enumerate(ids) if i == 0 or x != ids[i - 1]]
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if ids[first] >= 0:
                found.setdefault((first, end), []).append(row)
    return found


def split(places: Places, size: int) -> list[Places]:
    """Places of `size` tokens at a time."""
    positions = places.positions.split(size, 1)
    documents = [None] * len(positions) if places.documents is None else places.documents.split(size, 1)
    return [Places(*part) for part in zip(positions, documents)]
