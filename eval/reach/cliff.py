"""The cliff test: what has no path to the query must not change a bit of the output, however the model is fed.

One token at distance d is changed, or all tokens at once that boolean reachability says can't influence the query,
and the logits at the query are compared with `torch.equal`. A reachable token that changes no bit is not a fault:
thirty-two hops may underflow float32.

Global tokens are seen by every later token, so only what stands between them and the reach is tested. A full layer
sees every earlier token: there is nothing to test but other documents.

Legend: B batch, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.forward import last_logits
from eval.models import Examined
from model import hub, windows
from model.attention.backends import BACKENDS
from model.cache import RingCache
from model.errors import UserError
from model.windows import LayerSpec

LastLogits = Callable[[Tensor], Tensor]
DENSE_LIMIT = 4096  # tokens whose whole mask the reference may hold
MOST_LENGTHS = 4096  # tried until the last token is one from which the reach is attained


class Cliff(NamedTuple):
    """Rows {path, distance, changed, expected, equal} or {path, unavailable}, and why there are none or few."""

    rows: list[dict[str, Any]]
    note: str | None


# ---------------------------------------------------------------------------------------------------- the changes


@dataclass(frozen=True)
class Probe:
    """Sequences (B, T) of token ids before and after a change, and what theory says of the last token's logits."""

    base: Tensor
    after: Tensor
    distances: list[int]
    changed: list[str]
    expected: list[bool]


def make_probe(reachable: Tensor, distances: Sequence[int], vocabulary: int, seed: int = 0) -> Probe:
    """Row r changes the token at `distances[r]`; a last row changes all tokens that can't reach the query.

    reachable: bool (T,) by distance, as `windows.reachable` gives it.
    """
    length, hidden = len(reachable), (~reachable).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    rows = len(distances) + bool(len(hidden))
    base = torch.randint(0, vocabulary, (1, length), generator=generator).repeat(rows, 1)
    moved = torch.zeros_like(base, dtype=torch.bool)
    for row, distance in enumerate(distances):
        moved[row, length - 1 - distance] = True
    expected = [not bool(reachable[d]) for d in distances]
    listed, changed = list(distances), ["one token"] * len(distances)
    if len(hidden):
        moved[-1, length - 1 - hidden] = True
        listed, changed = [*listed, int(hidden[0])], [*changed, "every token that can't reach the query"]
        expected = [*expected, True]
    return Probe(base, torch.where(moved, (base + 1) % vocabulary, base), listed, changed, expected)


def cliff_distances(reachable: Tensor, near: Iterable[int]) -> list[int]:
    """Those of `near`, and both sides of the nearest and farthest borders between what can and can't be seen.

    >>> cliff_distances(torch.tensor([True] * 10 + [False] * 10), near=[1, 4, 99])
    [1, 4, 8, 9, 10, 11]
    """
    borders = (reachable[1:] != reachable[:-1]).nonzero().flatten().tolist()
    beside = {border + step for border in borders[:2] + borders[-2:] for step in (-1, 0, 1, 2)}
    return sorted(d for d in beside.union(near) if 1 <= d < len(reachable))


def cliff_length(specs: Sequence[LayerSpec]) -> int | None:
    """Tokens that show the cliff: past reach and headline figure by a window; None with a full layer.

    With chunked layers the last token is, if one is found, at a place from which the reach is attained.
    """
    far, product = windows.reach_of_other_tokens(specs), windows.window_times_layers(specs)
    if far is None or product is None:
        return None
    others = [replace(spec, global_tokens=0) for spec in specs]
    spans, first = _spans(specs), max(spec.global_tokens for spec in specs)
    least = max(product, 2 * max(spans)) + first + min(spans) + 4
    period = math.lcm(*(spec.window or 1 for spec in specs if spec.kind == "chunked"))
    lengths = range(least, least + min(period, MOST_LENGTHS))
    return max(lengths, key=lambda t: t - windows.farthest_source(others, t - 1))


def _spans(specs: Sequence[LayerSpec]) -> list[int]:
    """Tokens that the windows span, one a layer that has one."""
    return [spec.ring_slots for spec in specs if spec.ring_slots is not None]


# -------------------------------------------------------------------------------------------- ways to feed a model


