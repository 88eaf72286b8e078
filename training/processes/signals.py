"""How a run ends. The first signal asks for a checkpoint and a stop, the second leaves at once."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

STOPPED = 75  # exit code: stopped by a signal after a checkpoint, run again to go on
ECHO_SECONDS = 2.0  # a launcher in the same process group passes on the signal that its processes already have
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SIGUSR1: a batch system's early warning


class TrainingFault(Exception):
    """Training can't go on, through no mistake in the user's input; the message says what happened."""


class StopRequest:
    """True once a signal has come."""

    def __init__(self) -> None:
        self.received_at: float | None = None
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received_at is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.received_at < ECHO_SECONDS:
                return
            os._exit(128 + number)
        self.received_at = time.monotonic()
        for stream in self.terminals if number == signal.SIGHUP else ():  # the terminal is gone: a write would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # os.write, because `print` fails inside a handler that interrupts a print
            os.write(2, f"\n{name}: finishing this step, then a checkpoint; again to leave at once\n".encode())

    def __bool__(self) -> bool:
        return self.received_at is not None


def end_process(code: int) -> NoReturn:
    """Leave with `code`. One process of several leaves without any cleanup; all files are written by then.

    A worker thread of gloo needs Python's lock to release the tensors of its last exchange. An ending interpreter never
    gives it the lock, and the process aborts (`terminate called without an active exception`, signal 6). Destroying the
    process group first may wait for that thread, with the lock held, for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
