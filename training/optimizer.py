"""AdamW with its own moments and its own gradient clipping for each objective; the updates are summed.

Recall gradients are 10 to 90 times larger than those of text. Were they added first, recall alone would rule the
clipping and the second moment, and text would hardly be learned. With moments of their own, the two updates meet at
equal scale:  parameter -= rate * sum_i weight_i * adam_i,  where adam_i is Adam's direction for objective i.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.settings import OptimizerSettings


def decayed(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices; norms and embeddings are not decayed."""
    return parameter.ndim >= 2 and "embed_tokens" not in name


class SummedAdamW:
    """One `torch.optim.AdamW` per objective over the same parameters.

    Gradients of an objective are taken off the parameters after its backward pass (`take`); all objectives are
    differentiated at the same weights before any update (`step`).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], objectives: Iterable[str], s: OptimizerSettings):
        named = [(n, p) for n, p in parameters if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.weight_decay = s.weight_decay
        self.adams = {name: self._adam(named, s) for name in objectives}
        self._gradients: dict[str, list[Tensor | None]] = {}

    def _adam(self, named: list[tuple[str, nn.Parameter]], s: OptimizerSettings) -> torch.optim.AdamW:
        groups = [
            {"params": [p for n, p in named if decayed(n, p)], "decays": True},
            {"params": [p for n, p in named if not decayed(n, p)], "decays": False},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=s.lr,
            betas=(s.beta1, s.beta2),
            eps=s.eps,
            weight_decay=0.0,
            fused=True,
        )

    def take(self, objective: str, max_norm: float) -> Tensor:
        """Move the gradients aside, clipped to `max_norm`; returns their norm before clipping (a 0-d tensor)."""
        self._gradients[objective] = [p.grad for p in self.parameters]
        present = [g for g in self._gradients[objective] if g is not None]
        norm = nn.utils.get_total_norm(present)
        torch._foreach_mul_(present, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        for p in self.parameters:
            p.grad = None
        return norm

    def drop(self) -> None:
        """Forget the gradients of this step."""
        self._gradients.clear()

    def step(self, rate: float, weights: Mapping[str, float]) -> None:
        """Apply the gradients taken so far. Decay is shared out by weight: it does not depend on their number."""
        total = sum(weights[name] for name in self._gradients) or 1.0
        for name, gradients in self._gradients.items():
            adam = self.adams[name]
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
            for group in adam.param_groups:
                group["lr"] = rate * weights[name]
                group["weight_decay"] = self.weight_decay / total if group["decays"] else 0.0
            adam.step()
        for p in self.parameters:
            p.grad = None
        self.drop()

    def state_tensors(self) -> dict[str, Tensor]:
        """All moments, named `objective/moment/parameter`."""
        return {
            f"{objective}/{moment}/{name}": tensor
            for objective, adam in self.adams.items()
            for name, p in zip(self.names, self.parameters, strict=True)
            for moment, tensor in adam.state.get(p, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for objective, adam in self.adams.items():
            for name, p in zip(self.names, self.parameters, strict=True):
                state: dict[str, Any] = {
                    moment: tensors[key].to(p.device)
                    for moment in ("step", "exp_avg", "exp_avg_sq")
                    if (key := f"{objective}/{moment}/{name}") in tensors
                }
                if state:
                    adam.state[p] = state
