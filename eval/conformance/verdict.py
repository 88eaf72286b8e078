"""Compares what was measured with what was asked for, and names the likely cause where they differ.

Legend: B rows, S columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.conformance.influence import Measured
from eval.conformance.modes import Batch, Way
from eval.models import specs_of
from model.packing import may_see
from model.windows import LayerSpec

ROUNDING = 1e-3  # a larger relative error of a layer's output isn't rounding; in float32 rounding is below 1e-5
ATTENTION = ("sliding", "full", "local", "global", "chunked", "hybrid")


@dataclass(frozen=True)
class Asked:
    """What one layer was asked for. `limited` is False where the layer is no attention: it may see less than `spec`."""

    spec: LayerSpec
    limited: bool = True

    @property
    def name(self) -> str:
        if not self.limited:
            return "other"
        return (
            "full"
            if self.spec.window is None
            else f"{'' if self.spec.kind == 'sliding' else self.spec.kind + ' '}{self.spec.window}"
        )


@dataclass(frozen=True)
class Fault:
    """Something that runs and was not asked for. query and key: columns of an example."""

    name: str
    sentence: str
    layers: tuple[int, ...] = ()
    query: int | None = None
    key: int | None = None
    label: str = ""


def asked_of(config: Any) -> list[Asked]:
    """What each layer was asked for, by the model's config."""
    specs = specs_of(config)
    types = getattr(getattr(config, "get_text_config", lambda: config)(), "layer_types", None) or ["full"] * len(specs)
    return [Asked(spec, str(kind).startswith(ATTENTION)) for spec, kind in zip(specs, types)]


def expected_changes(spec: LayerSpec, batch: Batch) -> Tensor:
    """Whether a column's output changes with the changed column of the row, bool (B, S)."""
    seen = may_see(spec, batch.packing, batch.packing).expand(len(batch.columns), -1, -1)
    return _column(seen, batch) | _itself(batch)


def expected_reach(asked: Sequence[Asked], batch: Batch) -> Tensor:
    """The same through all layers: by the product of their masks."""
    itself = torch.eye(batch.documents.shape[1], dtype=torch.bool)
    reach = itself.expand(len(batch.documents), -1, -1).float()
    for layer in asked:
        mask = may_see(layer.spec, batch.packing, batch.packing) | itself
        reach = (mask.float() @ reach).clamp(max=1)
    return _column(reach > 0, batch)


def _column(mask: Tensor, batch: Batch) -> Tensor:
    return mask[torch.arange(len(batch.columns)), :, batch.columns]


def _itself(batch: Batch) -> Tensor:
    return torch.arange(batch.documents.shape[1]) == batch.columns[:, None]


@dataclass(frozen=True)
class Influences:
    """Measured and expected influences of the changed column of each row on all columns, both bool (B, S')."""

    measured: Tensor
    expected: Tensor
    batch: Batch

    def key(self, values: Tensor) -> Tensor:
        return values.gather(1, self.batch.columns[:, None])

    @property
    def _queries(self) -> Tensor:
        return self.batch.documents[:, : self.measured.shape[1]]

    @property
    def age(self) -> Tensor:
        """How many columns a query is behind the key (B, S')."""
        return torch.arange(self.measured.shape[1]) - self.batch.columns[:, None]

    @property
    def extra(self) -> Tensor:
        return self.measured & ~self.expected & (self._queries >= 0)

    @property
    def missing(self) -> Tensor:
        return self.expected & ~self.measured & (self._queries >= 0)

    @property
    def from_padding(self) -> Tensor:
        return self.key(self.batch.documents).expand_as(self._queries) < 0

    @property
    def other_document(self) -> Tensor:
        return (self.key(self.batch.documents) != self._queries) & ~self.from_padding

    @property
    def within(self) -> Tensor:
        """Pairs of a query and the same or an earlier token of its document."""
        return (self.key(self.batch.documents) == self._queries) & (self._queries >= 0) & (self.age >= 0)

    def window(self, global_tokens: int = 0) -> int:
        """The window measured: the largest age of a key that is seen, plus 1. Global tokens don't count."""
        counted = self.measured & self.within & (self.key(self.batch.positions) >= global_tokens)
        return int(self.age[counted].max()) + 1 if counted.any() else 0

    def everything_is_seen(self, where: Tensor) -> bool:
        """Whether the queries in the columns of `where` see all earlier tokens of their documents."""
        queries = where.any(0) & self.within
        return bool(self.measured[queries].all())

    def fault(self, name: str, sentence: str, where: Tensor) -> Fault:
        """A fault with the first pair of `where` (B, S') as its example."""
        row, query = (int(n) for n in where.nonzero()[0])
        return Fault(name, sentence, query=query, key=int(self.batch.columns[row]))