@torch.inference_mode()
def feed(
    examined: Examined,
    input_ids: Tensor,
    size: int | None = None,
    documents: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) at the last position: all at once, or `size` tokens at a time through the ring."""
    device, length = examined.device, input_ids.shape[1]
    ring = None if size is None else RingCache(examined.model.config)
    for start in range(0, length, size or length):
        end = min(length, start + (size or length))
        output = examined.model(
            input_ids=input_ids[:, start:end].to(device),
            documents=None if documents is None else documents[:, start:end].to(device),
            attention_mask=None if attention_mask is None else attention_mask[:, :end].to(device),
            past_key_values=ring,
            use_cache=ring is not None,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float().cpu()


def left_padded(examined: Examined, input_ids: Tensor, pad: int, size: int | None = None) -> Tensor:
    """Logits (B, V) of rows padded on the left by `pad` tokens: one more row of the batch is that much longer."""
    longer = torch.cat((input_ids[:1], input_ids[:1, :pad]), 1)
    rows = torch.cat((torch.nn.functional.pad(input_ids, (pad, 0)), longer))
    mask = torch.ones_like(rows)
    mask[:-1, :pad] = 0
    return feed(examined, rows, size, attention_mask=mask)[:-1]


def behind_document(examined: Examined, input_ids: Tensor, other: Tensor, size: int | None = None) -> Tensor:
    """Logits (B, V) of rows that are packed behind another document `other` (B, S)."""
    documents = torch.cat((torch.zeros_like(other), torch.ones_like(input_ids)), 1)
    return feed(examined, torch.cat((other, input_ids), 1), size, documents=documents)


def chunk_sizes(specs: Sequence[LayerSpec]) -> list[int]:
    """Tokens to prefill at a time: below, at and above the smallest and the largest window, and past two windows.

    >>> chunk_sizes([LayerSpec("sliding", 8)] * 2)
    [7, 8, 9, 19]
    """
    spans = _spans(specs) or [16]
    edges = {min(spans), max(spans)}
    return sorted({max(2, size) for w in edges for size in (w - 1, w, w + 1, 2 * w + 3)})


def ways_to_feed(examined: Examined) -> dict[str, LastLogits]:
    """Each way to get a row's last logits out of one model of ours, beside one full forward pass of the bare rows."""
    span = min(_spans(examined.specs) or [16])
    prefills: dict[str, LastLogits] = {
        f"prefill by {size}": partial(feed, examined, size=size) for size in chunk_sizes(examined.specs)
    }

    def packed(ids: Tensor, size: int | None = None) -> Tensor:
        return behind_document(examined, ids, torch.zeros_like(ids[:, : span + 3]), size)

    return {
        **prefills,
        "token by token": partial(feed, examined, size=1),
        "left-padded batch": partial(left_padded, examined, pad=span // 2 + 1),
        f"left-padded batch, prefill by {span + 1}": partial(left_padded, examined, pad=span // 2 + 1, size=span + 1),
        "behind another document": packed,
        f"behind another document, prefill by {span + 1}": partial(packed, size=span + 1),
    }


def through_backend(examined: Examined, backend: str) -> LastLogits:
    """One full forward pass of the same checkpoint, loaded when first asked.

    The function raises UserError, with the reason, where the backend can't be had.
    """

    @cache
    def loaded() -> Examined:
        model = hub.load(str(examined.folder), backend=backend).eval().to(examined.device)
        return replace(examined, model=model)

    return lambda ids: last_logits(loaded(), ids)


def cliff_paths(examined: Examined) -> Iterator[tuple[str, LastLogits]]:
    """Every path from tokens to logits: the backends that exist, and the ways to feed the model at hand."""
    if not examined.ours:
        yield "full forward", partial(last_logits, examined)
        return
    for backend in BACKENDS:
        yield f"forward, {backend}", through_backend(examined, backend)
    yield from ways_to_feed(examined).items()


# ---------------------------------------------------------------------------------------------------- the test


def cliff(examined: Examined, seed: int = 0, max_tokens: int = 8192, distances: Sequence[int] | None = None) -> Cliff:
    """The test on every path; at `distances`, or at those that tell the most.

    `expected` of a row is what theory says of the equality of the logits. Rows of other documents follow.
    """
    limit = min(max_tokens, examined.max_tokens or max_tokens)
    length = cliff_length(examined.specs)
    between = _between_documents(examined, seed, limit) if examined.ours else []
    if length is None:
        return Cliff(between, "a full layer sees every earlier token: no distance is beyond the reach")
    if length > limit:
        return Cliff(between, f"beyond the reach means {length:,} tokens here, more than the {limit:,} to be run")
    reachable = windows.reachable(examined.specs, length)
    probe = make_probe(reachable, distances or cliff_distances(reachable, _near(examined)), _ids(examined), seed)
    rows: list[dict[str, Any]] = []
    for path, logits in cliff_paths(examined):
        rows.extend(_rows(path, logits, probe))
    return Cliff(rows + between, None)


def _near(examined: Examined) -> list[int]:
    """Distances that people ask for: one, around W, the headline figure and a window more."""
    window, product = examined.window or 1, windows.window_times_layers(examined.specs) or 0
    return [1, window - 1, window, product, product + window]


def _ids(examined: Examined) -> int:
    return int(examined.tokenizer.vocab_size)


def _rows(path: str, logits: LastLogits, probe: Probe) -> list[dict[str, Any]]:
    length = probe.base.shape[1]
    if path.endswith(" reference") and length > DENSE_LIMIT:
        return [{"path": path, "unavailable": f"the dense mask of {length:,} tokens would not fit"}]
    try:
        before, after = logits(probe.base), logits(probe.after)
    except UserError as error:
        return [{"path": path, "unavailable": str(error)}]
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    columns = zip(probe.distances, probe.changed, probe.expected, same, strict=True)
    return [{"path": path, "distance": d, "changed": c, "expected": e, "equal": s} for d, c, e, s in columns]


def _between_documents(examined: Examined, seed: int, limit: int) -> list[dict[str, Any]]:
    """Tokens of another document never matter, not even the one just before the query's document."""
    span = min(min(_spans(examined.specs) or [16]), limit // 4)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, _ids(examined), (1, 4 * span), generator=generator)
    rows: list[dict[str, Any]] = []
    for size in (None, span + 1):
        path = "packed documents" + (f", prefill by {size}" if size else "")
        for own in sorted({1, 2, max(2, span // 2)}):
            other = ids[:, :-own]
            probe = Probe(other, (other + 1) % _ids(examined), [own], ["the whole document before"], [True])
            rows.extend(_rows(path, partial(_last_behind, examined, ids[:, -own:], size=size), probe))
    return rows


def _last_behind(examined: Examined, input_ids: Tensor, other: Tensor, size: int | None) -> Tensor:
    return behind_document(examined, input_ids, other, size)


def cliff_holds(rows: list[dict[str, Any]]) -> bool:
    """True when no token without a path to the query, and none of another document, changed a bit on any path."""
    return all(row["equal"] for row in rows if row.get("expected"))
