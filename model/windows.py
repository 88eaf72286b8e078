"""What a layer may see: one description per layer, from which masks, caches, FLOPs and reach are derived.

W counts the current token: query i of a sliding layer sees key j iff `i - W < j <= i`.
(transformers, xFormers and Mistral's runtime count the same way.)

    >>> spec = LayerSpec("sliding", window=3)
    >>> positions = torch.arange(6)
    >>> visible(spec, positions[:, None], positions[None, :]).int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1]], dtype=torch.int32)

Positions are those inside a document, so that a document packed behind another sees what it would see alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.errors import UserError

KINDS = ("sliding", "full", "chunked", "dilated")
MOST_PLACES = 1 << 21  # followed through chunked layers: about two seconds
FULL_BLOCK = 256  # tokens by which the cache of a full layer grows


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer.

    kind: `sliding` (the last `window` tokens), `full` (all), `chunked` (the tokens of the same block of `window`),
        `dilated` (`window` tokens, `dilation` apart).
    window: tokens, the current one included; None for `full`.
    global_tokens: the first tokens of a document that all its later tokens see.
    sink: a learned logit per head that takes attention mass and gives nothing.
    rope: rotary positions on or off; rope_theta: None for the model's.

    Raises UserError for a description that means nothing.
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
        """Tokens a cache must keep to serve the next query; None when all of them (`full`)."""
        return None if self.window is None else self.window * self.dilation


def cache_slots(spec: LayerSpec, length: int) -> int:
    """Tokens that a cache has room for after `length` of them: a ring and its global tokens, or whole blocks.

    >>> cache_slots(LayerSpec("sliding", window=4, global_tokens=2), 1000), cache_slots(LayerSpec("full"), 1000)
    (6, 1024)
    """
    if spec.ring_slots is None:
        return -(-length // FULL_BLOCK) * FULL_BLOCK
    return spec.ring_slots + spec.global_tokens


def visible(spec: LayerSpec, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Whether the query at `q_pos` sees the key at `k_pos`.

    Shapes: any two that broadcast; positions are counted from the start of the document. Returns bool.
    """
    seen = k_pos <= q_pos
    if spec.window is not None:
        seen = seen & _inside_window(spec, spec.window, q_pos, k_pos)
    if spec.global_tokens:
        seen = seen | ((k_pos < spec.global_tokens) & (k_pos <= q_pos))
    return seen


