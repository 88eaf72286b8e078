"""Context parallelism: `training.context_parallel` processes share each row, and groups of them share the rows.

With four processes and `context_parallel: 2`, processes 0 and 1 train on the first half of the rows. Process 0 has the
first half of each of them, process 1 the second half. Each process makes whole rows of token ids and cuts its part out,
so batches stay pure functions of (seed, step, row). Losses and gradients are summed over all processes as ever.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh

from model.errors import UserError
from model.packing import Packing, bounds_of_parts, cut

if TYPE_CHECKING:
    from training.objective import MicroBatch, Target


@dataclass(frozen=True)
class Layout:
    """This process is part `index` of `parts` that share each row, in group `rank` of `ranks` that share the rows."""

    rank: int
    ranks: int
    index: int = 0
    parts: int = 1
    group: Any = None

    @staticmethod
    def of(processes: PartialState, parts: int) -> "Layout":
        """All processes call it. Raises UserError for a number of processes that is not a multiple of `parts`."""
        n, number = processes.num_processes, processes.process_index
        if parts == 1:
            return Layout(number, n)
        if n % parts:
            raise UserError(
                f"training.context_parallel is {parts}, and this run has {n} process{'es' * (n > 1)}; "
                f"start it with a multiple of {parts}, or change the setting"
            )
        mesh = init_device_mesh(processes.device.type, (n // parts, parts), mesh_dim_names=("data", "context"))
        group = mesh.get_group("context")
        # NCCL connects a group at its first exchange, which all must join. Later a part may have nothing to exchange.
        torch.distributed.all_reduce(torch.zeros(1, device=processes.device), group=group)
        return Layout(number // parts, n // parts, number % parts, parts, group)

    def own(self, tokens: int) -> slice:
        """This part of rows of `tokens` tokens."""
        bounds = bounds_of_parts(tokens, self.parts)
        return slice(bounds[self.index], bounds[self.index + 1])

    def packing(self, row: Packing) -> Packing:
        """The packing of this part of rows, which are on the CPU."""
        return row if self.parts == 1 else cut(row, self.parts, self.index, self.group)

    def cut(self, batch: "MicroBatch") -> "MicroBatch":
        """This part of whole rows, with the targets in it. A label may be the first token of the next part."""
        if self.parts == 1:
            return batch
        b, t = batch.input_ids.shape
        own = self.own(t)
        targets = {term: _cut_target(target, (b, t), own) for term, target in batch.targets.items()}
        return type(batch)(batch.input_ids[:, own], self.packing(batch.packing), targets)


ALONE = Layout(rank=0, ranks=1)


def _cut_target(target: "Target", shape: tuple[int, int], own: slice) -> "Target":
    """The targets in the columns `own` of rows of shape (B, T). An index may run through several layers of rows."""
    row, column = target.index // shape[1], target.index % shape[1]
    inside = (column >= own.start) & (column < own.stop)
    index = row * (own.stop - own.start) + column - own.start
    groups = None if target.groups is None else target.groups[inside]
    return type(target)(index[inside], target.labels[inside], groups)
