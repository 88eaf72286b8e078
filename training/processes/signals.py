"""How a run ends. The first signal asks for a checkpoint and a stop, the second leaves at once.

Before the first step of a start there is nothing to save, so there the first signal leaves at once too.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPED = 75  # exit code: stopped by a signal, run again to go on
ECHO_SECONDS = 2.0  # a signal that comes twice may be one: see StopRequest._is_echo
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SIGUSR1: a batch system's early warning
PR_SET_PDEATHSIG = 1  # of prctl(2)


class TrainingFault(Exception):
    """Training can't go on, through no mistake in the user's input; the message says what happened."""


class StopRequest:
    """True once a signal has come. Until `training` is set a signal ends the process at once, with code 75."""

    def __init__(self) -> None:
        self.training, self.received_at = False, -1.0
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        handle_signals(self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self:
            if self._is_echo(number):
                return
            os._exit(128 + number)
        self.received_at = time.monotonic()
        for stream in self.terminals if number == signal.SIGHUP else ():  # the terminal is gone: a write would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not self.training:
            say_signal(number, "stopped before the first step; run the same command again to go on")
            os._exit(STOPPED)
        say_signal(number, "finishing this step, then a checkpoint; again to leave at once")

    def _is_echo(self, number: int) -> bool:
        """Whether a signal repeats the one before instead of asking again.

        A launcher in the same process group passes on the signal that its processes already have. And Linux sends the
        signal of `end_with_parent` once for each thread of the parent that ends, so a killed parent sends several.
        """
        sent_by_system = number == signal.SIGTERM or "TORCHELASTIC_RUN_ID" in os.environ
        return sent_by_system and time.monotonic() - self.received_at < ECHO_SECONDS

    def __bool__(self) -> bool:
        return self.received_at >= 0


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler` for every signal that asks a program to end; not for SIGHUP if `nohup` ignores it."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def say_signal(number: int, text: str) -> None:
    """Print inside a signal handler, where `print` fails if the signal has interrupted a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())


def end_with_parent() -> None:
    """Ask the system for a SIGTERM when the process that started this one ends, also by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_launcher() -> None:
    """`end_with_parent`, for a process that a launcher has started. Leaves at once if the launcher has ended already.

    The first process of the machine has then become the parent. In a container that may be the launcher itself, which
    runs Python.
    """
    end_with_parent()
    if sys.platform == "linux" and os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
        print("stopped: the launcher of this process has ended; run the same command again", file=sys.stderr)
        sys.exit(STOPPED)


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