def faults_of(asked: Sequence[Asked], way: Way, measured: Measured, trusted: bool) -> list[Fault]:
    """Everything that is not as asked, each with its likely cause and the layers where it was seen.

    trusted: whether the reference itself is as asked, so that other values are a fault.
    """
    listed: list[Fault] = []
    for n, (layer, changes, error) in enumerate(zip(asked, measured.layers, measured.errors)):
        influences = Influences(changes, expected_changes(layer.spec, way.batch)[:, : changes.shape[1]], way.batch)
        in_mask = list(_mask_faults(layer, influences))
        listed += [replace(fault, layers=(n,)) for fault in in_mask]
        if n in measured.dead_sinks:
            listed.append(Fault("sinks dropped", "the learned attention sinks change nothing", (n,)))
        elif trusted and not in_mask:
            listed += [replace(fault, layers=(n,)) for fault in _value_faults(way, error)]
    return _merge([replace(fault, label=way.label) for fault in listed or _stack_faults(asked, way, measured, trusted)])


def _merge(faults: Sequence[Fault]) -> list[Fault]:
    """One fault for all layers that share its sentence."""
    merged: dict[str, Fault] = {}
    for fault in faults:
        before = merged.get(fault.sentence, replace(fault, layers=()))
        merged[fault.sentence] = replace(before, layers=(*before.layers, *fault.layers))
    return list(merged.values())


def _mask_faults(asked: Asked, seen: Influences) -> Iterator[Fault]:
    extra, missing = seen.extra, seen.missing
    if (padding := extra & seen.from_padding).any():
        yield seen.fault("padding seen", "padding is attended: the padding mask is dropped", padding)
    if (leak := extra & seen.other_document).any():
        yield seen.fault("documents leak", _leak(seen, leak), leak)
    if (later := extra & (seen.age < 0) & ~seen.other_document & ~seen.from_padding).any():
        sentence = "a query sees later tokens: the causal mask is dropped, or aligned to the wrong corner"
        yield seen.fault("not causal", sentence, later)
    if (far := extra & seen.within).any():
        yield seen.fault(*_too_far(asked.spec, seen, far), far)
    elif missing.any() and asked.limited:
        yield seen.fault(*_too_near(asked.spec, seen, missing), missing)


def _leak(seen: Influences, leak: Tensor) -> str:
    if len(seen.batch.documents[0].unique()) > 1 and int(leak.sum(0).max()) == 1:
        return "a document sees the last token before it: its first token is off by one"
    return "documents see each other: the mask of packed documents is dropped"


def _too_far(spec: LayerSpec, seen: Influences, far: Tensor) -> tuple[str, str]:
    """The name and the sentence for keys that are seen from too far."""
    if spec.kind == "chunked" and not seen.everything_is_seen(far):
        sentence = f"keys outside of the query's chunk of {spec.window} are seen: a sliding window, or chunks counted "
        return "wrong chunks", sentence + "from another start"
    if seen.missing.any():
        sentence = "queries see older keys in place of newer ones: the mask is offset, or aligned to the wrong corner"
        return "mask misaligned", sentence
    if seen.everything_is_seen(far):
        queries = f"by queries in columns {_span(far)}, every earlier token is seen"
        return "window ignored", f"the window {spec.window} is ignored: {queries}"
    window = seen.window(spec.global_tokens)
    if spec.kind == "dilated" and window <= (spec.ring_slots or 0):
        return "dilation ignored", f"keys between those {spec.dilation} apart are seen"
    if spec.kind == "sliding" and window == (spec.window or 0) + 1:
        sentence = f"W + 1 = {window} keys are seen: the current token is not counted, or `<=` stands for `<`"
        return "W + 1 keys", sentence
    return "window too large", f"up to {window} keys are seen where the window is {spec.window}"


