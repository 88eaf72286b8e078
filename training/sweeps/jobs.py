"""Runs a sweep's runs as processes: several at a time, each on its own cores or its own GPU.

Each finished stage (training, then each evaluation) is noted in the run's folder, in `sweep.json`, with its command.
Started again, a sweep skips these stages. A signal is passed to the running processes, which write a checkpoint; a
second signal kills them.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.flops import count_parameters
from model.windows import reach
from training.planning.dry_run import text_table, vocab_size
from training.planning.formulas import work
from training.processes.signals import STOPPED
from training.run.checkpoint import write_json
from training.settings.build import model_config
from training.settings.consistency import last_distance
from training.settings.schema import Settings
from training.sweeps.grid import Evaluations, Run, Sweep

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, INTERRUPTED, WAITING = "done", "failed", "stopped", "waiting"


@dataclass
class Outcome:
    """The state of a run; `stage` and `code` are those of the last process that failed or was stopped."""

    run: Run
    state: str = WAITING
    stage: str = ""
    code: int = 0


@dataclass(frozen=True)
class Slot:
    """Where one process runs at a time. cores: empty if they can't be pinned; device: for CUDA_VISIBLE_DEVICES."""

    cores: frozenset[int]
    device: str | None = None

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        threads = {"OMP_NUM_THREADS": str(len(self.cores))} if self.cores else {}
        gpu = {"CUDA_VISIBLE_DEVICES": self.device} if self.device is not None else {}
        return os.environ | {"PYTHONPATH": path} | threads | gpu


def slots(jobs: int, devices: Sequence[str]) -> list[Slot]:
    """`jobs` slots with equal shares of the cores and, where there are GPUs, one GPU each."""
    cores = _cores()
    share = max(1, len(cores) // jobs)
    shares = [frozenset(cores[i * share : (i + 1) * share] or cores) for i in range(jobs)]
    return [Slot(own, devices[i % len(devices)] if devices else None) for i, own in enumerate(shares)]


def visible_devices() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them; empty without a GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return [d.strip() for d in named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]


class Jobs:
    """Works through the runs of a sweep and reports each run that ends; `done` of `count` runs are finished."""

    def __init__(self, evaluate: Evaluations, console: Console, done: int, count: int):
        self.evaluate, self.console, self.done, self.count = evaluate, console, done, count
        self._stopping = threading.Event()
        self._thread = threading.local()  # the slot of each thread
        self._children: set[subprocess.Popen[bytes]] = set()

    def work(self, runs: Sequence[Run], places: Sequence[Slot]) -> list[Outcome]:
        """Outcomes in the order of the runs. Handles SIGINT and SIGTERM meanwhile."""
        outcomes = [Outcome(run) for run in runs]
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(len(places), initializer=self._enter, initargs=(iter(places),)) as pool:
                list(pool.map(self._run, outcomes))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return outcomes

    def _enter(self, places: Iterator[Slot]) -> None:
        self._thread.slot = next(places)
        if self._thread.slot.cores:
            os.sched_setaffinity(0, self._thread.slot.cores)  # of this thread; its processes inherit it

    def _run(self, outcome: Outcome) -> None:
        """All stages of a run that are not finished."""
        if self._stopping.is_set():
            return
        run, outcome.state = outcome.run, DONE
        run.folder.mkdir(parents=True, exist_ok=True)
        for stage, command in stages(run, self.evaluate):
            if stage in finished_stages(run, self.evaluate):
                continue
            outcome.stage, outcome.code = stage, self._call(command, run.folder / f"{stage}.log")
            if outcome.code:
                stopped = self._stopping.is_set() or outcome.code == STOPPED
                outcome.state = INTERRUPTED if stopped else FAILED
                break
            note_finished(run, stage, command)
        self.done += outcome.state == DONE
        where = "" if outcome.state == DONE else f" in {outcome.stage}, exit code {outcome.code}"
        text = f"[{self.done}/{self.count}] {run.name}: {outcome.state}{where}"
        self.console.print(text, markup=False, soft_wrap=True)

    def _call(self, command: list[str], log: Path) -> int:
        """The exit code of a command, whose output goes to `log`. Ctrl-C does not reach a session of its own."""
        if self._stopping.is_set():
            return STOPPED
        with log.open("ab") as sink:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._thread.slot.environment(),
                start_new_session=True,
            )
        self._children.add(child)
        if self._stopping.is_set():  # the signal came while the process started
            child.terminate()
        code = child.wait()
        self._children.discard(child)
        _kill_group(child)  # helpers that it left behind
        return code

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        """The first signal asks the processes to stop, the second kills them."""
        again = self._stopping.is_set()
        self._stopping.set()
        if not again:
            name = signal.Signals(number).name
            print(f"\n{name}: waiting for the runs at work to write a checkpoint; again to kill them", file=sys.stderr)
        for child in list(self._children):
            if again:
                _kill_group(child)
            else:
                child.terminate()  # not its group: the process may still need its helpers


