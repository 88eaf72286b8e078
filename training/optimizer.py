"""AdamW or Muon with separate moments and gradient clipping for each objective; the updates are summed.

Recall gradients are 10 to 90 times larger than those of text. If the gradients were summed, recall alone would decide
the clipping and the second moment, and text would hardly be learned. With separate moments both updates have the same
scale:  parameter -= rate * sum_i weight_i * update_i,  where update_i is the direction for objective i.

Rates are tensors, and whether an update is skipped is decided on the device. So the host never waits for a step, and a
CUDA graph can replay it.

Muon (Jordan and others, 2024) orthogonalises the updates of the layers' matrices. They are scaled to the size of
AdamW's (Liu and others, 2025), so that one learning rate serves both. Embedding, head and norms keep AdamW.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.projections import fused_names
from training.muon import BatchedMuon
from training.processes.parallel import as_placed, local
from training.settings.schema import OptimizerSettings

Named = list[tuple[str, nn.Parameter]]


def decayed(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices; norms and embeddings are not decayed."""
    return parameter.ndim >= 2 and "embed_tokens" not in name


def orthogonalised(name: str, parameter: Tensor) -> bool:
    """Muon is for the matrices inside the layers."""
    return parameter.ndim == 2 and ".layers." in name


class SummedOptimizer:
    """One optimizer per objective over the same parameters.

    `take` moves an objective's gradients off the parameters after its backward pass. Once all objectives have been
    differentiated at the same weights, `step` updates them. Muon orthogonalises in `muon_dtype`, and each projection of
    a parameter alone: `row_sizes` are the rows of each.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        objectives: Iterable[str],
        s: OptimizerSettings,
        muon_dtype: torch.dtype = torch.bfloat16,
        row_sizes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        named = [(n, p) for n, p in parameters if p.requires_grad]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.weight_decay, self.decayed = s.weight_decay, [p for n, p in named if decayed(n, p)]
        self.optimizers = {name: _optimizers(named, s, muon_dtype, row_sizes or {}) for name in objectives}
        self._gradients: dict[str, list[Tensor | None]] = {}

    def take(self, objective: str, max_norm: float) -> Tensor:
        """Move the gradients aside, clipped to `max_norm`; returns their norm before clipping (a 0-d tensor)."""
        self._gradients[objective] = [p.grad for p in self.parameters]
        present = [g for g in self._gradients[objective] if g is not None]
        norm = nn.utils.get_total_norm(present)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch._foreach_mul_([local(g) for g in present], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        for p in self.parameters:
            p.grad = None
        return norm

    @torch.no_grad()
    def step(self, rate: Tensor, weights: Mapping[str, Tensor], finite: Tensor) -> None:
        """Apply the gradients taken so far, and decay the weights once, whatever the number of objectives.

        `rate` and `weights` are 0-d. If `finite`, a 0-d bool, is false, neither weights nor moments change. All three
        may be on the device: nothing is read back, unless the parameters are offloaded to the CPU.
        """
        device = self.parameters[0].device
        rate, skipped = rate.to(device), 1.0 - finite.to(device, rate.dtype)
        if self.weight_decay and self._gradients:
            torch._foreach_mul_([local(p) for p in self.decayed], 1.0 - rate * self.weight_decay * (1.0 - skipped))
        for name, gradients in self._gradients.items():
            for p, g in zip(self.parameters, gradients, strict=True):
                p.grad = g
            for optimizer in self.optimizers[name]:
                # As torch's gradient scaler does: 1 leaves weights and moments alone.
                optimizer.found_inf = skipped  # type: ignore[attr-defined]
                for group in optimizer.param_groups:
                    group["lr"] = rate * weights[name].to(device)
                optimizer.step()
        for p in self.parameters:
            p.grad = None
        self._gradients.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """All moments, named `objective/moment/parameter`."""
        return {
            f"{objective}/{moment}/{name}": tensor
            for objective, optimizers in self.optimizers.items()
            for optimizer in optimizers
            for name, p in zip(self.names, self.parameters, strict=True)
            for moment, tensor in optimizer.state.get(p, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The moments of `state_tensors`. Those of the first version have one name for each projection."""
        saved: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in fused_names(tensors).items():
            if key.count("/") == 2:
                objective, moment, name = key.split("/")
                saved[objective, name][moment] = tensor
        for objective, optimizers in self.optimizers.items():
            for optimizer in optimizers:
                mine = {p for group in optimizer.param_groups for p in group["params"]}
                for name, p in zip(self.names, self.parameters, strict=True):
                    if p in mine and (state := saved.get((objective, name))):
                        optimizer.state[p] = {
                            moment: as_placed(t, p) if t.ndim else t.to(p.device) for moment, t in state.items()
                        }


def _optimizers(
    named: Named, s: OptimizerSettings, muon_dtype: torch.dtype, row_sizes: Mapping[str, tuple[int, ...]]
) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the layers' matrices and AdamW over the rest."""
    muon = [p for n, p in named if s.kind == "muon" and orthogonalised(n, p)]
    rest = [p for n, p in named if s.kind != "muon" or not orthogonalised(n, p)]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        on_gpu = rest[0].device.type == "cuda"
        optimizers.append(
            torch.optim.AdamW(
                rest, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=0.0, fused=True, capturable=on_gpu
            )
        )
    if muon:
        sizes: dict[Tensor, tuple[int, ...]] = {p: row_sizes[n] for n, p in named if n in row_sizes}
        optimizers.append(BatchedMuon(muon, muon_dtype, sizes))
    return optimizers
