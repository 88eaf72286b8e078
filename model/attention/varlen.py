"""Kernels of other libraries that take sequences of unequal lengths laid end to end: flash attention and xFormers.

The batch is cut into segments: its documents, and for a chunked layer their chunks. Inside a segment attention is
causal, under a window if the layer slides. Padding is left out for the kernel and is zero in the output.

Legend: B batch, T positions, H heads, G kv heads, D head size, N tokens that are not padding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.packing import Packing
from model.windows import LayerSpec


@dataclass(frozen=True)
class Segments:
    """index (N,): the real tokens among all B * T. borders: where segments begin and end among the N tokens."""

    index: Tensor
    borders: Tensor
    longest: int


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, int | None], Tensor]  # q (N, H, D), k, v (N, G, D), …, window


def find_segments(spec: LayerSpec, packing: Packing, batch_size: int) -> Segments:
    """Raises UserError for padding inside a document: leaving it out would bring tokens nearer than they are.

    >>> packing = Packing(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[0, 0, 0, 1, 1]]))
    >>> find_segments(LayerSpec("chunked", 2), packing, batch_size=1).borders.tolist()
    [0, 2, 3, 5]
    """
    positions = packing.positions.expand(batch_size, -1)
    documents = torch.zeros_like(positions)
    if packing.documents is not None:
        documents = packing.documents.expand(batch_size, -1)
    row = torch.arange(batch_size, device=positions.device)[:, None].expand_as(positions)
    index = (documents.flatten() >= 0).nonzero()[:, 0]
    chunk = positions // spec.window if spec.kind == "chunked" and spec.window else torch.zeros_like(positions)
    owner = torch.stack([x.flatten()[index] for x in (row, documents, chunk)])
    starts = F.pad((owner.diff(dim=1) != 0).any(0), (1, 0), value=True)
    if bool(((positions.flatten()[index].diff() != 1) & ~starts[1:]).any()):
        raise UserError("this attention backend can't leave out padding inside a document; use auto, blocked or flex")
    borders = F.pad(starts.nonzero()[:, 0], (0, 1), value=len(index)).int()
    return Segments(index, borders, int(borders.diff().max()) if len(index) else 0)


@dataclass(frozen=True)
class Varlen:
    """Attention by a kernel for segments."""

    segments: Segments
    kernel: Kernel
    window: int | None

    @staticmethod
    def of(spec: LayerSpec, packing: Packing, batch_size: int, kernel: Kernel) -> "Varlen":
        window = spec.window if spec.kind == "sliding" else None
        return Varlen(find_segments(spec, packing, batch_size), kernel, window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        (b, h, t, d), index = q.shape, self.segments.index
        if not len(index):  # nothing but padding: zeros, and gradients of zero
            return q * 0 + (k.sum() + v.sum()) * 0
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[index] for x in (q, k, v))
        real = self.kernel(q, k, v, self.segments, self.window)
        return real.new_zeros(b * t, h, d).index_copy(0, index, real).view(b, t, h, d).transpose(1, 2)


def flash(q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, segments: Segments, window: int | None) -> Tensor:
    """The flash kernel of PyTorch. Its window counts the tokens before the current one."""
    from torch.nn.attention.varlen import varlen_attn

    if q_nhd.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"model.attention_backend is 'flash', which computes in fp16 and bf16, but the queries are {q_nhd.dtype}; "
            "set training.precision to bf16, or use flex or blocked"
        )
    out: Tensor = varlen_attn(
        q_nhd, k_ngd, v_ngd, segments.borders, segments.borders, segments.longest, segments.longest,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=q_nhd.shape[1] != k_ngd.shape[1],
    )  # type: ignore[assignment]  # fmt: skip
    return out


def xformers(q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, segments: Segments, window: int | None) -> Tensor:
    """The memory-efficient attention of xFormers. Its window counts the current token, as ours does."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask  # type: ignore[import-not-found]

    bias = BlockDiagonalCausalMask.from_seqlens(segments.borders.diff().tolist(), device=q_nhd.device)
    bias = bias if window is None else bias.make_local_attention(window)
    q = q_nhd.unflatten(1, (k_ngd.shape[1], -1))[None]
    k, v = (x[None, :, :, None].expand_as(q) for x in (k_ngd, v_ngd))
    return memory_efficient_attention(q, k, v, attn_bias=bias)[0].flatten(1, 2)
