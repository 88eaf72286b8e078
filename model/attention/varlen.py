"""Kernels of other libraries that take sequences of unequal lengths laid end to end: flash attention and xFormers.

What a layer may see becomes pieces: the documents, cut at the borders of chunks if the layer is chunked. Inside a piece
attention is causal, under a window if the layer is sliding. Padding is left out before the kernel and is zero after it.

Legend: B batch, T positions, H heads, G kv heads, R = H / G, D head size, N tokens that are not padding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.places import Places
from model.windows import LayerSpec


@dataclass(frozen=True)
class Pieces:
    """index (N,): the real tokens in the flattened (B * T); starts (P + 1,): where each piece begins and ends there."""

    index: Tensor
    starts: Tensor
    longest: int


Kernel = Callable[[Tensor, Tensor, Tensor, Pieces, int | None], Tensor]


def pieces_of(spec: LayerSpec, places: Places, rows: int) -> Pieces:
    """Raises UserError for padding inside a document, which would bring tokens nearer than they are.

    >>> where = Places(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[0, 0, 0, 1, 1]]))
    >>> pieces_of(LayerSpec("chunked", 2), where, rows=1).starts.tolist()
    [0, 2, 3, 5]
    """
    positions = places.positions.expand(rows, -1)
    documents = torch.zeros_like(positions) if places.documents is None else places.documents.expand(rows, -1)
    row = torch.arange(rows, device=positions.device)[:, None].expand_as(positions)
    index = (documents.flatten() >= 0).nonzero()[:, 0]
    chunk = positions // spec.window if spec.kind == "chunked" and spec.window else torch.zeros_like(positions)
    own = torch.stack([x.flatten()[index] for x in (row, documents, chunk)])
    begins = F.pad((own.diff(dim=1) != 0).any(0), (1, 0), value=True)
    steps = positions.flatten()[index].diff()
    if bool(((steps != 1) & ~begins[1:]).any()):
        raise UserError("this attention backend can't leave out padding inside a document; use auto, blocked or flex")
    starts = F.pad(begins.nonzero()[:, 0], (0, 1), value=len(index)).int()
    return Pieces(index, starts, int(starts.diff().max()) if len(index) else 0)


def by_pieces(
    q_bhtd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, spec: LayerSpec, places: Places, kernel: Kernel
) -> Tensor:
    """Attention (B, H, T, D) by a kernel for pieces."""
    b, h, t, d = q_bhtd.shape
    pieces = places.made if isinstance(places.made, Pieces) else pieces_of(spec, places, b)
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[pieces.index] for x in (q_bhtd, k_bgtd, v_bgtd))
    if not len(pieces.index):  # nothing but padding: zeros, and gradients of zero
        return q_bhtd * 0 + (k_bgtd.sum() + v_bgtd.sum()) * 0
    real = kernel(q, k, v, pieces, spec.window if spec.kind == "sliding" else None)
    out = q.new_zeros(b * t, h, d).index_copy(0, pieces.index, real)
    return out.view(b, t, h, d).transpose(1, 2)


def flash(q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, pieces: Pieces, window: int | None) -> Tensor:
    """The flash kernel that torch carries. Its window counts the tokens before the current one."""
    from torch.nn.attention.varlen import varlen_attn

    if q_nhd.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"model.attention_backend is 'flash', which knows fp16 and bf16, but the queries are {q_nhd.dtype}; "
            "set training.precision to bf16, or use flex or blocked"
        )
    out: Tensor = varlen_attn(
        q_nhd, k_ngd, v_ngd, pieces.starts, pieces.starts, pieces.longest, pieces.longest,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=q_nhd.shape[1] != k_ngd.shape[1],
    )  # type: ignore[assignment]  # fmt: skip
    return out


def xformers(q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, pieces: Pieces, window: int | None) -> Tensor:
    """xFormers' memory-efficient attention. Its window counts the current token, as ours does."""
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask  # type: ignore[import-not-found]

    bias = BlockDiagonalCausalMask.from_seqlens(pieces.starts.diff().tolist(), device=q_nhd.device)
    bias = bias if window is None else bias.make_local_attention(window)
    groups = k_ngd.shape[1]
    q = q_nhd.unflatten(1, (groups, -1))[None]
    k, v = (x[None, :, :, None].expand_as(q) for x in (k_ngd, v_ngd))
    return memory_efficient_attention(q, k, v, attn_bias=bias)[0].flatten(1, 2)
