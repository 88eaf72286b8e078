"""What a layer may see: one description per layer, from which masks, caches, FLOPs and reach are derived.

W counts the current token: query i of a sliding layer sees key j iff `i - W < j <= i`.
transformers, xFormers and Mistral's runtime count the same way.

    >>> import torch
    >>> spec = LayerSpec("sliding", window=3)
    >>> positions = torch.arange(6)
    >>> visible(spec, positions[:, None], positions[None, :]).int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1]], dtype=torch.int32)

Positions count from the start of the document, so a packed document sees exactly what it would see alone.

The settings are checked with this file alone. It imports torch, which takes a second, only where tensors are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("sliding", "full", "chunked", "dilated")
MAX_PERIOD = 1 << 22  # query positions that `reach` tries for chunked layers: about a second for 32 layers
FULL_BLOCK = 256  # tokens by which the cache of a full layer grows

Position = TypeVar("Position", int, NDArray[np.int64])


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer.

    kind: `sliding` (the last `window` tokens), `full` (all earlier tokens), `chunked` (the earlier tokens of the same
        block of `window` tokens) or `dilated` (`window` tokens that are `dilation` apart).
    window: tokens, including the current one; None for `full`.
    global_tokens: this many first tokens of a document are seen by all its later tokens.
    sink: a learned logit per head that takes part in the softmax and adds nothing to the output.
    rope: whether queries and keys are rotated. rope_theta: None takes the model's.

    Raises UserError for fields that contradict each other.
    """

    kind: str = "sliding"
    window: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    sink: bool = False
    rope: bool = True
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"layer kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.kind == "full" and self.window is not None:
            raise UserError(f"a full layer has no window, but window is {self.window}; remove it")
        if self.kind != "full" and (self.window is None or self.window < 1):
            raise UserError(f"a {self.kind} layer needs window >= 1, but window is {self.window}")
        if self.dilation < 1 or (self.dilation > 1 and self.kind != "dilated"):
            raise UserError(f"dilation is {self.dilation} on a {self.kind} layer; only dilated layers take one, >= 1")
        if self.global_tokens < 0:
            raise UserError(f"global_tokens is {self.global_tokens}; it must be >= 0")

    @property
    def ring_slots(self) -> int | None:
        """Tokens that a cache must keep for the next query; None means all of them (`full`)."""
        return None if self.window is None else self.window * self.dilation