def _inside_window(spec: LayerSpec, window: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    if spec.kind == "chunked":
        return k_pos // window == q_pos // window
    age = q_pos - k_pos
    return (age < window * spec.dilation) & (age % spec.dilation == 0) if spec.dilation > 1 else age < window


def reachable(specs: Sequence[LayerSpec], length: int) -> Tensor:
    """Which distances can influence the last of `length` tokens, by boolean reachability through the stack.

    Returns bool (length,): element d is true iff the token d back has a path to the last query.
    Distances that only exist for some positions (chunked layers, global tokens) are those of this query.

        >>> reachable([LayerSpec("sliding", 3)] * 2, 7).int().tolist()
        [1, 1, 1, 1, 1, 0, 0]
    """
    return cone(specs, length)[-1].flip(0)


def cone(specs: Sequence[LayerSpec], length: int) -> Tensor:
    """Which positions the last of `length` tokens sees through its top 0, 1, …, k layers, by boolean reachability.

    Returns bool (k + 1, length), by position: row 0 is the query alone, row k what reaches it from the input.

        >>> cone([LayerSpec("sliding", 3), LayerSpec("chunked", 4)], 7).int()
        tensor([[0, 0, 0, 0, 0, 0, 1],
                [0, 0, 0, 0, 1, 1, 1],
                [0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    reached = torch.zeros(length, dtype=torch.bool)
    reached[-1] = True
    rows = [reached]
    for spec in reversed(specs):
        rows.append(one_layer_back(spec, rows[-1]))
    return torch.stack(rows)


def one_layer_back(spec: LayerSpec, reached: Tensor, rows: int = 1024) -> Tensor:
    """Positions (length,) that the `reached` ones see through one layer, themselves included.

    The mask is built for `rows` queries at a time, and only over keys that their ring and the global tokens hold.
    """
    positions, sources = torch.arange(len(reached)), reached.clone()
    looking = positions[reached]
    for start in range(0, len(looking), rows):
        queries = looking[start : start + rows]
        first = 0 if spec.ring_slots is None else max(0, int(queries[0]) - spec.ring_slots + 1)
        keys = torch.cat((positions[: min(first, spec.global_tokens)], positions[first : int(queries[-1]) + 1]))
        sources[keys] |= visible(spec, queries[:, None], keys).any(0)
    return sources


def reach(specs: Sequence[LayerSpec]) -> int | None:
    """The farthest token, in tokens back, that can influence a query anywhere in a sequence; None if unbounded.

    A stack of k sliding layers: `k * (W - 1)`. Mistral-7B, of which the headline is W * k = 131,072:

        >>> reach([LayerSpec("sliding", 4096)] * 32)
        131040
        >>> reach([LayerSpec("chunked", 4)] * 8)
        3
        >>> reach([LayerSpec("sliding", 4), LayerSpec("full")]) is None
        True

    Raises UserError for chunked windows so unlike that it can't be worked out in `MOST_PLACES` steps.
    """
    if any(spec.kind == "full" or spec.global_tokens for spec in specs):
        return None
    if any(spec.kind == "chunked" for spec in specs):
        return _reach_with_chunks(specs)
    return sum(_hop(spec) for spec in specs)


def reach_of_other_tokens(specs: Sequence[LayerSpec]) -> int | None:
    """The reach for all tokens but the global ones, which every later token sees; None with a full layer.

    Nothing goes through a global token: it sees only what stands before it, which is global too.

        >>> reach_of_other_tokens([LayerSpec("sliding", 4, global_tokens=2)] * 3)
        9
    """
    return reach([replace(spec, global_tokens=0) for spec in specs])


def _hop(spec: LayerSpec) -> int:
    """Farthest distance that one sliding or dilated layer spans."""
    assert spec.window is not None
    return (spec.window - 1) * spec.dilation


def farthest_source(specs: Sequence[LayerSpec], position: int) -> int:
    """The leftmost token that can influence the query at `position` of an endless sequence (bounded stacks only).

    Found greedily, layer by layer from the top: a query that stands further left never sees further right, so the
    leftmost position of each layer leads to the leftmost source. What is below 0 lies before the sequence.

        >>> farthest_source([LayerSpec("sliding", 3), LayerSpec("chunked", 4)], 6)
        2
    """
    for spec in reversed(specs):
        assert spec.window is not None
        position -= position % spec.window if spec.kind == "chunked" else _hop(spec)
    return position


def _reach_with_chunks(specs: Sequence[LayerSpec]) -> int:
    """Reach of a stack with chunked layers: the largest over all places of the query between the block borders.

    Instead of trying every place in a period (the lcm of the windows), places are told apart only as far as the
    layers still to come can: `back` maps the position modulo `modulus` to the most tokens back from the query. Of
    places that a window told apart and no later one can, the farthest back is kept.

    Windows that divide each other leave one place, two prime ones that alternate as many as the larger window.
    """
    layers = list(reversed(specs))
    chunks = [spec.window if spec.kind == "chunked" and spec.window else 1 for spec in layers]
    back, modulus, steps = {0: 0}, 1, 0
    for i, spec in enumerate(layers):
        period = math.lcm(modulus, chunks[i])
        steps += len(back) * (period // modulus)
        if steps > MOST_PLACES:
            raise UserError(
                f"the reach of chunked windows {sorted({*chunks} - {1})} depends on more places between their borders "
                "than can be tried; choose windows that divide each other"
            )
        below = math.gcd(math.lcm(*chunks[: i + 1]), math.lcm(*chunks[i + 1 :]))
        back, modulus = _chunk_back(spec, back, modulus, below), below
    return max(back.values())


def _chunk_back(spec: LayerSpec, back: dict[int, int], modulus: int, below: int) -> dict[int, int]:
    """`back` one layer further down: places modulo `below` instead of `modulus`.

    A chunked layer asks for the position modulo its window too: every one that agrees with the place is followed.
    """
    period = math.lcm(modulus, spec.window or 1) if spec.kind == "chunked" else modulus
    moved: dict[int, int] = {}
    for place, far in back.items():
        for lifted in range(place, period, modulus):
            source = farthest_source([spec], lifted)
            moved[source % below] = max(moved.get(source % below, 0), far + lifted - source)
    return moved


def window_times_layers(specs: Sequence[LayerSpec]) -> int | None:
    """The headline figure: the sum of all windows (W * k for equal layers); None with a full layer.

    A dilated layer counts W * dilation, as in Longformer's "layers x dilation x window". The figure adds windows up
    whether they overlap or not, so it always exceeds the reach: by k for sliding layers, by far for chunked ones,
    which is the point of that contrast. Global tokens don't count.

        >>> window_times_layers([LayerSpec("sliding", 4096)] * 32)
        131072
        >>> window_times_layers([LayerSpec("chunked", 16)] * 32), reach([LayerSpec("chunked", 16)] * 32)
        (512, 15)
    """
    if any(spec.window is None for spec in specs):
        return None
    return sum(spec.ring_slots or 0 for spec in specs)


def keys_per_query(spec: LayerSpec, length: int) -> float:
    """Mean number of keys that a query sees in one document of `length` tokens: what attention costs.

    >>> keys_per_query(LayerSpec("sliding", 3), 4)
    2.25
    """
    if spec.kind == "sliding" and spec.window is not None and not spec.global_tokens:
        w = min(spec.window, length)
        return (w * (w + 1) / 2 + (length - w) * w) / length
    if spec.kind == "full":
        return (length + 1) / 2
    positions = torch.arange(length)
    seen = sum(int(visible(spec, q[:, None], positions).sum()) for q in positions.split(1024))
    return seen / length
