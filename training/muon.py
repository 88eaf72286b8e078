"""Muon for many small matrices: those of one shape are orthogonalised as one batch.

A weight that holds several projections (`model.projections`) is orthogonalised projection by projection.

The update is that of `torch.optim.Muon`, with its constants, scaled to the size of AdamW's (Liu and others, 2025).
Matrix by matrix, the twenty or so calls for each of the quickstart's 224 matrices would take a third of a step.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.processes.parallel import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen by Jordan and others (2024) for the slope at zero
ITERATIONS = 5
MOMENTUM = 0.95
EPS = 1e-7


class BatchedMuon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in `dtype`; every parameter is a matrix. It does not decay weights.

    row_sizes: for a parameter that holds several projections, the rows of each. `group["lr"]` is a 0-d tensor. If
    `found_inf` is 1, neither weights nor momenta change.
    """

    def __init__(self, params: Iterable[Tensor], dtype: torch.dtype, row_sizes: dict[Tensor, tuple[int, ...]]):
        super().__init__(params, {"lr": 0.0})
        self.dtype, self.row_sizes = dtype, row_sizes
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)  # width and rows of each projection
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape[1], *self.row_sizes.get(p, (p.shape[0],))].append(p)
        applied = 1.0 - self.found_inf
        for (_, *rows), params in alike.items():
            grads = torch.stack([local(p.grad) for p in params if p.grad is not None])
            grads.masked_fill_(self.found_inf > 0, 0.0)  # a gradient that is not finite times 0 is not 0
            momenta = [local(self._momentum(p)) for p in params]
            torch._foreach_mul_(momenta, 1.0 - (1.0 - MOMENTUM) * applied)
            torch._foreach_add_(momenta, list((grads * (1.0 - MOMENTUM)).unbind()))
            updates = grads.lerp_(torch.stack(momenta), MOMENTUM).to(self.dtype)
            step = _orthogonal(updates, params[0], rows) * (-group["lr"] * applied)
            torch._foreach_add_([local(p) for p in params], list(step.unbind()))

    def _momentum(self, p: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _orthogonal(updates: Tensor, like: Tensor, row_sizes: list[int]) -> Tensor:
    """`scaled_parts` for updates of parameters that are sharded as `like` is; the ranks share the work."""
    if not isinstance(like, DTensor):
        return _shared_out(updates, row_sizes)
    return _from_rows(updates, row_sizes, like.device_mesh.get_group())


def _from_rows(rows: Tensor, row_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """`scaled_parts` of N matrices that are sharded by rows: (N, own rows, B) in, the same rows out.

    Each rank receives N / ranks whole matrices and sends their rows back, so none ever holds more than its share.
    """
    ranks, (n, own, width), height = dist.get_world_size(group), rows.shape, sum(row_sizes)
    share, most = -(-n // ranks), -(-height // ranks)  # matrices and rows per rank; the last has fewer
    sent = F.pad(rows, (0, 0, 0, most - own, 0, share * ranks - n))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    matrices = got.view(ranks, share, most, width).transpose(0, 1).reshape(share, ranks * most, width)
    done = F.pad(scaled_parts(matrices[:, :height], row_sizes), (0, 0, 0, ranks * most - height))
    back = done.view(share, ranks, most, width).transpose(0, 1).contiguous()
    got = torch.empty_like(back)
    dist.all_to_all_single(got, back, group=group)
    return got.view(ranks * share, most, width)[:n, :own]


def _shared_out(matrices: Tensor, row_sizes: list[int]) -> Tensor:
    """`scaled_parts`, each rank a share of the matrices. Ranks have the same gradients, so none repeats work."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    share = -(-len(matrices) // ranks)
    if ranks == 1 or len(matrices) < ranks:
        return scaled_parts(matrices, row_sizes)
    mine = matrices[dist.get_rank() * share :][:share]
    done = mine.new_zeros(share, *matrices.shape[1:], dtype=torch.float32)
    done[: len(mine)] = scaled_parts(mine, row_sizes)
    gathered = done.new_empty(ranks * share, *matrices.shape[1:])
    dist.all_gather_into_tensor(gathered, done)
    return gathered[: len(matrices)]


def scaled_parts(matrices: Tensor, row_sizes: list[int]) -> Tensor:
    """Matrices (N, A, B) whose projections are each orthogonalised and scaled to the size of AdamW's updates."""
    parts = [orthogonalise(part).float() * 0.2 * max(part.shape[1:]) ** 0.5 for part in matrices.split(row_sizes, 1)]
    return torch.cat(parts, 1)


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, A, B) -> the nearest semi-orthogonal matrices, roughly: singular values between .7 and 1.2.

    Newton-Schulz iteration on the shorter side. bfloat16 is exact enough for it.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
