"""Bytes that a training step holds: counted by running the real code on tensors that have a shape and no data.

What the backward pass keeps is decided in many places (fused products, autocast, the form of attention), so it is
counted there: `FakeTensorMode` runs `Scorer`, the module that is trained, layer by layer, and nothing is allocated.
Layers that `torch.compile` has fused keep less; a kernel's own scratch memory is not seen.

Legend: E hidden size, V vocabulary, N scored positions.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.flops import count_parameters, parameters
from model.windows import LayerSpec
from training.objective import Scorer
from training.settings.schema import OptimizerSettings

LARGEST = 2**48  # numbers in one tensor; beyond this no machine is meant


class PeakBytes(TorchDispatchMode):
    """The most bytes of new storages alive at once while it is on; kernels' own scratch memory is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.alive:
            self.alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, id(storage), None)
            self.peak = max(self.peak, sum(self.alive.values()))


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of all storages that autograd keeps for the backward pass while it is on, but those of `own`."""

    def __init__(self, own: Sequence[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda x: x)
        self._own = {id(x.untyped_storage()) for x in own}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if id(storage) not in self._own:
            self._kept[id(storage)] = storage
        return x

    def take(self) -> int:
        """The sum so far; lets go of the storages."""
        total = sum(storage.nbytes() for storage in self._kept.values())
        self._kept.clear()
        return total


@dataclass(frozen=True)
class Rows:
    """A micro-batch: `scored` positions a row reach the head, `relayed` the relay head. `relay_values`: its width."""

    rows: int
    seq_len: int
    scored: int
    relayed: int = 0
    relay_values: int | None = None


@dataclass(frozen=True)
class Held:
    """Bytes: `layers` are kept by the layers for the backward pass; `outside` by the rest (logits), with all that is
    short-lived at the peak."""

    layers: int
    outside: int

    @property
    def total(self) -> int:
        return self.layers + self.outside


@dataclass(frozen=True)
class Form:
    """How a step runs. precision: `bf16` (autocast) or `fp32`. weights: their dtype inside a layer (FSDP2 gathers
    them in bf16). checkpointing: layers keep their input alone. attention: `cpu` (as this code does it on a CPU),
    `accelerator` (as this code does it elsewhere) or `fused` (a kernel that keeps its inputs, output and log-sum-exp).
    """

    precision: str = "fp32"
    weights: torch.dtype = torch.float32
    checkpointing: bool = False
    attention: str = "cpu"


def held(config: WindreachConfig, rows: Rows, form: Form) -> Held:
    """What forward and backward of one micro-batch hold beside weights, gradients and optimizer state.

    Two stacks of each kind are run: what the deeper one costs more is what a layer costs.
    Raises UserError for tensors that no machine holds.
    """
    _check_countable(config, rows)
    if form.checkpointing:
        return _recomputed(config, rows, form)
    kinds, depth = Counter(config.specs), len(config.specs)
    kept, bare = _run(config, [], rows, form)
    costs = [_cost(config, spec, rows, form, kept) for spec in kinds]
    layers = sum(count * cost.kept for count, cost in zip(kinds.values(), costs, strict=True))
    outside = kept + sum(cost.shared for cost in costs) + (depth - 1) * max(cost.growth for cost in costs)
    return Held(layers, outside + max(bare - kept, *(cost.scratch for cost in costs)))


def _recomputed(config: WindreachConfig, rows: Rows, form: Form) -> Held:
    """The same where every layer keeps its input alone and one at a time runs anew: the head's peak, or a layer's.

    Where the relay head has asked after every layer, a gradient for each layer's output waits meanwhile.
    """
    _, bare = _run(config, [], rows, form)
    stream = rows.rows * rows.seq_len * config.hidden_size * form.weights.itemsize
    peaks = [
        _run(config, [spec], rows, form)[1] - stream + sum(_attention_elsewhere(config, spec, rows, form))
        for spec in set(config.specs)
    ]
    if not rows.relayed:
        return Held(len(config.specs) * stream, max(bare, *peaks))
    waiting = (len(config.specs) - 1) * stream
    relays = held(config, rows, replace(form, checkpointing=False)).outside
    return Held(len(config.specs) * stream, max(bare, relays, waiting + max(peaks)))


@dataclass(frozen=True)
class _Cost:
    """Bytes of a layer of one kind: kept by each; shared by all of them (masks, rotary tables); short-lived at the
    peak, and how much more of that each further layer brings (the relay head is asked after every one)."""

    kept: int
    shared: int
    scratch: int
    growth: int


def _cost(config: WindreachConfig, spec: LayerSpec, rows: Rows, form: Form, outside: int) -> _Cost:
    few, many = (5, 7) if rows.relayed else (1, 2)  # where the relay head asks, its share rules only in a deep stack
    kept_few, peak_few = _run(config, [spec] * few, rows, form)
    kept_many, peak_many = _run(config, [spec] * many, rows, form)
    more_kept, more_scratch = _attention_elsewhere(config, spec, rows, form)
    kept = (kept_many - kept_few) // (many - few)
    growth = max(0, peak_many - kept_many - peak_few + kept_few) // (many - few) if rows.relayed else 0
    scratch = peak_few - kept_few - (few - 1) * growth
    return _Cost(kept + more_kept, kept_few - few * kept - outside, scratch + more_scratch, growth)


def optimizer_bytes(config: WindreachConfig, s: OptimizerSettings, objectives: int, more: int = 0) -> int:
    """Moments in float32: AdamW two a parameter, Muon one a matrix of the layers; a set for each objective.

    `more` parameters are outside the decoder (the relay head). See `training.optimizer`.
    """
    parts = parameters(config)
    muon = parts["attention"] + parts["feed-forward"] if s.kind == "muon" else 0
    return 4 * objectives * (2 * (count_parameters(config) + more) - muon)


# -- one run ----------------------------------------------------------------------------------------------------------


def _run(config: WindreachConfig, specs: list[LayerSpec], rows: Rows, form: Form) -> tuple[int, int]:
    """Bytes kept after the forward pass, and the peak of forward and backward, of a stack of `specs`."""
    with FakeTensorMode():
        with _default_dtype(form.weights):
            stack = specs if form.attention == "cpu" else [_stand_in(spec) for spec in specs]
            scorer = Scorer(WindreachForCausalLM(_with_layers(config, stack)), rows.relay_values).train()
        for p in scorer.parameters():
            p.grad = torch.zeros_like(p)  # as when micro-batches accumulate
        if form.checkpointing:
            for layer in scorer.decoder.model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        batch = _batch(rows, len(specs))
        return step_bytes(scorer, lambda: _loss(scorer, batch, form))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def step_bytes(module: torch.nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """(kept, peak) bytes of `loss()` and its backward pass, weights and gradients that are there not counted."""
    with PeakBytes() as watched:
        saved = KeptBytes(list(module.parameters()))
        with saved:
            result = loss()
        kept = saved.take()
        result.backward()
    return kept, watched.peak


def _loss(scorer: Scorer, batch: dict[str, Any], form: Form) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=form.precision == "bf16"):
        scores = scorer(**batch)
        return torch.stack([total for total, _ in scores.values()]).sum()


def _batch(rows: Rows, layers: int) -> dict[str, Any]:
    def target(count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows.rows * count, dtype=torch.long), torch.zeros(rows.rows * count, dtype=torch.long)

    targets = {"text": target(rows.scored)} | ({"relay": target(rows.relayed)} if rows.relayed else {})
    return {
        "input_ids": torch.zeros(rows.rows, rows.seq_len, dtype=torch.long),
        "documents": None,
        "targets": targets,
    }


def _with_layers(config: WindreachConfig, specs: list[LayerSpec]) -> WindreachConfig:
    changed = copy.copy(config)
    changed.layers, changed.num_hidden_layers = [vars(spec) for spec in specs], len(specs)
    changed.attention_backend = _of_pytorch(config)
    return changed


def _of_pytorch(config: WindreachConfig) -> str:
    """The backend, if it runs on any machine; kernels of GPUs are counted as `fused`."""
    return config.attention_backend if config.attention_backend in ("reference", "blocked") else "blocked"


def _check_countable(config: WindreachConfig, rows: Rows) -> None:
    tokens, widest = rows.rows * rows.seq_len, max(config.vocab_size, 2 * config.intermediate_size, config.hidden_size)
    heads = config.num_attention_heads * config.head_dim
    keys = max(min(rows.seq_len, 2 * (spec.ring_slots or rows.seq_len)) for spec in config.specs)
    largest = max(
        tokens * max(widest, heads, config.num_attention_heads * keys), widest * max(config.hidden_size, heads)
    )
    if largest > LARGEST:
        raise UserError(
            f"one tensor of a step would hold {largest:,} numbers (rows of {rows.seq_len:,} tokens, "
            f"model.hidden_size {config.hidden_size:,}, model.intermediate_size {config.intermediate_size:,}); "
            "no machine holds that: lower these"
        )


# -- attention on other devices ---------------------------------------------------------------------------------------


def _attention_elsewhere(config: WindreachConfig, spec: LayerSpec, rows: Rows, form: Form) -> tuple[int, int]:
    """What attention keeps, and needs besides at the peak, more (or less) than what was run on a CPU in its place."""
    if form.attention == "cpu":
        return 0, 0
    here = _attend_bytes(config, _stand_in(spec), rows, form, "cpu")
    there = _fused_bytes(config, rows, form) if form.attention == "fused" else None
    there = there or _attend_bytes(config, spec, rows, form, "meta")
    return there[0] - here[0], there[1] - here[1]


def _stand_in(spec: LayerSpec) -> LayerSpec:
    """What is run in its place for another device: attention of one call, which is subtracted again."""
    return replace(spec, kind="full", window=None, dilation=1, global_tokens=0, sink=False)


def _attend_bytes(config: WindreachConfig, spec: LayerSpec, rows: Rows, form: Form, device: str) -> tuple[int, int]:
    """(kept, peak less kept) of one layer's attention; on `meta` the code takes the ways of an accelerator."""
    dtype = torch.bfloat16 if form.precision == "bf16" else torch.float32
    backend = _of_pytorch(config)
    t, heads, kv = rows.seq_len, config.num_attention_heads, config.num_key_value_heads
    with FakeTensorMode(), torch.device(device):
        q, k, v = (
            torch.empty(rows.rows, n, t, config.head_dim, dtype=dtype, requires_grad=True) for n in (heads, kv, kv)
        )
        sinks = torch.empty(heads, requires_grad=True) if spec.sink else None
        places = prepare(spec, Places(torch.arange(t)[None]), backend, tiles=tiles_from(dtype, config.head_dim))
        kept, peak = step_bytes(torch.nn.Module(), lambda: attend(q, k, v, spec, places, backend, sinks).float().sum())
    return kept, peak - kept


def _fused_bytes(config: WindreachConfig, rows: Rows, form: Form) -> tuple[int, int]:
    """Queries, keys, values, output and log-sum-exp are kept; short-lived are the gradients of the first three."""
    tokens, size = rows.rows * rows.seq_len, 2 if form.precision == "bf16" else 4
    q, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    return tokens * ((2 * q + kv) * size + 4 * config.num_attention_heads), tokens * (2 * q + kv) * size