def _too_near(spec: LayerSpec, seen: Influences, missing: Tensor) -> tuple[str, str]:
    """The name and the sentence for keys that are not seen, though the window holds them."""
    least = int(seen.age[missing].min())
    is_global = seen.key(seen.batch.positions) < spec.global_tokens
    if spec.global_tokens and not (missing & ~is_global).any():
        sentence = f"the {spec.global_tokens} global tokens are not seen beyond the window"
        return "global tokens dropped", sentence
    if spec.kind == "sliding" and least == (spec.window or 0) - 1:
        sentence = f"W − 1 = {least} keys are seen: the current token is counted twice, or the cache is one too short"
        return "W − 1 keys", sentence
    if (missing.any(0) & (seen.age >= least) & seen.within & seen.measured).any() or not least:
        sentence = "queries miss keys inside the window: they are lost from the cache, or masked for another reason"
        return "keys lost", sentence
    if spec.window is None:
        return "window not asked for", f"a window of {least} where full attention was asked for"
    return "window too small", f"only {least} keys are seen where the window is {spec.window}"


def _span(where: Tensor) -> str:
    """The first and the last column of `where` (B, S).

    >>> _span(torch.tensor([[False, True, False, True]]))
    '1 to 3'
    """
    columns = where.any(0).nonzero().flatten()
    return f"{int(columns[0])} to {int(columns[-1])}"


def _value_faults(way: Way, error: Tensor) -> Iterator[Fault]:
    wrong = (error > ROUNDING) & (way.batch.documents[:, : error.shape[1]] >= 0)
    if not wrong.any():
        return
    query = int(wrong.any(0).nonzero()[0])
    sentence = "the right keys are seen, but the output differs from that of the reference"
    if way.starts and query >= way.starts[0]:
        sentence += f" from the second call on: wrong position ids, RoPE offset or cache position (column {query})"
    elif way.mode in ("packed", "left-padded"):
        sentence += ": positions are not counted from the start of the document, or a row has another row's mask"
    else:
        sentence += ": another scale, bias, position or sink"
    yield Fault("values differ", sentence, query=query)


def _stack_faults(asked: Sequence[Asked], way: Way, measured: Measured, trusted: bool) -> Iterator[Fault]:
    """What the layers don't show: tokens that are mixed outside of attention."""
    changes, fed = measured.stack, measured.layers[0].shape[1]
    columns = slice(fed - changes.shape[1], fed)
    extra = changes & ~expected_reach(asked, way.batch)[:, columns] & (way.batch.documents[:, columns] >= 0)
    if extra.any():
        row, query = (int(n) for n in extra.nonzero()[0])
        sentence = "each attention layer is as asked, but through the stack tokens reach farther than windows allow"
        everywhere = tuple(range(len(asked)))
        key = int(way.batch.columns[row])
        yield Fault("stack sees too far", sentence, everywhere, query + columns.start, key)
    elif trusted and (measured.logits_error or 0.0) > ROUNDING:
        sentence = f"each layer is as asked, but the logits differ by {measured.logits_error:.1e} from the reference's"
        yield Fault("logits differ", sentence, tuple(range(len(asked))))


def summary(asked: Sequence[Asked], way: Way, measured: Measured, trusted: bool) -> dict[str, Any]:
    """One way as it stands in the JSON file."""
    windows = []
    for layer, changes in zip(asked, measured.layers):
        expected = expected_changes(layer.spec, way.batch)[:, : changes.shape[1]]
        seen = Influences(changes, expected, way.batch)
        right = not seen.extra.any() and not (seen.missing.any() and layer.limited)
        windows.append(layer.name if right else _measured_name(layer, seen))
    fed, n = measured.layers[0].shape[1], measured.stack.shape[1]
    reach = expected_reach(asked, way.batch)[:, fed - n : fed]
    stack = Influences(measured.stack, reach, way.batch)
    return {
        "way": way.label,
        "measured": windows,
        "stack_as_asked": not bool((stack.extra | stack.missing).any()),
        "largest_layer_error": max(float(e[way.batch.documents[:, :fed] >= 0].max()) for e in measured.errors),
        "logits_error": measured.logits_error,
        "faults": [asdict(fault) for fault in faults_of(asked, way, measured, trusted)],
    }


def _measured_name(asked: Asked, seen: Influences) -> str:
    if (seen.extra & (seen.age < 0)).any():
        return "not causal"
    everything = bool(seen.measured[seen.within].all())
    return "full" if everything else str(seen.window(asked.spec.global_tokens))