def cache_slots(spec: LayerSpec, length: int) -> int:
    """Tokens that a cache has room for after `length` tokens: a ring plus global tokens, or whole blocks if `full`.

    >>> cache_slots(LayerSpec("sliding", window=4, global_tokens=2), 1000), cache_slots(LayerSpec("full"), 1000)
    (6, 1024)
    """
    if spec.ring_slots is None:
        return -(-length // FULL_BLOCK) * FULL_BLOCK
    return spec.ring_slots + spec.global_tokens


def visible(spec: LayerSpec, q_pos: "Tensor", k_pos: "Tensor") -> "Tensor":
    """Whether the query at position `q_pos` sees the key at position `k_pos`, as bool of the broadcast shape."""
    seen = k_pos <= q_pos
    if spec.window is not None:
        seen = seen & _inside_window(spec, spec.window, q_pos, k_pos)
    if spec.global_tokens:
        seen = seen | ((k_pos < spec.global_tokens) & (k_pos <= q_pos))
    return seen


def _inside_window(spec: LayerSpec, window: int, q_pos: "Tensor", k_pos: "Tensor") -> "Tensor":
    if spec.kind == "chunked":
        return k_pos // window == q_pos // window
    age = q_pos - k_pos
    return (age < window * spec.dilation) & (age % spec.dilation == 0) if spec.dilation > 1 else age < window


def reachable(specs: Sequence[LayerSpec], length: int) -> "Tensor":
    """Which distances can influence the last of `length` tokens.

    Returns bool (length,): element d is true iff the token d positions back has a path to the last query through the
    layers' masks. Chunked layers and global tokens make this depend on `length`.

        >>> reachable([LayerSpec("sliding", 3)] * 2, 7).int().tolist()
        [1, 1, 1, 1, 1, 0, 0]
    """
    return cone(specs, length)[-1].flip(0)


def cone(specs: Sequence[LayerSpec], length: int) -> "Tensor":
    """Which positions reach the last of `length` tokens through its top 0, 1, …, k layers.

    Returns bool (k + 1, length): row 0 is the query alone, row k all positions that reach it from the input.

        >>> cone([LayerSpec("sliding", 3), LayerSpec("chunked", 4)], 7).int()
        tensor([[0, 0, 0, 0, 0, 0, 1],
                [0, 0, 0, 0, 1, 1, 1],
                [0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    import torch

    reached = torch.zeros(length, dtype=torch.bool)
    reached[-1] = True
    rows = [reached]
    for spec in reversed(specs):
        rows.append(one_layer_back(spec, rows[-1]))
    return torch.stack(rows)


def one_layer_back(spec: LayerSpec, reached: "Tensor", rows: int = 1024) -> "Tensor":
    """Positions (length,) that the `reached` positions see through one layer, and those positions themselves.

    The mask is built for `rows` queries at a time, over the keys that a cache would hold for them.
    """
    import torch

    positions, sources = torch.arange(len(reached)), reached.clone()
    looking = positions[reached]
    for start in range(0, len(looking), rows):
        queries = looking[start : start + rows]
        first = 0 if spec.ring_slots is None else max(0, int(queries[0]) - spec.ring_slots + 1)
        keys = torch.cat((positions[: min(first, spec.global_tokens)], positions[first : int(queries[-1]) + 1]))
        sources[keys] |= visible(spec, queries[:, None], keys).any(0)
    return sources


def reach(specs: Sequence[LayerSpec]) -> int | None:
    """The greatest distance, in tokens, at which a token can influence a query at any position; None if unbounded.

    k sliding layers reach `k * (W - 1)` tokens back. For Mistral-7B that is 32 less than the usual W * k = 131,072:

        >>> reach([LayerSpec("sliding", 4096)] * 32)
        131040
        >>> reach([LayerSpec("chunked", 4)] * 8)
        3
        >>> reach([LayerSpec("sliding", 4), LayerSpec("full")]) is None
        True

    With chunked layers it depends on where the query stands between their borders: every position of one period (the
    least common multiple of the chunk sizes) is tried. Raises UserError where the period exceeds `MAX_PERIOD`.
    """
    if any(spec.kind == "full" or spec.global_tokens for spec in specs):
        return None
    chunks = {spec.window or 1 for spec in specs if spec.kind == "chunked"}
    period = math.lcm(*chunks)
    if period > MAX_PERIOD:
        raise UserError(
            f"the borders of chunked windows {sorted(chunks)} coincide only every {period:,} tokens, too many to work "
            "out the reach; choose windows that divide each other"
        )
    positions = np.arange(period)
    return int((positions - farthest_source(specs, positions)).max())


def reach_of_other_tokens(specs: Sequence[LayerSpec]) -> int | None:
    """The reach of tokens that are not global; None with a full layer.

    A global token passes nothing on: it sees only tokens before it, which are global too.

        >>> reach_of_other_tokens([LayerSpec("sliding", 4, global_tokens=2)] * 3)
        9
    """
    return reach([replace(spec, global_tokens=0) for spec in specs])


def farthest_source(specs: Sequence[LayerSpec], position: Position) -> Position:
    """The leftmost token that can influence the query at `position` of an endless sequence (bounded stacks only).

    `position` is a number or an array.

    Works from the top layer down: of two positions the left one never sees farther right, so following the leftmost
    key of each layer leads to the leftmost source. A negative result lies before the start of the sequence.

        >>> farthest_source([LayerSpec("sliding", 3), LayerSpec("chunked", 4)], 6)
        2
    """
    for spec in reversed(specs):
        assert spec.window is not None
        hop = position % spec.window if spec.kind == "chunked" else (spec.window - 1) * spec.dilation
        position = position - hop
    return position


def window_times_layers(specs: Sequence[LayerSpec]) -> int | None:
    """The figure that is usually quoted: the sum of all windows, W * k for equal layers. None with a full layer.

    A dilated layer counts W * dilation (Longformer: "layers x dilation x window"). Global tokens do not count. The
    figure exceeds the reach: by k for sliding layers, by far for chunked ones, whose windows do not overlap.

        >>> window_times_layers([LayerSpec("sliding", 4096)] * 32)
        131072
        >>> window_times_layers([LayerSpec("chunked", 16)] * 32), reach([LayerSpec("chunked", 16)] * 32)
        (512, 15)
    """
    if any(spec.window is None for spec in specs):
        return None
    return sum(spec.ring_slots or 0 for spec in specs)


def keys_per_query(spec: LayerSpec, length: int) -> float:
    """Mean number of keys that a query sees in one document of `length` tokens.

    >>> keys_per_query(LayerSpec("sliding", 3), 4)
    2.25
    """
    if spec.global_tokens or spec.kind in ("chunked", "dilated"):
        return _count_visible(spec, length) / length
    w = min(spec.window or length, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


@cache
def _count_visible(spec: LayerSpec, length: int) -> int:
    import torch

    positions = torch.arange(length)
    return sum(int(visible(spec, q[:, None], positions).sum()) for q in positions.split(1024))
