"""Kills a training run at random moments, again and again, and checks that nothing is lost.

    python tests/integration/kill_test.py configs/tiny.yaml --kills 100 --json results/kills/kills.json
    python tests/integration/kill_test.py configs/tiny.yaml --kills 40 --launch configs/accelerate/fsdp2-cpu-2.yaml

With `--fork` the processes are forks of one that has imported everything. That takes a tenth of the time, and nearly
all kills fall into the run itself instead of its imports.

The reference run is not killed. The others get SIGKILL at random moments of three kinds: some time after the start,
some time after a step, and while a checkpoint is written. With `--launch` either all processes of a run are killed, or
one of them: the launcher or a rank. Then the others must end by themselves. A killed run is started again by the same
command until it ends; then another run begins in a new folder. After every kill:

- each figure logged so far, losses and gradient norms among them, is bit-equal to that of the reference;
- no more is lost than the steps since the last checkpoint, and no half-written folder has a checkpoint's name;
- no process of the run lives on.

After the last step the weights are bit-equal to those of the reference. Any difference is printed, and the exit code
is 1. A hundred kills take long, so this is run by hand; test_kill_test.py makes ten.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from model.errors import cli
from tests.integration.template import Forked
from training.run.checkpoint import checkpoints, problem_with, write_json
from training.settings.config_file import load_settings

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("start", "step", "write")
CLOCK = ("tokens_per_second", "mfu")  # figures that depend on the time
DEADLINE = 600.0  # seconds within which a started run must end or reach the moment of its kill

Logged = dict[tuple[str, int], dict[str, Any]]


class Process(Protocol):
    """A started run, the leader of its process group."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[list[str], Path], Process]  # of the arguments of train.py and the file for its output


@dataclass(frozen=True)
class Kill:
    """One SIGKILL. `step` is the last one logged, `checkpoint` that of the newest checkpoint; 0 if there is none."""

    kind: str
    step: int
    checkpoint: int
    while_writing: bool


@dataclass
class Result:
    """All kills, and every difference to the reference."""

    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    rows_compared: int = 0
    problems: list[str] = field(default_factory=list)


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        begin = partial(start_fork if arguments.fork else start_python, launch=arguments.launch)
        victims = Victims(arguments.config, arguments.overrides, Path(folder), begin, arguments.seed)
        for number, kill in enumerate(victims.kill(arguments.kills), start=1):
            print(f"kill {number} of {arguments.kills}: {kill}", flush=True)
    report(victims, arguments)
    return 1 if victims.result.problems else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file of configs/; its run must be short")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--launch", type=Path, metavar="X.yaml", help="a launch file for `accelerate launch`")
    parser.add_argument("--fork", action="store_true", help="start forks of a process that has imported everything")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_intermixed_args()


