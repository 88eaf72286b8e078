"""The cross-entropy of the output matrix. Where positions are many, their logits are computed in chunks.

Legend: N scored positions, E hidden size, V vocabulary.
The z-loss (Chowdhery and others, PaLM, 2022) adds weight x log(Z)^2 per token, where Z is the softmax's normaliser.
It keeps the logits from drifting. It changes the gradient only: the loss returned is plain cross-entropy.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import product_dtype

LOGITS_AT_ONCE = 2**26  # 256 MiB in float32; with the softmax and its gradient about three times that
ROUNDED_TO = 256  # positions of a chunk
GPU_FACTOR = 4  # as many more on a GPU, where fused kernels keep logits and gradient in bfloat16


class Score(NamedTuple):
    """The summed loss in nats (0-d), which labels were the most likely of all tokens (N,), and the `losses` (N,)."""

    loss: Tensor
    right: Tensor
    losses: Tensor  # without a gradient


def cross_entropy(
    hidden_ne: Tensor, weight_ve: Tensor, labels_n: Tensor, z_weight: float = 0.0, rows: int | None = None
) -> Score:
    """The score of `labels_n` under `hidden_ne @ weight_ve.T`. Negative labels are not scored.

    `rows` positions are computed at a time; default: as many as make `LOGITS_AT_ONCE` logits.
    """
    logits = LOGITS_AT_ONCE * (GPU_FACTOR if hidden_ne.is_cuda else 1)
    rows = rows or max(1, logits // len(weight_ve))
    if len(hidden_ne) > rows:
        if torch.is_grad_enabled():
            return Score(*_Chunks.apply(hidden_ne, weight_ve, labels_n, z_weight, rows, product_dtype(hidden_ne)))
        parts = [cross_entropy(h, weight_ve, n) for h, n in zip(hidden_ne.split(rows), labels_n.split(rows))]
        loss = torch.stack([part.loss for part in parts]).sum()
        return Score(loss, torch.cat([part.right for part in parts]), torch.cat([part.losses for part in parts]))
    logits_nv = F.linear(hidden_ne, weight_ve)
    losses = F.cross_entropy(logits_nv.float(), labels_n, reduction="none")
    loss = losses.sum()
    if z_weight:
        z = z_weight * (logits_nv.float().logsumexp(-1).square() * (labels_n >= 0)).sum()
        loss = loss + (z - z.detach())
    return Score(loss, logits_nv.detach().argmax(-1) == labels_n, losses.detach())


class _Chunks(torch.autograd.Function):
    """Computes the gradient together with the loss, while the chunk's logits exist, so nothing is computed twice.

    The backward pass only multiplies it by the incoming gradient, which is one number.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_weight: float, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        all_losses, rights, differentiate = [], [], _differentiate_on(hidden.device.type)
        rows = _equal_rows(len(hidden), rows)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for i in range(0, len(hidden), rows):
                h, wanted = hidden[i : i + rows].to(dtype), labels[i : i + rows]
                if missing := rows - len(h):
                    h, wanted = F.pad(h, (0, 0, 0, missing)), F.pad(wanted, (0, missing), value=-1)
                d_logits, losses, right = differentiate(h @ w.mT, wanted[:, None], z_weight)
                d_hidden[i : i + rows] = (d_logits @ w)[: rows - missing]
                d_weight += d_logits.mT @ h
                all_losses.append(losses)
                rights.append(right)
        right, losses = torch.cat(rights)[: len(hidden)], torch.cat(all_losses)[: len(hidden)]
        ctx.gradients = d_hidden, d_weight
        ctx.mark_non_differentiable(right, losses)
        return losses.sum(), right, losses

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None  # the graph outlives them
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None, None, None


def _equal_rows(n: int, most: int) -> int:
    """Rows of each chunk of `n` positions. Nearly as many positions give the same, so that few shapes are compiled.

    >>> [_equal_rows(n, most=8388) for n in (16_384, 16_300, 9_000)]
    [8192, 8192, 4608]
    """
    share = -(-n // -(-n // most))
    return min(most, -(-share // ROUNDED_TO) * ROUNDED_TO)


@cache
def _differentiate_on(device_type: str) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]:
    """On a GPU with Triton its dozen passes over the logits become two or three kernels."""
    fuse = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    return torch.compile(_differentiate, dynamic=False) if fuse else _differentiate


def _differentiate(logits_nv: Tensor, labels_n1: Tensor, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the logits in their dtype, the losses (N,), and which labels were the most likely (N,)."""
    dtype, logits = logits_nv.dtype, logits_nv.float()
    scored, wanted = labels_n1 >= 0, labels_n1.clamp_min(0)
    right = (logits.argmax(-1, keepdim=True) == labels_n1)[:, 0]
    normaliser = logits.logsumexp(-1, keepdim=True)
    losses = ((normaliser - logits.gather(1, wanted)) * scored)[:, 0]
    d_logits = logits.sub_(normaliser).exp_()  # in place, because logits are large
    if z_weight:
        d_logits.mul_(1 + 2 * z_weight * normaliser)
    d_logits = d_logits.scatter_(1, wanted, d_logits.gather(1, wanted) - 1).mul_(scored)
    return d_logits.to(dtype), losses, right
