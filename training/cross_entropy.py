"""The cross-entropy of the output matrix. Where positions are many, their logits are computed in chunks.

Legend: N scored positions, E hidden size, V vocabulary.
The z-loss (Chowdhery and others, PaLM, 2022) adds weight x log(Z)^2 per token, where Z is the softmax's normaliser.
It keeps the logits from drifting. It changes the gradient only: the loss returned is plain cross-entropy.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import product_dtype

LOGITS_AT_ONCE = 2**26  # 256 MiB in float32; with the softmax and its gradient about three times that


class Score(NamedTuple):
    """The summed loss in nats (0-d), and which labels were the most likely of all tokens (N,)."""

    loss: Tensor
    right: Tensor


def cross_entropy(
    hidden_ne: Tensor, weight_ve: Tensor, labels_n: Tensor, z_weight: float = 0.0, rows: int | None = None
) -> Score:
    """The score of `labels_n` under `hidden_ne @ weight_ve.T`, `rows` at a time (default: `LOGITS_AT_ONCE` logits)."""
    rows = rows or max(1, LOGITS_AT_ONCE // len(weight_ve))
    if len(hidden_ne) > rows:
        return Score(*_Chunks.apply(hidden_ne, weight_ve, labels_n, z_weight, rows, product_dtype(hidden_ne)))
    logits_nv = F.linear(hidden_ne, weight_ve)
    loss = F.cross_entropy(logits_nv.float(), labels_n, reduction="sum")
    if z_weight:
        z = z_weight * logits_nv.float().logsumexp(-1).square().sum()
        loss = loss + (z - z.detach())
    return Score(loss, logits_nv.detach().argmax(-1) == labels_n)


class _Chunks(torch.autograd.Function):
    """Computes the gradient together with the loss, while the chunk's logits exist, so nothing is computed twice.

    The backward pass only multiplies it by the incoming gradient, which is one number.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_weight: float, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = hidden.new_zeros((), dtype=torch.float32)
        right = torch.empty_like(labels, dtype=torch.bool)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for i in range(0, len(hidden), rows):
                h, wanted = hidden[i : i + rows].to(dtype), labels[i : i + rows, None]
                logits = (h @ w.mT).float()
                right[i : i + rows] = (logits.argmax(-1, keepdim=True) == wanted)[:, 0]
                normaliser = logits.logsumexp(-1, keepdim=True)
                loss += (normaliser - logits.gather(1, wanted)).sum()
                d_logits = logits.sub_(normaliser).exp_()  # in place, because logits are large
                if z_weight:
                    d_logits.mul_(1 + 2 * z_weight * normaliser)
                d_logits = d_logits.scatter_(1, wanted, d_logits.gather(1, wanted) - 1).to(dtype)
                d_hidden[i : i + rows] = d_logits @ w
                d_weight += d_logits.mT @ h
        ctx.gradients = d_hidden, d_weight
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.gradients
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None, None, None
