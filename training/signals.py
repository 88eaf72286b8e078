"""How a run ends early: by a fault, with another process, or by SIGTERM and SIGINT.

The first signal asks to checkpoint and stop, the second leaves at once.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed

STOPPED = 75  # exit code: stopped by a signal after a checkpoint, run again to go on
ECHO_SECONDS = 2.0  # a launcher in the same process group hands on the signal that its processes already have


class TrainingFault(Exception):
    """Training can't go on, through no mistake in the user's input; the message says what happened."""


class StopRequest:
    """Truthy once a signal has come."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.at = 0.0
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if self.launched and time.monotonic() - self.at < ECHO_SECONDS:
                return
            os._exit(128 + number)
        self.received, self.at = number, time.monotonic()
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step, then a checkpoint; again to leave at once", file=sys.stderr, flush=True)

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def lost_rank_is_a_fault() -> Iterator[None]:
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
