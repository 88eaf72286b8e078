"""One step: the update of the weights as a function of tensors, and what it measured.

The host prepares and launches a step while the device still computes the one before. Before it launches a step it reads
the outcome of the last but one, which is over by then or nearly so. So the device always has work.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.objective import Measured, Objective, Work, differentiate, measured_names
from training.optimizer import SummedOptimizer
from training.processes.ranks import sum_tensor_over_ranks

DELAY = 2  # steps after which an outcome counts: for the curriculum, and as skipped


class Inputs(NamedTuple):
    """What a step needs.

    works: of the objectives that take part. rate: the learning rate. weights: of each objective. Both are 0-d float32.
    asked_to_stop: 0-d float64, 1 if this rank has had a signal.
    """

    works: dict[str, Work]
    rate: Tensor
    weights: dict[str, Tensor]
    asked_to_stop: Tensor

    def padded(self) -> "Inputs":
        """With targets padded, so that few shapes occur."""
        works = {
            name: work._replace(micro_batches=[m.padded() for m in work.micro_batches])
            for name, work in self.works.items()
        }
        return self._replace(works=works)


class Update:
    """Differentiates every objective at the same weights, then applies the sum of their updates.

    It calls nothing that waits for the device, so a CUDA graph can hold it.
    """

    def __init__(
        self, objectives: list[Objective], accelerator: Accelerator, scorer: nn.Module, optimizer: SummedOptimizer
    ):
        self.objectives, self.accelerator, self.scorer, self.optimizer = objectives, accelerator, scorer, optimizer

    def __call__(self, inputs: Inputs) -> Tensor:
        """Returns the figures of all objectives, in float64 on the device: see `Outcome`."""
        figures = [sum_tensor_over_ranks(inputs.asked_to_stop)[None]]
        for objective in self.objectives:
            if work := inputs.works.get(objective.name):
                sums = differentiate(objective, self.accelerator, self.scorer, work)
                norm = self.optimizer.take(objective.name, objective.max_grad_norm)
                figures += [sums, norm.to(sums)[None]]  # the norm of offloaded parameters is on the CPU
        measured = torch.cat(figures)
        self.optimizer.step(inputs.rate, inputs.weights, measured.isfinite().all())
        return measured


@dataclass
class Outcome:
    """What step number `step` (from 0) measured at the distances D. Its figures reach the host in the background."""

    step: int
    distances: dict[str, int]
    names: dict[str, list[tuple[str, str]]]  # by objective
    figures: Tensor
    copied: Any = field(default=None, repr=False)  # the event after the copy

    @staticmethod
    def of(step: int, distances: Mapping[str, int], objectives: list[Objective], figures: Tensor) -> "Outcome":
        """`figures`: of `Update`, for these objectives."""
        names = {o.name: measured_names(o) for o in objectives}
        outcome = Outcome(step, dict(distances), names, figures.to("cpu", non_blocking=True))
        if figures.is_cuda:
            outcome.copied = torch.cuda.Event()
            outcome.copied.record()
        return outcome

    @cached_property
    def values(self) -> list[float]:
        """The figures. Waits for the step if it is not over."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.figures.tolist()

    @property
    def asked_to_stop(self) -> bool:
        return self.values[0] > 0

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """By objective."""
        result, values = {}, iter(self.values[1:])
        for objective, names in self.names.items():
            result[objective] = measured = Measured({}, {}, {})
            for (what, name), value in zip(names, values, strict=False):
                if what == "grad_norm":
                    measured.grad_norm = value
                else:
                    getattr(measured, what)[name] = value
        return result

    @property
    def finite(self) -> bool:
        return all(measured.finite for measured in self.measured.values())

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        names = list(self.names.items())  # a checkpoint's JSON sorts the keys of a dictionary
        return {"step": self.step, "distances": self.distances, "names": names, "values": self.values}

    @staticmethod
    def load(saved: Mapping[str, Any]) -> "Outcome":
        names = {objective: [(what, name) for what, name in each] for objective, each in saved["names"]}
        known = [math.nan if value is None else value for value in saved["values"]]  # JSON has no NaN
        known[0] = 0.0  # the run that asked to stop has stopped
        return Outcome(saved["step"], saved["distances"], names, torch.tensor(known, dtype=torch.float64))
