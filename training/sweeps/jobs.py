"""The runs of a sweep in processes of their own: so many at a time, each on its own cores or its own GPU.

What is done is written into the run's folder as `sweep.json`, stage by stage: the same command goes on there. A signal
is handed to the processes at work, which write a checkpoint; a second one kills them.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from training.processes.signals import STOPPED
from training.run.checkpoint import write_json
from training.sweeps.grid import Evaluations, Run

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, INTERRUPTED, WAITING = "done", "failed", "stopped", "waiting"


@dataclass(frozen=True)
class Slot:
    """Where one process at a time runs. cores: empty where they can't be pinned; device: of CUDA_VISIBLE_DEVICES."""

    cores: frozenset[int]
    device: str | None = None

    def environment(self) -> dict[str, str]:
        found = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_given("PYTHONPATH")])}
        if self.cores:
            found["OMP_NUM_THREADS"] = str(len(self.cores))
        if self.device is not None:
            found["CUDA_VISIBLE_DEVICES"] = self.device
        return found


def slots(jobs: int, devices: Sequence[str]) -> list[Slot]:
    """Cores are dealt out evenly; where there are GPUs, one to each.

    >>> [len(slot.cores) for slot in slots(1, [])] == [len(_cores())]
    True
    """
    cores = _cores()
    share = max(1, len(cores) // jobs)
    dealt = [frozenset(cores[i * share : (i + 1) * share] or cores) if cores else frozenset() for i in range(jobs)]
    return [Slot(own, devices[i % len(devices)] if devices else None) for i, own in enumerate(dealt)]


@dataclass
class Outcome:
    """How a run ended; `code` and `stage` are those of the process that did not end well."""

    run: Run
    state: str = WAITING
    stage: str = ""
    code: int = 0


@dataclass
class Jobs:
    """Works through the runs; `tell` is called with each run as its state changes."""

    evaluate: Evaluations
    tell: Callable[[Outcome], None]
    stopping: bool = False
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, runs: Sequence[Run], places: Sequence[Slot]) -> list[Outcome]:
        """Outcomes in the order of the runs. Takes SIGINT and SIGTERM while it works."""
        outcomes = [Outcome(run) for run in runs]
        waiting: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        for outcome in outcomes:
            waiting.put(outcome)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            threads = [threading.Thread(target=self._take, args=(waiting, slot)) for slot in places]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # a join without a limit would hold signals back
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return outcomes

    def _take(self, waiting: "queue.SimpleQueue[Outcome]", slot: Slot) -> None:
        if slot.cores:
            os.sched_setaffinity(0, slot.cores)  # of this thread; processes that it starts inherit it
        while not self.stopping:
            try:
                outcome = waiting.get_nowait()
            except queue.Empty:
                return
            self._one(outcome, slot)
            self.tell(outcome)

    def _one(self, outcome: Outcome, slot: Slot) -> None:
        """All stages of a run that are not done yet."""
        run = outcome.run
        run.folder.mkdir(parents=True, exist_ok=True)
        for stage, command in stages(run, self.evaluate):
            if stage in finished_stages(run, self.evaluate):
                continue
            outcome.stage = stage
            outcome.code = self._call(command, run.folder / f"{stage}.log", slot)
            if outcome.code:
                outcome.state = INTERRUPTED if self.stopping or outcome.code == STOPPED else FAILED
                return
            note_finished(run, stage, command)
        outcome.state = DONE

    def _call(self, command: list[str], log: Path, slot: Slot) -> int:
        """The exit code; what the process says goes to `log`. A session of its own: a terminal's Ctrl-C is ours."""
        with log.open("ab") as sink, self._lock:
            if self.stopping:
                return STOPPED
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=slot.environment(),
                start_new_session=True,
            )
            self._children.add(child)
        code = child.wait()
        self._children.discard(child)
        _end_group(child.pid, signal.SIGKILL)  # helpers that it left behind
        return code

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        """The first signal asks, the second kills."""
        again = self.stopping
        if not again:
            name = signal.Signals(number).name
            print(f"\n{name}: waiting for the runs at work to write a checkpoint; again to kill them", file=sys.stderr)
        self.stopping = True
        for child in list(self._children):
            if again:
                _end_group(child.pid, signal.SIGKILL)
            else:
                child.terminate()  # itself alone: it may still need its helpers


# -- stages -----------------------------------------------------------------------------------------------------------


def stages(run: Run, evaluate: Evaluations) -> list[tuple[str, list[str]]]:
    """(name, command) of what a run consists of."""
    train = [sys.executable, str(ROOT / "train.py"), str(run.config), *run.overrides]
    measured = [
        (name, [sys.executable, "-m", f"eval.{name}", str(run.folder), *options])
        for name, options in evaluate.commands()
    ]
    return [("train", train), *measured]


def finished_stages(run: Run, evaluate: Evaluations) -> set[str]:
    """Stages done before by the same command; one that was asked otherwise, and all after training, are done anew."""
    noted = _noted(run)
    done = {stage for stage, command in stages(run, evaluate) if noted.get(stage) == _words(command)}
    return done if "train" in done else set()


def note_finished(run: Run, stage: str, command: list[str]) -> None:
    kept = {} if stage == "train" else _noted(run)
    write_json(run.folder / "sweep.json", kept | {stage: _words(command)})


def is_finished(run: Run, evaluate: Evaluations) -> bool:
    return finished_stages(run, evaluate) == {stage for stage, _ in stages(run, evaluate)}


def last_words(run: Run, stage: str, lines: int = 20) -> str:
    """The end of a stage's log."""
    log = run.folder / f"{stage}.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def _noted(run: Run) -> dict[str, Any]:
    path = run.folder / "sweep.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _words(command: list[str]) -> list[str]:
    """Without the interpreter, which may be another one tomorrow."""
    return command[1:]


def _end_group(leader: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _given(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []
