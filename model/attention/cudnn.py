"""The attention of cuDNN, through the package nvidia-cudnn-frontend, which knows sliding windows and packed rows.

Its window counts the current token, as ours does. Its backward pass adds up in a fixed order where PyTorch is asked
for deterministic algorithms.

Legend: B batch, T positions, H heads, G kv heads, D head size, N = B * T tokens.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention.varlen import Kernel, Segments
from model.windows import LayerSpec


@dataclass(frozen=True)
class Rows:
    """Rows that are one document each, without a copy, as they lie in memory."""

    window: int | None

    @staticmethod
    def of(spec: LayerSpec) -> "Rows":
        _register()
        return Rows(spec.window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        window = self.window if self.window is not None and self.window < q.shape[2] else None
        return _attend(q, k, v, window)


def packed_kernel() -> Kernel:
    _register()
    return _packed


def _packed(q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, segments: Segments, window: int | None) -> Tensor:
    return _attend(
        q_nhd, k_ngd, v_ngd, window, cu_seqlens_q=segments.borders, cu_seqlens_kv=segments.borders,
        max_seqlen_q=segments.longest, max_seqlen_kv=segments.longest,
    )  # fmt: skip


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, **lengths: Any) -> Tensor:
    # The backward pass needs the log-sum-exp, which is the second output.
    scale, left = q.shape[-1] ** -0.5, -1 if window is None else window
    q, k = q.to(v.dtype), k.to(v.dtype)
    out: Tensor = torch.ops.cudnn.sdpa_fwd(
        q, k, v, scale, is_causal=True, window_left=left, return_lse=True, **lengths
    )[0]
    return out


def _register() -> None:
    """The package registers its operator with PyTorch when it is imported."""
    importlib.import_module("cudnn.sdpa.fwd.torch_op")
