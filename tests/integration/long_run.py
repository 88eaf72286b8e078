"""Trains for many steps in several starts, and checks that memory and open files stay flat and no metric is missing.

    python tests/integration/long_run.py configs/tiny.yaml --steps 100000 --starts 5 --json results/long/long.json

All starts but the last are stopped by SIGTERM, each after its share of the steps. Checked are:

- memory: the median over the last third of a start is at most 1 % above that over its second third;
- open files and threads: their medians over these two thirds are equal;
- metrics.jsonl: every step that is due has one row of each kind, in order, and every loss is a number;
- checkpoints: all that are kept are valid, and the newest is of the last step.

Memory is what the process has for itself (RssAnon of /proc/PID/status), so that files mapped into it do not count.
A hundred thousand steps take the better part of an hour, so this is run by hand; test_long_run.py makes a few hundred.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.errors import cli
from tests.integration.kill_test import Process, Start, commit, newest, start_python
from training.processes.signals import STOPPED
from training.run.checkpoint import checkpoints, problem_with, write_json
from training.settings.config_file import load_settings

GROWTH = 0.01  # of memory, from the second to the last third of a start
POLL = 0.05  # seconds
FAST = (  # steps of milliseconds: the loop is on trial, not the model
    "model.num_hidden_layers=1", "data.seq_len=32", "training.tokens_per_step=64",
    "recall.tokens_per_step=64", "recall.relay_loss_weight=0", "tracking.wandb_mode=disabled",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A training process at one moment, after the logged `step`."""

    start: int
    step: int
    memory_kib: int
    files: int
    threads: int


class LongRun:
    """A run of `steps` steps in `starts` starts. It logs 1,000 rows, saves 100 checkpoints and validates 20 times."""

    def __init__(self, config: Path, overrides: Sequence[str], run: Path, start: Start, steps: int, starts: int):
        self.run, self.start, self.steps, self.starts = run, start, steps, starts
        times = {"log": 1000, "save": 100, "validate": 20}
        every = [f"training.{what}_every_steps={max(1, steps // number)}" for what, number in times.items()]
        self.arguments = [
            str(config), *FAST, f"training.max_steps={steps}", *every, *overrides,
            f"run_dir={run}", f"data.cache_dir={run.parent / 'cache'}",
        ]  # fmt: skip
        self.settings = load_settings(config, self.arguments[1:]).training
        self.samples: list[Sample] = []
        self.problems: list[str] = []

    def train(self) -> Iterator[int]:
        """Train to the end. Yields the step at which each start has ended."""
        for number in range(1, self.starts + 1):
            code = self.watch(number, until=self.steps * number // self.starts)
            expected = 0 if number == self.starts else STOPPED
            if code != expected:
                said = self.log(number).read_text()[-2000:]
                raise RuntimeError(f"start {number} ended with exit code {code}, not {expected}:\n{said}")
            if number == self.starts:
                self.check_samples()
                self.check_metrics()
                self.check_checkpoints()
            yield newest(self.run)

    def log(self, number: int) -> Path:
        return self.run.with_name(f"start-{number}.log")

    def watch(self, number: int, until: int) -> int | None:
        """Start the training, sample it at each logged step, and stop it at step `until`. Returns its exit code."""
        step, process = last_step(self.run), self.start(self.arguments, self.log(number))
        while process.poll() is None and (step < until or until == self.steps):
            if (now := last_step(self.run)) > step:
                step = now
                self.samples.extend(sampled(process, number, step))
            time.sleep(POLL)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        while process.poll() is None:
            time.sleep(POLL)
        return process.poll()

    def check_samples(self) -> None:
        for number, (before, after) in enumerate(self.thirds(), start=1):
            grown = after["memory_kib"] / before["memory_kib"] - 1
            if grown > GROWTH:
                self.problems.append(f"start {number}: memory has grown by {grown:.1%}")
            for what in ("files", "threads"):
                if after[what] != before[what]:
                    self.problems.append(f"start {number}: {after[what]:.0f} {what}, before {before[what]:.0f}")

    def thirds(self) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
        """Medians over the second and the last third of each start."""
        for number in sorted({sample.start for sample in self.samples}):
            of_start = [asdict(sample) for sample in self.samples if sample.start == number]
            third = len(of_start) // 3
            yield medians(of_start[third : 2 * third]), medians(of_start[2 * third :])

    def check_metrics(self) -> None:
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        for kind, every in (
            ("train", self.settings.log_every_steps),
            ("validation", self.settings.validate_every_steps),
        ):
            of_kind = [row for row in rows if row["kind"] == kind]
            there = [row["step"] for row in of_kind]
            if there != sorted(set(there)):
                self.problems.append(f"{kind}: steps repeat or are out of order")
            if missing := {*range(every, self.steps + 1, every), self.steps} - {*there}:
                self.problems.append(f"{kind}: {len(missing)} steps are missing, the first is {min(missing)}")
            figures = ("loss_text", "tokens") if kind == "train" else ("bits_per_byte",)
            if empty := [row["step"] for row in of_kind if any(row[figure] is None for figure in figures)]:
                self.problems.append(f"{kind}: no number at step {empty[0]}")

    def check_checkpoints(self) -> None:
        if newest(self.run) != self.steps:
            self.problems.append(f"the newest checkpoint is of step {newest(self.run)}")
        for path in checkpoints(self.run):
            if problem := problem_with(path):
                self.problems.append(f"{path.name}: {problem}")

    def summary(self) -> dict[str, Any]:
        """Figures of each start, and of all."""
        columns = ("memory_kib", "files", "threads")
        starts = [{k: (before[k], after[k]) for k in columns} for before, after in self.thirds()]
        return {
            "steps": newest(self.run),
            "commit": commit(),
            "samples": len(self.samples),
            "starts": starts,
            "problems": self.problems,
        }


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each column."""
    return {column: statistics.median(row[column] for row in rows) for column in rows[0]}


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 if there is none. Only the end of the file is read."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            *lines, _ = file.read().split(b"\n")
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def sampled(process: Process, start: int, step: int) -> list[Sample]:
    """One sample; none if the process has ended meanwhile."""
    folder = Path(f"/proc/{process.pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        files = len(list((folder / "fd").iterdir()))
        return [Sample(start, step, int(status["RssAnon"].split()[0]), files, int(status["Threads"]))]
    except (OSError, KeyError):
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file of configs/; its model must be tiny")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="long-") as folder:
        start, run, began = partial(start_python, launch=None), Path(folder) / "run", time.monotonic()
        long = LongRun(arguments.config, arguments.overrides, run, start, arguments.steps, arguments.starts)
        for step in long.train():
            print(f"a start ended at step {step} after {time.monotonic() - began:.0f} s", flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(arguments.json, long.summary() | {"seconds": round(time.monotonic() - began)})
    print(json.dumps(long.summary(), indent=1))
    return 1 if long.problems else 0


if __name__ == "__main__":
    sys.exit(cli(main))
