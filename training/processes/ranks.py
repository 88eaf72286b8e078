"""Processes that must agree: only the main one decides, and a user's mistake that it meets ends all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from torch import Tensor

from model.errors import UserError
from training.processes.signals import TrainingFault

Answer = TypeVar("Answer")
Name = TypeVar("Name")


PREPARING, TRAINING = timedelta(days=1), timedelta(minutes=30)  # the longest that one process waits for another


def join_ranks() -> PartialState:
    """This process among those launched; on the CPU without a GPU, or where the launch file says `use_cpu: true`.

    Without `cpu=True` accelerate forms no process group on a CPU, and every process believes it is rank 0.
    The others wait until the main process has tokenised the text, which may take hours.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=PREPARING)


def shorten_timeout() -> None:
    """From now on a process that waits for `TRAINING` is taken for lost. PyTorch has no public call for it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(TRAINING, torch.distributed.group.WORLD)


@contextmanager
def lost_rank_is_fault() -> Iterator[None]:
    """Raises TrainingFault for the transport's error when another process has died. gloo's is a bare RuntimeError."""
    try:
        yield
    except RuntimeError as problem:
        if not (isinstance(problem, torch.distributed.DistError) or "gloo" in str(problem).lower()):
            raise
        what = f"another process of this run has ended, so this one ends too: {str(problem).splitlines()[0]}"
        remedy = "its own message says why; the same command goes on from the last checkpoint"
        raise TrainingFault(f"{what}\n  {remedy}") from problem


def ask_main(call: Callable[[], Answer]) -> Answer:
    """Run `call` on the main process; every process gets its answer, or its `UserError`."""
    outcome: list[Any] = [None, None]  # the answer, the text of the error
    if PartialState().is_main_process:
        try:
            outcome[0] = call()
        except UserError as problem:
            outcome[1] = str(problem)
    answer, problem_text = broadcast_object_list(outcome)
    if problem_text is not None:
        raise UserError(problem_text)
    return answer


def sum_over_ranks(values: dict[Name, float]) -> dict[Name, float]:
    """Each value summed over all processes, which must call this with the same names in the same order."""
    summed = torch.tensor(list(values.values()), dtype=torch.float64, device=PartialState().device)
    return dict(zip(values, sum_tensor_over_ranks(summed).tolist(), strict=True))


def sum_tensor_over_ranks(values: Tensor) -> Tensor:
    """The same for a tensor on this process's device. The host does not wait for a GPU."""
    return values if PartialState().num_processes == 1 else reduce(values, "sum")
