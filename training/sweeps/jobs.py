"""Runs a sweep's runs as processes: several at a time, each on its own cores or its own GPU.

Each finished stage (training, then each evaluation) is noted in the run's folder, in `sweep.json`, with its command.
Started again, a sweep skips these stages. A signal is passed to the running processes, which write a checkpoint; a
second signal kills them. If the sweep itself is killed, they write a checkpoint and end too.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from data.mixture import prepare_sources
from data.tokenizer import prepare_tokenizer
from model.flops import count_parameters
from model.windows import reach
from training.planning.dry_run import vocab_size
from training.planning.stages import stage_works
from training.processes.signals import SIGNALS, STOPPED, end_with_parent, handle_signals, say_signal
from training.run.checkpoint import write_json
from training.run.folder import read_facts
from training.settings.schema import Settings
from training.sweeps.grid import Evaluations, Run, Sweep

ROOT = Path(__file__).resolve().parents[2]
Slot = tuple[list[int], dict[str, str]]  # the cores and the environment of one process at a time
DONE, FAILED, INTERRUPTED, WAITING = "done", "failed", "stopped", "waiting"


@dataclass
class Outcome:
    """The state of a run; `stage` and `code` are those of the last process that failed or was stopped."""

    run: Run
    state: str = WAITING
    stage: str = ""
    code: int = 0


def slots(jobs: int, devices: Sequence[str]) -> list[Slot]:
    """Where `jobs` processes run: equal shares of the cores (empty if they can't be pinned) and, if any, a GPU each."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(cores) // jobs)
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    listed = []
    for i in range(jobs):
        own = cores[i * share : (i + 1) * share] or cores
        environment = {"OMP_NUM_THREADS": str(len(own))} if own else {}
        environment |= {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}
        listed.append((own, os.environ | {"PYTHONPATH": path} | environment))
    return listed


def visible_devices() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them; empty without a GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [device.strip() for device in named.split(",")] if torch.cuda.is_available() else []


def run_all(
    sweep: Sweep, listed: list[Run], settings: dict[str, Settings], jobs: int | None, console: Console
) -> list[Outcome]:
    """Runs what is not finished, `jobs` at a time (default: one, or one per GPU); outcomes of all runs, in order."""
    outcomes = [Outcome(run, WAITING if stages_left(run, sweep.evaluate) else DONE) for run in listed]
    left, devices = [outcome for outcome in outcomes if outcome.state == WAITING], visible_devices()
    places = slots(min(jobs or max(1, len(devices)), max(1, len(left))), devices)
    console.print(f"{sweep.name}: {len(listed)} runs, {len(outcomes) - len(left)} done before; {len(places)} at a time")
    needed = {f"{s.data.model_dump_json()} {s.recall.values}": s for s in (settings[o.run.name] for o in left)}
    for s in needed.values():  # prepared once, because runs that start at the same time would prepare it twice
        prepare_sources(s, prepare_tokenizer(s))
    at_work = _Jobs(sweep.evaluate, console, outcomes)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handle_signals(at_work.stop)
    try:
        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(at_work.work, places))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcomes


