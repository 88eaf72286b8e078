"""Several processes that must agree: only the main one decides, a user's mistake found there ends all of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from model.errors import UserError
from training.processes.signals import TrainingFault

Answer = TypeVar("Answer")


def join_ranks() -> PartialState:
    """This process among those launched. Untold that it is on the CPU, accelerate lets each believe it is alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def local_processes() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))


@contextmanager
def lost_rank_is_fault() -> Iterator[None]:
    """When another process has died, what waits for it fails in the transport: `TrainingFault` says so."""
    try:
        yield
    except RuntimeError as problem:
        if not _of_transport(problem):
            raise
        raise TrainingFault(
            f"another process of this run has ended, so this one ends too: {str(problem).splitlines()[0]}\n"
            "  its own message says why; the same command goes on from the last checkpoint"
        ) from problem


def _of_transport(problem: RuntimeError) -> bool:
    """gloo raises bare `RuntimeError`s that name it."""
    return isinstance(problem, torch.distributed.DistError) or "gloo" in str(problem).lower()


def ask_main(call: Callable[[], Answer]) -> Answer:
    """Run `call` on the main process; every process gets its answer, or its `UserError`."""
    outcome: list[tuple[Answer | None, str | None]] = [(None, None)]
    if PartialState().is_main_process:
        try:
            outcome = [(call(), None)]
        except UserError as problem:
            outcome = [(None, str(problem))]
    answer, problem_text = broadcast_object_list(outcome)[0]
    if problem_text is not None:
        raise UserError(problem_text)
    return answer


def sum_over_ranks(values: list[float]) -> list[float]:
    """Elementwise sum of small figures."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    return reduce(torch.tensor(values, dtype=torch.float64, device=state.device), "sum").tolist()


def gather_from_ranks(value: Answer) -> list[Answer]:
    return gather_object([value])
