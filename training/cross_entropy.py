"""The cross-entropy of the output matrix. Where positions are many, their logits are computed in chunks.

Legend: N scored positions, E hidden size, F hidden size of the teacher, V vocabulary.
The z-loss (Chowdhery and others, PaLM, 2022) adds weight x log(Z)^2 per token, where Z is the softmax's normaliser.
It keeps the logits from drifting. Distillation (Hinton and others, 2015) adds weight x t^2 x KL(teacher || model) per
token, where t divides both logits. Both change the gradient only: the loss returned is plain cross-entropy.
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


class Lesson(NamedTuple):
    """What a teacher says at the scored positions: `hidden_nf @ weight_vf.T`. `weight`, `temperature`: see above."""

    hidden_nf: Tensor
    weight_vf: Tensor
    weight: float = 1.0
    temperature: float = 1.0


def cross_entropy(
    hidden_ne: Tensor, weight_ve: Tensor, labels_n: Tensor, z_weight: float = 0.0, rows: int | None = None
) -> Score:
    """The score of `labels_n` under `hidden_ne @ weight_ve.T`. Negative labels are not scored.

    `rows` positions are computed at a time; default: as many as make `LOGITS_AT_ONCE` logits.
    """
    rows = rows or _rows_at_once(hidden_ne, len(weight_ve))
    if len(hidden_ne) > rows:
        if torch.is_grad_enabled():
            return Score(*_Chunks.apply(hidden_ne, weight_ve, labels_n, z_weight, rows, product_dtype(hidden_ne), None))
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


def distillation(
    hidden_ne: Tensor, weight_ve: Tensor, labels_n: Tensor, lesson: Lesson, z_weight: float = 0.0,
    rows: int | None = None,
) -> tuple[Score, Score]:  # fmt: skip
    """`cross_entropy` with the gradient of the distillation, and the score of the distillation alone.

    The latter has the divergence as its loss, without a gradient. A position is right in it where model and teacher
    have the same most likely token.
    """
    rows = rows or max(1, _rows_at_once(hidden_ne, len(weight_ve)) // 2)  # there are two logits for each
    outputs = _Chunks.apply(hidden_ne, weight_ve, labels_n, z_weight, rows, product_dtype(hidden_ne), lesson)
    loss, right, losses, divergences, agreed = outputs
    return Score(loss, right, losses), Score(divergences.sum(), agreed, divergences)


def _rows_at_once(hidden: Tensor, vocabulary: int) -> int:
    return max(1, LOGITS_AT_ONCE * (GPU_FACTOR if hidden.is_cuda else 1) // vocabulary)


class _Chunks(torch.autograd.Function):
    """Computes the gradient together with the loss, while the chunk's logits exist, so nothing is computed twice.

    The backward pass only multiplies it by the incoming gradient, which is one number.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_weight: float, rows: int, dtype: torch.dtype,
        lesson: Lesson | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n, d_hidden = len(hidden), torch.empty_like(hidden)  # n is 0 where part of a conversation holds no answer
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # a frozen matrix needs none
        figures, differentiate, rows = [], _differentiate_on(hidden.device.type), _equal_rows(max(1, n), rows)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            taught = None if lesson is None else lesson._replace(weight_vf=lesson.weight_vf.to(dtype))
            for i in range(0, max(1, n), rows):
                h, wanted = _padded(hidden[i : i + rows].to(dtype), rows), _padded(labels[i : i + rows], rows, -1)
                hint = None
                if taught is not None:
                    theirs = _padded(taught.hidden_nf[i : i + rows].to(dtype), rows) @ taught.weight_vf.mT
                    hint = Hint(theirs, taught.weight, taught.temperature)
                d_logits, *of_chunk = differentiate(h @ w.mT, wanted[:, None], z_weight, hint)
                d_hidden[i : i + rows] = (d_logits @ w)[: n - i]
                if d_weight is not None:
                    d_weight += d_logits.mT @ h
                figures.append(of_chunk)
        losses, right, *others = (torch.cat(parts)[:n] for parts in zip(*figures, strict=True))
        ctx.gradients = d_hidden, d_weight
        ctx.mark_non_differentiable(right, losses, *others)
        return losses.sum(), right, losses, *others

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None  # the graph outlives them
        d_weight = None if d_weight is None else d_weight.mul_(d_loss)
        return d_hidden.mul_(d_loss), d_weight, None, None, None, None, None


def _padded(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """With as many more rows as are missing."""
    missing = rows - len(x)
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing), value=value) if missing else x


def _equal_rows(n: int, most: int) -> int:
    """Rows of each chunk of `n` positions. Nearly as many positions give the same, so that few shapes are compiled.

    >>> [_equal_rows(n, most=8388) for n in (16_384, 16_300, 9_000)]
    [8192, 8192, 4608]
    """
    share = -(-n // -(-n // most))
    return min(most, -(-share // ROUNDED_TO) * ROUNDED_TO)


@cache
def _differentiate_on(device_type: str) -> Callable[[Tensor, Tensor, float, "Hint | None"], tuple[Tensor, ...]]:
    """On a GPU with Triton its dozen passes over the logits become two or three kernels."""
    fuse = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    return torch.compile(_differentiate, dynamic=False) if fuse else _differentiate


class Hint(NamedTuple):
    """The teacher's logits (N, V) of a chunk, and the weight and temperature of the distillation."""

    logits: Tensor
    weight: float
    temperature: float


def _differentiate(logits_nv: Tensor, labels_n1: Tensor, z_weight: float, hint: Hint | None) -> tuple[Tensor, ...]:
    """The gradient of the logits in their dtype, the losses (N,), and which labels were the most likely (N,).

    With a hint also the divergence from the teacher (N,), and where both have the same most likely token (N,).
    """
    dtype, logits = logits_nv.dtype, logits_nv.float()
    scored, wanted = labels_n1 >= 0, labels_n1.clamp_min(0)
    best = logits.argmax(-1, keepdim=True)
    d_divergence: Tensor | None = None
    taught: tuple[Tensor, ...] = ()
    if hint is not None:
        d_divergence, divergences = _diverge(logits, hint)
        agreed = hint.logits.argmax(-1, keepdim=True) == best
        taught = (divergences * scored)[:, 0], (agreed & scored)[:, 0]
    normaliser = logits.logsumexp(-1, keepdim=True)
    losses = ((normaliser - logits.gather(1, wanted)) * scored)[:, 0]
    d_logits = logits.sub_(normaliser).exp_()  # in place, because logits are large
    if z_weight:
        d_logits.mul_(1 + 2 * z_weight * normaliser)
    d_logits = d_logits.scatter_(1, wanted, d_logits.gather(1, wanted) - 1)
    if d_divergence is not None:
        d_logits.add_(d_divergence)
    return d_logits.mul_(scored).to(dtype), losses, (best == labels_n1)[:, 0], *taught


def _diverge(logits: Tensor, hint: Hint) -> tuple[Tensor, Tensor]:
    """The gradient of weight x t^2 x KL(teacher || model), and the divergences (N, 1) without the weight."""
    t = hint.temperature
    ours, theirs = (logits / t).log_softmax(-1), (hint.logits.float() / t).log_softmax(-1)
    likely = theirs.exp()
    divergences = t**2 * (likely * (theirs - ours)).sum(-1, keepdim=True)
    return ours.exp_().sub_(likely).mul_(hint.weight * t), divergences
