"""Kernels of other libraries that take sequences of unequal lengths laid end to end: flash attention and xFormers.

The batch is cut into segments: its documents, for a chunked layer their chunks, and stretches of padding. Inside a
segment attention is causal, under a window if the layer slides. So all shapes depend on those of the batch alone, and
nobody has to wait for the GPU to count tokens. What comes out for padding is replaced by zeros.

Legend: B batch, T positions, H heads, G kv heads, D head size, N = B * T tokens, S most segments.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.packing import Packing
from model.windows import LayerSpec

MIN_SEGMENTS = 16  # S is this times a power of 2, so that few shapes are compiled


@dataclass(frozen=True)
class Segments:
    """borders: (S + 1,) int32, where each segment begins among the N tokens; N for those that do not exist.

    longest: no segment has more tokens. padding: (B, T), or None where there is none.
    """

    borders: Tensor
    longest: int
    padding: Tensor | None


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, int | None], Tensor]  # q (N, H, D), k, v (N, G, D), …, window


def find_segments(spec: LayerSpec, packing: Packing, batch_size: int) -> Segments | None:
    """The segments of a batch, or None if there is padding inside a document, which must not become a segment.

    Reads the device if the packing does not know its `spans`.

    >>> packing = Packing.of_documents(torch.tensor([[0, 0, 0, 1, 1]]))
    >>> find_segments(LayerSpec("chunked", 2), packing, batch_size=1).borders.tolist()[:6]
    [0, 2, 3, 5, 5, 5]
    """
    positions = packing.positions.expand(batch_size, -1)
    ids = torch.zeros_like(positions) if packing.documents is None else packing.documents.expand(batch_size, -1)
    starts = ids.diff(dim=1) != 0
    spans = batch_size if packing.documents is None else packing.spans
    if spans is None:
        spans = _count_spans(ids, starts)
        if spans is None:
            return None
    longest = positions.shape[1]
    padding = None if packing.documents is None or not packing.padded else ids < 0
    if spec.kind == "chunked" and spec.window:
        starts = starts | (((positions // spec.window).diff(dim=1) != 0) & (ids[:, 1:] >= 0))
        spans = 2 * spans + positions.numel() // spec.window
        longest = min(longest, spec.window) if padding is None else longest
    return Segments(_find_borders(F.pad(starts, (1, 0), value=True).flatten(), spans), longest, padding)


def _count_spans(ids: Tensor, starts: Tensor) -> int | None:
    """The number of documents and stretches of padding, or None if there is padding inside a document."""
    goes_on = starts & (ids[:, :-1] < 0) & (ids[:, 1:] == ids.cummax(1).values[:, :-1])
    spans, gaps = torch.stack((starts.sum(), goes_on.sum())).tolist()
    return None if gaps else spans + len(ids)


def _find_borders(starts: Tensor, most: int) -> Tensor:
    """Where `starts` (N,) is true, followed by N as often as needed. Unlike `nonzero` it does not wait for the GPU."""
    size = MIN_SEGMENTS
    while size < most:
        size *= 2
    count = torch.arange(1, size + 2, device=starts.device)
    return torch.searchsorted(starts.cumsum(0), count, out_int32=True)


@dataclass(frozen=True)
class Varlen:
    """Attention by a kernel for segments."""

    segments: Segments
    kernel: Kernel
    window: int | None

    @staticmethod
    def of(spec: LayerSpec, segments: Segments, kernel: Kernel) -> "Varlen":
        return Varlen(segments, kernel, spec.window if spec.kind == "sliding" else None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        (b, _, t, _), padding = q.shape, self.segments.padding
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = self.kernel(q, k, v, self.segments, self.window).unflatten(0, (b, t))
        out = out if padding is None else out.masked_fill(padding[..., None, None], 0)
        return out.transpose(1, 2)


@cache
def flash_kernel() -> Kernel:
    """The flash kernel of PyTorch. Its window counts the tokens before the current one."""
    from torch.nn.attention.varlen import varlen_attn

    # Older versions serve grouped queries without being told.
    gqa: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return partial(_flash, partial(varlen_attn, **gqa))


def _flash(
    varlen_attn: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None
) -> Tensor:
    q, k, before = q.to(v.dtype), k.to(v.dtype), -1 if window is None else window - 1
    borders, longest = segments.borders, segments.longest
    out: Tensor = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(before, 0))
    return out


def xformers_kernel() -> Kernel:
    return _xformers


def _xformers(q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, segments: Segments, window: int | None) -> Tensor:
    """The memory-efficient attention of xFormers. Its window counts the current token, as ours does.

    It wants the lengths on the host, and waits for them.
    """
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask  # type: ignore[import-not-found]

    lengths = [n for n in segments.borders.diff().tolist() if n]
    bias = BlockDiagonalCausalMask.from_seqlens(lengths, device=q_nhd.device)
    bias = bias if window is None else bias.make_local_attention(window)
    q = q_nhd.unflatten(1, (k_ngd.shape[1], -1))[None]
    k, v = (x[None, :, :, None].expand_as(q) for x in (k_ngd, v_ngd))
    return memory_efficient_attention(q, k, v, attn_bias=bias)[0].flatten(1, 2)