def start_python(arguments: list[str], log: Path, launch: Path | None) -> Process:
    """`python train.py`, or `accelerate launch train.py`, in a process group of its own."""
    module = ["-m", "accelerate.commands.launch", "--config_file", str(launch)] if launch else []
    program = [sys.executable, *module, "train.py", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(program, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def start_fork(arguments: list[str], log: Path, launch: Path | None = None) -> Process:
    """The same as a fork of one process that has imported everything: a start takes a tenth of the time."""
    module = ["tests.integration.fork_launch.py", "--config_file", str(launch)] if launch else []
    return Forked([*module, "train.py", *arguments], log)


def family(pid: int) -> list[int]:
    """A process and all that it has started, and those in turn."""
    with suppress(OSError):  # it has ended meanwhile
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        return [pid, *(descendant for child in children for descendant in family(child))]
    return [pid]


class Victims:
    """A reference run, and runs with the same settings that are killed. All run folders are in `folder`."""

    def __init__(self, config: Path, overrides: list[str], folder: Path, start: Start, seed: int):
        settings = load_settings(config, overrides)
        self.arguments = [str(config), *overrides, "training.log_every_steps=1", "tracking.wandb_mode=disabled"]
        self.save_every, self.last_step = settings.training.save_every_steps, settings.training.max_steps
        self.folder, self.start, self.random = folder, start, random.Random(seed)
        self.result = Result()

    def kill(self, wanted: int) -> Iterator[Kill]:
        """Run the reference, then kill `wanted` times; the last victim runs to its end."""
        began = time.monotonic()
        self.run_to_end(self.folder / "reference")
        self.seconds = time.monotonic() - began
        self.reference = logged(self.folder / "reference")
        number = 0
        while len(self.result.kills) < wanted:
            number += 1
            run = self.folder / f"victim-{number}"
            while len(self.result.kills) < wanted and (kill := self.start_and_kill(run)):
                self.result.kills.append(kill)
                self.check_kill(run, kill)
                yield kill
            self.run_to_end(run)
            self.check_end(run)

    def run_to_end(self, run: Path) -> None:
        expected = newest(run)
        process, log = self.begin(run)
        wait(process, lambda: False)
        self.check_resumed(log, expected)
        if process.poll() != 0:
            raise RuntimeError(f"{run.name} ended with exit code {process.poll()}:\n{log.read_text()[-4000:]}")

    def start_and_kill(self, run: Path) -> Kill | None:
        """Start or resume a run and kill it at a random moment. None if it ended before that moment."""
        kind, expected = self.random.choice(KINDS), newest(run)
        process, log = self.begin(run)
        alive = wait(process, self.moment(kind, run))
        if alive:
            started = [pid for pid in family(process.pid) if lives(pid)]
            ranks = [pid for pid in started if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()] or started
            for victim in started if self.random.random() < 0.5 else [self.random.choice(ranks)]:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            self.wait_for_family(run, started)
        wait(process, lambda: False)
        self.check_resumed(log, expected)
        if not alive:
            return None
        step = max((step for kind, step in logged(run) if kind == "train"), default=0)
        return Kill(kind, step, newest(run), any((run / "checkpoints").glob(".writing-*")))

    def wait_for_family(self, run: Path, started: list[int]) -> None:
        """Without one of its processes a run must end within a minute. What lives on is a problem, and is killed."""
        deadline = time.monotonic() + 60
        while living := [pid for pid in started if lives(pid)]:
            if time.monotonic() > deadline:
                self.result.problems.append(f"{run.name}: {len(living)} of {len(started)} processes live on")
                for pid in living:
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    def begin(self, run: Path) -> tuple[Process, Path]:
        log = self.folder / f"{run.name}.log"
        log.write_text("")
        return self.start([*self.arguments, f"run_dir={run}", f"data.cache_dir={self.folder / 'cache'}"], log), log

    def moment(self, kind: str, run: Path) -> Callable[[], bool]:
        """A random moment of a kind, as a function that returns True from then on."""
        now = time.monotonic()
        if kind == "start":
            due = now + self.random.uniform(0, self.seconds)
            return lambda: time.monotonic() >= due
        if kind == "write":
            nth, pause = self.random.randint(1, 3), self.random.uniform(0, 0.03)
            return after(lambda: writing(run, newest(run) + nth * self.save_every), pause)
        step, pause = newest(run) + self.random.randint(1, 3 * self.save_every), self.random.uniform(0, 0.1)
        return after(lambda: reached(run, step), pause)

    def check_kill(self, run: Path, kill: Kill) -> None:
        self.compare(run, f"{run.name}, killed at step {kill.step} ({kill.kind})")
        due = (kill.step - 1) // self.save_every * self.save_every  # its checkpoint is written before the next step
        if kill.checkpoint < due:
            self.result.problems.append(f"{run.name}: killed at step {kill.step}, checkpoint {due} is missing")
        for path in checkpoints(run):
            if problem := problem_with(path):
                self.result.problems.append(f"{run.name}: {path.name} is broken: {problem}")

    def check_resumed(self, log: Path, expected: int) -> None:
        """A run that printed where it resumes must have resumed from the newest checkpoint."""
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("resumed ")]
        self.result.resumes += len(lines)
        if lines and not lines[0].endswith(f"at step {expected}"):
            self.result.problems.append(f"{log.stem}: checkpoint {expected} was the newest, but it {lines[0]}")

    def check_end(self, run: Path) -> None:
        self.compare(run, run.name)
        if logged(run).keys() != self.reference.keys():
            self.result.problems.append(f"{run.name}: logged other steps than the reference")
        weights = [(r / "hf/model.safetensors").read_bytes() for r in (run, self.folder / "reference")]
        if weights[0] != weights[1]:
            self.result.problems.append(f"{run.name}: the weights at the end are not those of the reference")

    def compare(self, run: Path, name: str) -> None:
        for key, row in logged(run).items():
            self.result.rows_compared += 1
            if row != self.reference.get(key):
                differing = [k for k in row if row[k] != self.reference.get(key, {}).get(k)]
                self.result.problems.append(f"{name}: {key[0]} of step {key[1]} differs in {', '.join(differing)}")


def lives(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be asked for its exit code does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def after(condition: Callable[[], bool], pause: float) -> Callable[[], bool]:
    """A function that returns True from `pause` seconds after it first saw `condition` fulfilled."""
    due: list[float] = []

    def come() -> bool:
        if not due and condition():
            due.append(time.monotonic() + pause)
        return bool(due) and time.monotonic() >= due[0]

    return come


def wait(process: Process, moment: Callable[[], bool]) -> bool:
    """Wait until the moment (returns True) or the end of the process (returns False)."""
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None:
        if moment():
            return True
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"the run did not end or reach the moment of its kill within {DEADLINE:.0f} s")
        time.sleep(0.005)
    return False


def logged(run: Path) -> Logged:
    """The complete lines of metrics.jsonl by kind and step, without the figures that depend on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    metrics = [json.loads(line) for line in lines]
    return {(m["kind"], m["step"]): {k: v for k, v in m.items() if k not in CLOCK} for m in metrics}


def newest(run: Path) -> int:
    """Step of the newest finished checkpoint; 0 if there is none."""
    return max((int(p.name.removeprefix("step-")) for p in checkpoints(run)), default=0)


def writing(run: Path, step: int) -> bool:
    """Whether the checkpoint of `step` or a later one is being written."""
    return any(int(p.name.rpartition("-")[2]) >= step for p in (run / "checkpoints").glob(".writing-step-*"))


def reached(run: Path, step: int) -> bool:
    """Whether `step` was logged."""
    path = run / "metrics.jsonl"
    return path.exists() and f'{{"step": {step}, "kind": "train"' in path.read_text()


def commit() -> str:
    """The commit of this repository; empty if git can't tell."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip()


def report(victims: Victims, arguments: argparse.Namespace) -> None:
    r = victims.result
    lost = [kill.step - kill.checkpoint for kill in r.kills]
    summary = {
        "command": f"python tests/integration/kill_test.py {arguments.config} "
        + " ".join([*arguments.overrides, f"--kills {arguments.kills} --seed {arguments.seed}"])
        + (f" --launch {arguments.launch}" if arguments.launch else "")
        + " --fork" * arguments.fork,
        "commit": commit(),
        "seeds": {"moments": arguments.seed, "run": load_settings(arguments.config, arguments.overrides).seed},
        "n": len(r.kills),
        "kinds": dict(sorted(Counter(kill.kind for kill in r.kills).items())),
        "before_the_first_step": sum(kill.step == 0 for kill in r.kills),
        "while_a_checkpoint_was_written": sum(kill.while_writing for kill in r.kills),
        "resumes": r.resumes,
        "rows_compared": r.rows_compared,
        "problems": r.problems,
        "steps": victims.last_step,
        "save_every_steps": victims.save_every,
        "steps_lost": {"max": max(lost), "mean": round(statistics.mean(lost), 2)},
        "torch": torch.__version__,
    }
    print(json.dumps(summary, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, summary)


if __name__ == "__main__":
    sys.exit(cli(main))
