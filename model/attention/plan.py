"""The choice of attention for a kind of layer: which backends can compute it, which one does, and why.

A model is refused when it is built if the backend it names can't compute one of its layers. Every other choice is made
by `plan_attention` and `AttentionPlan.prepare`, and nowhere else.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from model.attention import varlen
from model.attention.blocks import Blocks
from model.attention.composed import ByDocument, Dilated, PaddedQueries, fold_packing
from model.attention.reference import Attend, Causal, Dense, MaskedChunk
from model.attention.tiles import CausalAfter, Tiles
from model.errors import UserError
from model.packing import Packing, document_spans, kept_per_shape
from model.windows import LayerSpec

MIN_TILE_WINDOW = 128  # tokens; below, tiles are never faster than blocks


def _needs_gpu(capability: int, package: str | None = None) -> str | None:
    if package and importlib.util.find_spec(package) is None:
        return f"needs the package {package}, which is not installed"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and this machine has none"
    if torch.cuda.get_device_capability()[0] < capability:
        return f"needs an NVIDIA GPU of compute capability {capability}.0 or more"
    return None


@dataclass(frozen=True)
class Backend:
    """What a backend can compute. missing: the reason why this machine can't run it, or None."""

    about: str
    sinks: bool = True
    global_tokens: bool = True
    head_size_multiple: int = 1
    min_head_size: int = 1
    missing: Callable[[], str | None] = lambda: None

    def unable(self, spec: LayerSpec, head_size: int) -> str | None:
        """The reason why it can't compute a layer, or None."""
        if spec.sink and not self.sinks:
            return "has no learned sinks"
        if spec.global_tokens and not self.global_tokens:
            return "has no global tokens"
        if head_size % self.head_size_multiple:
            return f"needs a head size that is a multiple of {self.head_size_multiple}, not {head_size}"
        if head_size < self.min_head_size:
            return f"needs a head size of at least {self.min_head_size}, not {head_size}"
        return None


BACKENDS = {
    "reference": Backend("dense mask, softmax in float32: the oracle"),
    "blocked": Backend("pure PyTorch, O(n W) time and memory, any device"),
    "flex": Backend("FlexAttention: compiled on CUDA, forward only on a CPU", min_head_size=16),
    "flash": Backend(
        "the flash attention of PyTorch, in fp16 and bf16", sinks=False, global_tokens=False, head_size_multiple=8,
        missing=lambda: _needs_gpu(8),
    ),
    "xformers": Backend(
        "the memory-efficient attention of xFormers", sinks=False, global_tokens=False, head_size_multiple=8,
        missing=lambda: _needs_gpu(6, "xformers"),
    ),
}  # fmt: skip
_VARLEN_KERNELS = {"flash": varlen.flash, "xformers": varlen.xformers}


def check_backend(name: str, specs: Sequence[LayerSpec], head_size: int) -> None:
    """Raises UserError, with the layer and the reason, where backend `name` can't compute these layers here."""
    if name == "auto":
        return
    if name not in BACKENDS:
        raise UserError(f"model.attention_backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    able = [n for n, b in BACKENDS.items() if not b.missing() and not any(b.unable(s, head_size) for s in specs)]
    remedy = f"choose one of auto, {', '.join(able)}"
    for i, spec in enumerate(specs):
        if reason := BACKENDS[name].unable(spec, head_size):
            layer = "" if "head size" in reason else f", but model.layers[{i}] asks for them"
            raise UserError(f"model.attention_backend is {name!r}, which {reason}{layer}; {remedy}")
    if reason := BACKENDS[name].missing():
        raise UserError(f"model.attention_backend is {name!r}, which {reason}; {remedy}")


@cache
def plan_attention(
    spec: LayerSpec, head_size: int, backend: str, device_type: str, dtype: torch.dtype, gradients: bool
) -> "AttentionPlan":
    """The plan for layers of one kind.

    `backend` is `auto` or one of `BACKENDS`. `dtype` is that of the matrix products, `gradients` whether a backward
    pass will follow.
    """
    reason = f"model.attention_backend is {backend}"
    if backend == "auto":
        backend, reason = _auto(spec, head_size, device_type)
    return AttentionPlan(spec, backend, reason, device_type, _tile_window(head_size, dtype, gradients))


def _auto(spec: LayerSpec, head_size: int, device_type: str) -> tuple[str, str]:
    """FlexAttention where it is compiled and can compute the layer, else our own; and the reason."""
    if device_type != "cuda":
        return "blocked", f"auto on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "blocked", "auto on cuda: flex needs the package triton"
    if reason := BACKENDS["flex"].unable(spec, head_size):
        return "blocked", f"auto on cuda: flex {reason}"
    return "flex", "auto on cuda"


def _tile_window(head_size: int, dtype: torch.dtype, gradients: bool) -> int:
    """Tokens of window from which tiles are faster than blocks on a CPU.

    Timed at n = 2,048 to 16,384 with head sizes of 32, 64 and 128. Tiles make more and smaller products than blocks,
    and gain less from bf16 units, above all in the backward pass.
    """
    if not gradients:
        return MIN_TILE_WINDOW
    if dtype != torch.float32:
        return 8 * MIN_TILE_WINDOW
    return MIN_TILE_WINDOW if head_size >= 128 else 2 * MIN_TILE_WINDOW


@dataclass(frozen=True)
class AttentionPlan:
    """How layers of one kind are computed: by which `backend`, for which `reason`, in tiles if W >= `tile_window`.

    `prepare` and `prepare_cached` build what all layers of the kind share for a batch. They return the function that a
    layer calls.
    """

    spec: LayerSpec
    backend: str
    reason: str
    device_type: str
    tile_window: int = MIN_TILE_WINDOW

    def prepare(self, packing: Packing, batch_size: int = 1) -> Attend:
        """Self-attention of whole rows (S = T). The result is kept for rows that are one document each."""
        if packing.whole:
            return _prepare_whole_rows(self, packing.positions.shape[1], packing.positions.device, batch_size)
        return self._prepare(packing, batch_size)

    def prepare_cached(self, queries: Packing, keys: Packing) -> Attend:
        """Attention of a chunk behind a cache: keys in order of age, the last T of them the chunk's own."""
        spec, t = self.spec, queries.positions.shape[1]
        if self.backend == "reference":
            return Dense.of(spec, queries, keys)
        if spec.ring_slots is not None and 2 * spec.ring_slots < t and not spec.global_tokens:
            # The borders of chunks lie where positions say, and the oldest key in the cache is rarely at one.
            if spec.kind == "chunked":
                return PaddedQueries(Blocks.of(spec, keys))
            return PaddedQueries(replace(self, backend="blocked")._prepare(keys, len(keys.positions)))
        if spec.kind == "full" and keys.documents is None and not spec.sink and self.device_type == "cpu":
            return CausalAfter()
        return MaskedChunk(spec, queries, keys)

    def _prepare(self, packing: Packing, batch_size: int = 1) -> Attend:
        if self.backend == "reference":
            return Dense.of(self.spec, packing, packing)
        if self.backend == "flex":
            from model.attention.flex import Flex  # takes more than a second to import

            return Flex.of(self.spec, packing)
        if self.spec.dilation > 1 and not self.spec.global_tokens:
            sliding = replace(self, spec=replace(self.spec, kind="sliding", dilation=1))
            folded = fold_packing(packing, self.spec.dilation, batch_size)
            return Dilated(self.spec.dilation, sliding.prepare(folded, batch_size * self.spec.dilation))
        if self.backend in _VARLEN_KERNELS:
            return varlen.Varlen.of(self.spec, packing, batch_size, _VARLEN_KERNELS[self.backend])
        return self._prepare_blocked(packing)

    def _prepare_blocked(self, packing: Packing) -> Attend:
        spec, t = self.spec, packing.positions.shape[1]
        tiles, blocks = self._in_tiles(t), self._in_blocks(t)
        from_start = spec.global_tokens or spec.kind == "chunked"
        if from_start and packing.documents is None and bool((packing.positions[:, 0] != 0).any()):
            raise UserError("position_ids must start at 0 for chunked layers and global tokens, unless a cache is used")
        if packing.documents is not None and (tiles or (blocks and spec.global_tokens)):
            # Tiles know no documents, and blocks look for global tokens at the start of the row.
            if not packing.is_one_document():
                return self._by_document(packing)
            packing = Packing(packing.positions)
        if tiles:
            return Tiles(spec.window or t, spec.kind != "chunked", 0 if spec.kind == "full" else spec.global_tokens)
        if spec.kind == "full" and packing.documents is None and not spec.sink:
            return Causal()
        return Blocks.of(spec, packing) if blocks else Dense.of(spec, packing, packing)

    def _in_blocks(self, t: int) -> bool:
        """Whether rows of T tokens are so long that blocks save work."""
        return self.spec.ring_slots is not None and 2 * self.spec.ring_slots < t

    def _in_tiles(self, t: int) -> bool:
        """Whether window and rows are so long that tiles are faster, on the device that has their kernel."""
        spec, window = self.spec, self.spec.window or 0
        if self.device_type != "cpu" or t < MIN_TILE_WINDOW:
            return False
        if spec.kind == "chunked":
            return window >= MIN_TILE_WINDOW and spec.global_tokens <= window
        least = self.tile_window if self._in_blocks(t) else MIN_TILE_WINDOW
        return spec.kind == "full" or (spec.kind == "sliding" and window >= least)

    def _by_document(self, packing: Packing) -> Attend:
        """Documents at the same positions in several rows are computed together."""
        assert packing.documents is not None
        device, documents = packing.positions.device, []
        for (first, end), rows in document_spans(packing.documents).items():
            documents.append((first, end, rows, self.prepare(Packing.of_whole_rows(end - first, device))))
        return ByDocument(tuple(documents)) if documents else Dense.of(self.spec, packing, packing)


@kept_per_shape
def _prepare_whole_rows(plan: AttentionPlan, tokens: int, device: torch.device, batch_size: int) -> Attend:
    return plan._prepare(Packing.of_whole_rows(tokens, device), batch_size)
