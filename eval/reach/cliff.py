"""The cliff test: a token that has no path to the query must not change one bit of the query's logits.

The test changes one token at distance d, or at once all tokens that have no path to the query, and compares the logits
with `torch.equal`. It does so on every path through the code: each attention backend, prefill in chunks, token by token
from the ring, left-padded batches and packed documents. A token that has a path but changes no bit is no fault: after
many hops its influence may underflow float32.

With global tokens, only the tokens between them and the reach can be tested, since every later token sees global ones.
With a full layer no distance is beyond the reach, so that only other documents can be tested.

Legend: B batch, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.forward import last_logits, shared_logits
from eval.models import Examined
from model import windows
from model.attention import BACKENDS
from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.windows import LayerSpec

LastLogits = Callable[[Tensor], Tensor]  # token ids (B, T) -> logits (B, V) at the last position
DENSE_LIMIT = 4096  # tokens: the reference backend holds the whole mask, which does not fit for more


class Probe(NamedTuple):
    """Token ids (B, T) before and after a change, and for each sequence {distance, changed, expected}.

    `expected` is whether theory says that the logits at the last token stay equal.
    """

    before: Tensor
    after: Tensor
    changes: list[dict[str, Any]]


def make_probe(reachable: Tensor, distances: Sequence[int], vocabulary: int, seed: int = 0) -> Probe:
    """One sequence for each distance, in which that token is changed, and one with all unreachable tokens changed.

    reachable: bool (T,) by distance, as `windows.reachable` returns it.
    """
    changes = [("one token", [d]) for d in distances]
    if unreachable := (~reachable).nonzero().flatten().tolist():
        changes.append(("every token that can't reach the query", unreachable))
    generator = torch.Generator().manual_seed(seed)
    before = torch.randint(0, vocabulary, (1, len(reachable)), generator=generator).repeat(len(changes), 1)
    after = before.clone()
    for row, (_, changed) in enumerate(changes):
        after[row, [len(reachable) - 1 - d for d in changed]] += 1
    listed = [{"distance": ds[0], "changed": what, "expected": not bool(reachable[ds[0]])} for what, ds in changes]
    return Probe(before, after % vocabulary, listed)


def cliff_distances(reachable: Tensor, near: Iterable[int]) -> list[int]:
    """Distances on both sides of the two nearest and two farthest borders of what can be seen, and those of `near`.

    >>> cliff_distances(torch.tensor([True] * 10 + [False] * 10), near=[1, 4, 99])
    [1, 4, 8, 9, 10, 11]
    """
    borders = (reachable[1:] != reachable[:-1]).nonzero().flatten().tolist()
    beside = {border + step for border in borders[:2] + borders[-2:] for step in (-1, 0, 1, 2)}
    return sorted(d for d in beside.union(near) if 1 <= d < len(reachable))


def cliff_length(specs: Sequence[LayerSpec]) -> int | None:
    """Tokens of a sequence that shows the cliff: a window more than R and W·k; None with a full layer.

    With chunked layers, how far the last token sees depends on its position, so the best of several lengths is chosen.
    """
    if any(spec.window is None for spec in specs):
        return None
    spans = _spans(specs)
    least = max(sum(spans), 2 * max(spans)) + max(spec.global_tokens for spec in specs) + min(spans) + 4
    period = math.lcm(*(spec.window or 1 for spec in specs if spec.kind == "chunked"))
    lengths = np.arange(least, least + min(period, 4096))
    return int(lengths[(lengths - windows.farthest_source(specs, lengths - 1)).argmax()])


def _spans(specs: Sequence[LayerSpec]) -> list[int]:
    """Tokens from the first to the last that a layer sees, of the layers that are not full; [16] if all are."""
    return [spec.ring_slots for spec in specs if spec.ring_slots] or [16]


@torch.inference_mode()
def feed(
    examined: Examined,
    input_ids: Tensor,
    size: int | None = None,
    documents: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) at the last position: of one forward pass, or of `size` tokens at a time through the ring cache."""
    length = input_ids.shape[1]
    ring = None if size is None else RingCache(examined.model.config)
    for start in range(0, length, size or length):
        end = start + (size or length)
        output = examined.model(
            input_ids=input_ids[:, start:end].to(examined.device),
            documents=None if documents is None else documents[:, start:end].to(examined.device),
            attention_mask=None if attention_mask is None else attention_mask[:, :end].to(examined.device),
            past_key_values=ring,
            use_cache=ring is not None,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float().cpu()


def left_padded(examined: Examined, input_ids: Tensor, pad: int, size: int | None = None) -> Tensor:
    """Logits (B, V) of sequences with `pad` tokens of padding on the left, batched with one longer sequence."""
    longer = torch.cat((input_ids[:1], input_ids[:1, :pad]), 1)
    batch = torch.cat((torch.nn.functional.pad(input_ids, (pad, 0)), longer))
    mask = torch.ones_like(batch)
    mask[:-1, :pad] = 0
    return feed(examined, batch, size, attention_mask=mask)[:-1]


def behind_document(examined: Examined, input_ids: Tensor, other: Tensor, size: int | None = None) -> Tensor:
    """Logits (B, V) of sequences that are packed behind another document `other`, (B, S) or (1, S) for all."""
    other = other.expand(len(input_ids), -1)
    documents = torch.cat((torch.zeros_like(other), torch.ones_like(input_ids)), 1)
    return feed(examined, torch.cat((other, input_ids), 1), size, documents=documents)


def chunk_sizes(specs: Sequence[LayerSpec]) -> list[int]:
    """Tokens to prefill at a time: below, at and above the smallest and the largest window, and above two windows."""
    spans = _spans(specs)
    return sorted({max(2, n) for w in (min(spans), max(spans)) for n in (w - 1, w, w + 1, 2 * w + 3)})


def ways_to_feed(examined: Examined) -> Mapping[str, LastLogits]:
    """Each way to compute the last logits of a sequence with one model of ours, other than a plain forward pass."""
    span = min(_spans(examined.specs))
    padded = partial(left_padded, examined, pad=span // 2 + 1)
    packed = partial(behind_document, examined, other=torch.zeros(1, span + 3, dtype=torch.long))
    return {f"prefill by {size}": partial(feed, examined, size=size) for size in chunk_sizes(examined.specs)} | {
        "token by token": partial(feed, examined, size=1),
        "left-padded batch": padded,
        f"left-padded batch, prefill by {span + 1}": partial(padded, size=span + 1),
        "behind another document": packed,
        f"behind another document, prefill by {span + 1}": partial(packed, size=span + 1),
    }


def cliff_paths(examined: Examined) -> Iterator[tuple[str, LastLogits]]:
    """Every path from tokens to logits: the backends, and the ways to feed the model at hand.

    A backend loads the checkpoint once more, when its path is used; it raises UserError where it is not available. This
    is a generator, so that only one such copy is in memory at a time.
    """
    if not examined.ours:
        yield "full forward", partial(last_logits, examined)
        return
    for backend in BACKENDS:
        load = cache(partial(WindreachForCausalLM.from_pretrained, str(examined.folder), backend=backend))
        yield f"forward, {backend}", partial(_last_logits_of, load, examined)
    yield from ways_to_feed(examined).items()
    if examined.layout is not None:
        yield f"row shared by {examined.layout.parts} processes", partial(shared_logits, examined)


def _last_logits_of(load: Callable[[], Any], examined: Examined, input_ids: Tensor) -> Tensor:
    return last_logits(replace(examined, model=load().to(examined.device)), input_ids)


def cliff(examined: Examined, seed: int = 0, max_tokens: int = 8192) -> tuple[list[dict[str, Any]], str | None]:
    """Run the test on every path, and on other documents for models of ours. Sequences have at most `max_tokens`.

    Returns results {path, distance, changed, expected, equal} or {path, unavailable}, and why distances are missing.
    """
    limit = min(max_tokens, examined.max_tokens or max_tokens)
    length = cliff_length(examined.specs)
    between = _between_documents(examined, seed, limit) if examined.ours else []
    if length is None:
        return between, "a full layer sees every earlier token: no distance is beyond the reach"
    if length > limit:
        return between, f"a sequence longer than the reach has {length:,} tokens, more than the limit {limit:,}"
    reachable = windows.reachable(examined.specs, length)
    window, quoted = examined.window or 1, windows.window_times_layers(examined.specs) or 0
    distances = cliff_distances(reachable, near=[1, window - 1, window, quoted, quoted + window])
    probe = make_probe(reachable, distances, int(examined.tokenizer.vocab_size), seed)
    rows = [row for path, logits in cliff_paths(examined) for row in compare(path, logits, probe)]
    return rows + between, None


def compare(path: str, logits: LastLogits, probe: Probe) -> list[dict[str, Any]]:
    """Whether the logits before and after each change are equal in every bit, or why the path is not available."""
    length = probe.before.shape[1]
    if path.endswith(" reference") and length > DENSE_LIMIT:
        return [{"path": path, "unavailable": f"the dense mask of {length:,} tokens would not fit"}]
    try:
        equal = map(torch.equal, logits(probe.before), logits(probe.after))
    except UserError as error:
        return [{"path": path, "unavailable": str(error)}]
    return [{"path": path} | change | {"equal": e} for change, e in zip(probe.changes, equal, strict=True)]


def _between_documents(examined: Examined, seed: int, limit: int) -> list[dict[str, Any]]:
    """The test on another document that stands just before the query's own, of 1, 2 or more tokens."""
    vocabulary = int(examined.tokenizer.vocab_size)
    span = min(*_spans(examined.specs), limit // 4)
    ids = torch.randint(0, vocabulary, (1, 4 * span), generator=torch.Generator().manual_seed(seed))
    rows: list[dict[str, Any]] = []
    for size, own in product((None, span + 1), sorted({1, 2, max(2, span // 2)})):
        path = "packed documents" + (f", prefill by {size}" if size else "")
        other, change = ids[:, :-own], {"distance": own, "changed": "the whole document before", "expected": True}
        probe = Probe(other, (other + 1) % vocabulary, [change])
        rows += compare(path, partial(behind_document, examined, ids[:, -own:], size=size), probe)
    return rows


def cliff_holds(rows: list[dict[str, Any]]) -> bool:
    """True if no token without a path to the query, and none of another document, changed a bit on any path."""
    return all(row["equal"] for row in rows if row.get("expected"))
