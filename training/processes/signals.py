"""How a run ends. SIGTERM and SIGINT: the first asks to checkpoint and stop, the second leaves at once."""

import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

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


def end_process(code: int) -> NoReturn:
    """Leave with `code`, and as one process of several without tearing anything down; all that lasts is written.

    A worker thread of gloo gives back the tensors of its last exchange once it gets Python's lock. An interpreter that
    ends never gives it that, and the process aborts (`terminate called without an active exception`, signal 6); a
    process group that is destroyed before may wait for that thread with the lock in hand, for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