class _Jobs:
    """The processes at work. One thread per slot takes the next waiting run, and reports the run's end."""

    def __init__(self, evaluate: Evaluations, console: Console, outcomes: list[Outcome]):
        self.evaluate, self.console, self.outcomes = evaluate, console, outcomes
        self.left = iter([outcome for outcome in outcomes if outcome.state == WAITING])
        self.stopping = threading.Event()
        self.children: set[subprocess.Popen[bytes]] = set()

    def work(self, slot: Slot) -> None:
        """Runs what is left until nothing is left, or a signal came."""
        cores, environment = slot
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread; its processes inherit it
        for outcome in self.left:
            if self.stopping.is_set():
                return
            self._run(outcome, environment)
            done = sum(other.state == DONE for other in self.outcomes)
            where = "" if outcome.state == DONE else f" in {outcome.stage}, exit code {outcome.code}"
            text = f"[{done}/{len(self.outcomes)}] {outcome.run.name}: {outcome.state}{where}"
            self.console.print(text, markup=False, soft_wrap=True)

    def _run(self, outcome: Outcome, environment: dict[str, str]) -> None:
        """All stages of a run that are not finished."""
        run = outcome.run
        run.folder.mkdir(parents=True, exist_ok=True)
        for stage, command in stages_left(run, self.evaluate).items():
            outcome.stage, outcome.code = stage, self._call(command, run.folder / f"{stage}.log", environment)
            if outcome.code:
                outcome.state = INTERRUPTED if self.stopping.is_set() or outcome.code == STOPPED else FAILED
                return
            note_finished(run, stage, command)
        outcome.state = DONE

    def _call(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        """The exit code of a Python command, whose output goes to `log`."""
        if self.stopping.is_set():
            return STOPPED
        with log.open("ab") as sink:
            child = subprocess.Popen(  # in a session of its own, which Ctrl-C does not reach
                [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        self.children.add(child)
        if self.stopping.is_set():  # the signal came while the process started
            child.terminate()
        code = child.wait()
        self.children.discard(child)
        _kill_group(child)  # helpers that it left behind
        return code

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """The first signal asks the processes to stop, the second kills them."""
        again = self.stopping.is_set()
        self.stopping.set()
        if not again:
            say_signal(number, "waiting for the runs at work to write a checkpoint; again to kill them")
        for child in list(self.children):
            _kill_group(child) if again else child.terminate()  # not its group, which it may still need


def _kill_group(leader: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def exit_code(outcomes: list[Outcome], console: Console) -> int:
    """1 if a run failed, else 75 if a run was stopped or did not start. Prints the ends of the failed runs' logs."""
    for o in outcomes:
        if o.state == FAILED:
            log = o.run.folder / f"{o.stage}.log"
            what = f"{o.run.name} failed in {o.stage} with exit code {o.code}; the end of {log}:"
            end = log.read_text(errors="replace").splitlines()[-20:]
            console.print("", what, *end, sep="\n", markup=False, highlight=False)
    states = {o.state for o in outcomes}
    if states & {INTERRUPTED, WAITING}:
        console.print("stopped; run the same command again to go on")
    return 1 if FAILED in states else STOPPED if states != {DONE} else 0


def plan_table(listed: list[Run], settings: dict[str, Settings]) -> Table:
    """Size, reach, tokens and FLOPs of each run."""
    heads = ("parameters", "R", "text tokens", "recall tokens", "FLOPs")
    table = Table(Column("run", overflow="fold"), *(Column(head, justify="right") for head in heads), box=SIMPLE_HEAD)
    for run in listed:
        s = settings[run.name]
        periods = stage_works(s, vocab_size(s), ranks=1)
        config, works = periods[-1].config, [w for period in periods for w in period.works]
        farthest = reach(config.specs)
        sizes = f"{count_parameters(config):,}", "unbounded" if farthest is None else f"{farthest:,}"
        both = (f"{sum(w.tokens for w in works if w.name == name):,.0f}" for name in ("text", "recall"))
        table.add_row(run.name, *sizes, *both, f"{sum(period.flops for period in periods):.2e}")
    return table


def stages(run: Run, evaluate: Evaluations) -> dict[str, list[str]]:
    """The command of each stage, without the Python interpreter: training, then the evaluations."""
    listed = {"train": [str(ROOT / "train.py"), str(run.config), *run.overrides]}
    for name, options in evaluate:
        listed |= {name: ["-m", f"eval.{name}", str(run.folder), *options.arguments()]} if options else {}
    return listed


def stages_left(run: Run, evaluate: Evaluations) -> dict[str, list[str]]:
    """Stages that the same command has not finished before. After other training, every evaluation is left."""
    every, noted = stages(run, evaluate), read_facts(run.folder, "sweep.json")
    left = {stage: command for stage, command in every.items() if noted.get(stage) != command}
    return every if "train" in left else left


def note_finished(run: Run, stage: str, command: list[str]) -> None:
    """Adds the stage to the run's `sweep.json`; training removes the stages noted before."""
    noted = {} if stage == "train" else read_facts(run.folder, "sweep.json")
    write_json(run.folder / "sweep.json", noted | {stage: command})