def run_all(
    sweep: Sweep, listed: list[Run], settings: dict[str, Settings], jobs: int | None, console: Console
) -> list[Outcome]:
    """Runs what is not finished, `jobs` at a time (default: one, or one per GPU); outcomes of all runs, in order."""
    outcomes = {run.name: Outcome(run, DONE) for run in listed if is_finished(run, sweep.evaluate)}
    left = [run for run in listed if run.name not in outcomes]
    devices = visible_devices()
    places = slots(min(jobs or max(1, len(devices)), max(1, len(left))), devices)
    console.print(f"{sweep.name}: {len(listed)} runs, {len(outcomes)} done before; {len(places)} at a time")
    _prepare_text([settings[run.name] for run in left])
    jobs_at_work = Jobs(sweep.evaluate, console, len(outcomes), len(listed))
    outcomes |= {outcome.run.name: outcome for outcome in jobs_at_work.work(left, places)}
    return [outcomes[run.name] for run in listed]


def _prepare_text(needed: list[Settings]) -> None:
    """Prepares text and tokenizer once, because runs that start at the same time would prepare them twice."""
    from data.token_store import prepare_tokens
    from data.tokenizer import prepare_tokenizer

    for s in {f"{s.data.model_dump_json()} {s.recall.values}": s for s in needed}.values():
        prepare_tokens(s, prepare_tokenizer(s))


def exit_code(outcomes: list[Outcome], console: Console) -> int:
    """1 if a run failed, else 75 if a run was stopped or did not start. Prints the ends of the failed runs' logs."""
    for o in outcomes:
        if o.state == FAILED:
            log = o.run.folder / f"{o.stage}.log"
            console.print(
                f"\n{o.run.name} failed in {o.stage} with exit code {o.code}; the end of {log}:", markup=False
            )
            end = log.read_text(errors="replace").splitlines()[-20:]
            console.print("\n".join(end), markup=False, highlight=False)
    states = {o.state for o in outcomes}
    if states & {INTERRUPTED, WAITING}:
        console.print("stopped; run the same command again to go on")
    return 1 if FAILED in states else STOPPED if states != {DONE} else 0


def plan_table(listed: list[Run], settings: dict[str, Settings]) -> Table:
    """Size, reach, tokens and FLOPs of each run."""
    rows = []
    for run in listed:
        s = settings[run.name]
        config, works = model_config(s, vocab_size(s)), {w.name: w for w in work(s, 1)}
        farthest, tokens = reach(config.specs), {name: f"{w.tokens:,.0f}" for name, w in works.items()}
        last = f"{last_distance(s):,}" if s.recall.enabled else "–"
        flops = f"{sum(w.flops(config) for w in works.values()):.2e}"
        sizes = [f"{count_parameters(config):,}", f"{farthest:,}" if farthest else "unbounded", last]
        rows.append([run.name, *sizes, tokens["text"], tokens.get("recall", "–"), flops])
    heads = ["run", "parameters", "R", "last D", "text", "recall", "FLOPs"]
    return text_table("Runs; text and recall in tokens", heads, rows)


# -- stages -----------------------------------------------------------------------------------------------------------


def stages(run: Run, evaluate: Evaluations) -> list[tuple[str, list[str]]]:
    """(name, command) of each stage: training, then the evaluations."""
    train = [sys.executable, str(ROOT / "train.py"), str(run.config), *run.overrides]
    evaluations = [
        (name, [sys.executable, "-m", f"eval.{name}", str(run.folder), *options])
        for name, options in evaluate.commands()
    ]
    return [("train", train), *evaluations]


def finished_stages(run: Run, evaluate: Evaluations) -> set[str]:
    """Stages that the same command finished before. After other training, no evaluation counts as finished."""
    noted = _noted(run)
    done = {stage for stage, command in stages(run, evaluate) if noted.get(stage) == command[1:]}
    return done if "train" in done else set()


def is_finished(run: Run, evaluate: Evaluations) -> bool:
    return finished_stages(run, evaluate) == {stage for stage, _ in stages(run, evaluate)}


def note_finished(run: Run, stage: str, command: list[str]) -> None:
    """Notes the command without the interpreter, which may be another one tomorrow."""
    kept = {} if stage == "train" else _noted(run)
    write_json(run.folder / "sweep.json", kept | {stage: command[1:]})


def _noted(run: Run) -> dict[str, Any]:
    path = run.folder / "sweep.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _kill_group(leader: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
