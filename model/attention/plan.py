"""The choice of attention for a kind of layer: which backends can compute it, which one does, and why.

A model is refused when it is built if the backend it names can't compute one of its layers. Every other choice is made
by `plan_attention` and `AttentionPlan.prepare`, and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.attention import cudnn, varlen
from model.attention.backends import BACKENDS, Device, fastest
from model.attention.blocks import Blocks
from model.attention.composed import ByDocument, Dilated, PaddedQueries, fold_packing
from model.attention.parts import AcrossParts, halo, plan_exchange, row_behind
from model.attention.reference import Attend, Causal, Dense, MaskedChunk
from model.attention.tiles import CausalAfter, FullAfter, Tiles
from model.errors import UserError
from model.packing import Packing, Part, document_spans, kept_per_shape
from model.windows import LayerSpec

OVERLAP = 4  # windows of a part from which most of it is computed while messages travel: costs one window more
MIN_TILE_WINDOW = 128  # tokens; below, tiles are never faster than blocks
_VARLEN_KERNELS: dict[str, Callable[[], varlen.Kernel]] = {
    "cudnn": cudnn.packed_kernel,
    "flash": varlen.flash_kernel,
    "xformers": varlen.xformers_kernel,
}


def plan_attention(
    spec: LayerSpec, head_size: int, backend: str, device: Device | str, dtype: torch.dtype, gradients: bool
) -> "AttentionPlan":
    """The plan for layers of one kind.

    `backend` is `auto` or one of `BACKENDS`. `device` is a `Device`, or `cpu` or `cuda` for that of this
    machine. `dtype` is that of the matrix products, `gradients` whether a backward pass will follow.
    """
    device = Device.here(device) if isinstance(device, str) else device
    deterministic = torch.get_deterministic_debug_mode() == 2
    return _plan(spec, head_size, backend, device, dtype, gradients, deterministic)


@cache
def _plan(
    spec: LayerSpec, head_size: int, backend: str, device: Device, dtype: torch.dtype, gradients: bool,
    deterministic: bool,
) -> "AttentionPlan":  # fmt: skip
    facts = spec, head_size, device, dtype, gradients, deterministic
    chosen, reason = fastest(*facts) if backend == "auto" else (backend, f"model.attention_backend is {backend}")
    unable = BACKENDS[chosen].unable(*facts)
    tile_window = _tile_window(head_size, dtype, gradients)
    return AttentionPlan(spec, chosen, reason, device.type, tile_window, backend == "auto", unable, deterministic)


def _tile_window(head_size: int, dtype: torch.dtype, gradients: bool) -> int:
    """Tokens of window from which tiles are faster than blocks on a CPU.

    Timed at n = 2,048 to 16,384 with head sizes of 32, 64 and 128. Tiles make more and smaller products than blocks.
    """
    always = not gradients or (head_size >= 128 and dtype == torch.float32)
    return MIN_TILE_WINDOW if always else 2 * MIN_TILE_WINDOW


@dataclass(frozen=True)
class AttentionPlan:
    """How layers of one kind are computed: by which `backend`, for which `reason`, in tiles if W >= `tile_window`.

    auto: the choice is ours, so it may differ for a batch. unable: why the backend can't compute whole rows, or None.
    deterministic: the backward pass gives the same bits every time, also on a GPU.
    `prepare` and `prepare_cached` build what all layers of the kind share for a batch. They return the function that a
    layer calls.
    """

    spec: LayerSpec
    backend: str
    reason: str
    device_type: str
    tile_window: int = MIN_TILE_WINDOW
    auto: bool = False
    unable: str | None = None
    deterministic: bool = False

    @property
    def waits(self) -> bool:
        """Whether the host reads where the documents of packed rows lie, so that a CUDA graph can't hold the layer."""
        return self.backend == "xformers" or (self.backend == "blocked" and self.spec.global_tokens > 0)

    def prepare(self, packing: Packing, batch_size: int = 1) -> Attend:
        """Self-attention of whole rows (S = T), or of one part of each. It is kept for rows of one document each."""
        if packing.part is not None:
            return self._prepare_part(packing.part, batch_size, packing.positions.device)
        if packing.whole:
            return _prepare_whole_rows(self, packing.positions.shape[1], packing.positions.device, batch_size)
        return self._prepare(packing, batch_size)

    def _prepare_part(self, part: Part, rows: int, device: torch.device) -> Attend:
        """All processes that share the rows call it, in the same order."""
        if part.row.whole:
            return _prepare_part_of_whole_rows(self, part.bounds, part.index, part.group, rows, device)
        return self._across_parts(part, rows, device)

    def _across_parts(self, part: Part, rows: int, device: torch.device) -> Attend:
        spec, tokens = self.spec, part.end - part.first
        exchange, behind = plan_exchange(spec, part, rows, device), halo(spec, part.row, part.first)
        if spec.window is None:
            row = row_behind(part.row, behind, part.first, part.end)
            return AcrossParts(exchange, tokens, self._attend_to_all(row, tokens, device))
        edge = tokens if spec.global_tokens or spec.kind == "chunked" else (spec.window - 1) * spec.dilation
        if OVERLAP * edge > tokens:
            edge = tokens

        def prepared(behind: Tensor, end: int) -> Attend:
            return self.prepare(row_behind(part.row, behind, part.first, end).to(device), rows)

        inside = prepared(behind[:, :0], part.end) if edge < tokens else None
        if inside is not None and edge == 0:  # W = 1
            return inside
        return AcrossParts(exchange, edge, PaddedQueries(prepared(behind, part.first + edge)), inside)

    def _attend_to_all(self, row: Packing, tokens: int, device: torch.device) -> Attend:
        """A full layer for the last `tokens` queries of a row."""
        if self.device_type == "cpu" and self.backend != "reference":
            return FullAfter.of(row)
        row = row.to(device)
        documents = None if row.documents is None else row.documents[:, -tokens:]
        queries = Packing(row.positions[:, -tokens:], documents)
        return (
            Dense.of(self.spec, queries, row) if self.backend == "reference" else MaskedChunk(self.spec, queries, row)
        )

    def prepare_cached(self, queries: Packing, keys: Packing) -> Attend:
        """Attention of a chunk behind a cache: keys in order of age, the last T of them the chunk's own."""
        spec, t = self.spec, queries.positions.shape[1]
        if self.backend == "reference":
            return Dense.of(spec, queries, keys)
        if spec.ring_slots is not None and 2 * spec.ring_slots < t and not spec.global_tokens:
            # Chunks begin where positions are multiples of W, and a cache rarely begins at such a position.
            if spec.kind == "chunked":
                return PaddedQueries(Blocks.of(spec, keys))
            blocked = replace(self, backend="blocked", unable=None)
            return PaddedQueries(blocked._prepare(keys, len(keys.positions)))
        if spec.kind == "full" and keys.documents is None and not spec.sink and self.device_type == "cpu":
            return CausalAfter()
        return MaskedChunk(spec, queries, keys)

    def _prepare(self, packing: Packing, batch_size: int = 1) -> Attend:
        spec = self.spec
        if self.unable:
            raise UserError(f"model.attention_backend is {self.backend!r}, which {self.unable}; choose auto or blocked")
        if self.backend == "reference":
            return Dense.of(spec, packing, packing)
        if spec.dilation > 1 and not spec.global_tokens:
            sliding = replace(self, spec=replace(spec, kind="sliding", dilation=1))
            folded = fold_packing(packing, spec.dilation, batch_size)
            return Dilated(spec.dilation, sliding.prepare(folded, batch_size * spec.dilation))
        if self.backend == "blocked":
            return self._prepare_blocked(packing)
        if self._sees_all(packing) and not self.deterministic:
            return Causal()
        if self.backend == "flex":
            from model.attention.flex import Flex  # takes more than a second to import

            return Flex.of(spec, packing)
        if self.backend == "cudnn" and packing.whole and spec.kind != "chunked":
            return cudnn.Rows.of(spec)
        return self._prepare_segments(packing, batch_size)

    def _sees_all(self, packing: Packing) -> bool:
        """Whether queries see all earlier tokens of their row, as in the causal kernels of PyTorch."""
        spec, t = self.spec, packing.positions.shape[1]
        return packing.whole and not spec.sink and (spec.window is None or (spec.dilation == 1 and spec.window >= t))

    def _prepare_segments(self, packing: Packing, batch_size: int) -> Attend:
        """Kernels for segments can't compute a document with padding inside, which only a batch shows."""
        segments = varlen.find_segments(self.spec, packing, batch_size)
        if segments is not None:
            return varlen.Varlen.of(self.spec, segments, _VARLEN_KERNELS[self.backend]())
        if self.auto:
            return self._prepare_blocked(packing)
        raise UserError(
            f"model.attention_backend is {self.backend!r}, which can't leave out padding inside a document; "
            "choose auto, blocked or flex"
        )

    def _prepare_blocked(self, packing: Packing) -> Attend:
        spec, t = self.spec, packing.positions.shape[1]
        tiles, blocks = self._in_tiles(t), self._in_blocks(t)
        from_start = spec.global_tokens or spec.kind == "chunked"
        if (
            from_start
            and packing.documents is None
            and not packing.whole
            and bool((packing.positions[:, 0] != 0).any())
        ):
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


@kept_per_shape
def _prepare_part_of_whole_rows(
    plan: AttentionPlan, bounds: tuple[int, ...], index: int, group: Any, rows: int, device: torch.device
) -> Attend:
    row = Packing.of_whole_rows(bounds[-1], torch.device("cpu"))
    return plan._across_parts(Part(bounds, index, row, group), rows, device)
