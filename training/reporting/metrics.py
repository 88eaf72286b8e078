"""Where figures go: to `metrics.jsonl`, to wandb with the same columns while it works, and to the progress bar."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.run.checkpoint import write_text
from training.settings.schema import Settings

DAY = 24 * 3600  # seconds: the time left is computed from all steps of the last day, because steps may take minutes


class Metrics(AbstractContextManager["Metrics"]):
    """Appends JSON objects, one per line; none with `write=False`. A resume first cuts later lines off."""

    def __init__(self, run_dir: Path, settings: Settings, facts: Mapping[str, Any], step: int, write: bool = True):
        """`facts`: wandb_id, and what a tracker shows beside the settings."""
        self.path = run_dir / "metrics.jsonl" if write else Path(os.devnull)
        truncate(self.path, step)
        self._file = self.path.open("a", buffering=1)
        self._wandb: Any = None
        if write and settings.tracking.wandb_mode != "disabled":
            self._guarded("is not available", lambda: self._start_wandb(settings, facts))

    def write(self, kind: str, step: int, **values: Any) -> None:
        nan = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]  # JSON has no NaN
        self._file.write(json.dumps({"step": step, "kind": kind} | values | dict.fromkeys(nan)) + "\n")
        columns = {k: v for k, v in numbers(values, kind) if isinstance(v, int | float)}
        if self._wandb is not None:
            self._guarded("failed", lambda: self._wandb.log(columns, step=step))

    def __exit__(self, *problem: object) -> None:
        self._file.close()
        if self._wandb is not None:
            self._guarded("failed", self._wandb.finish)

    def _start_wandb(self, settings: Settings, facts: Mapping[str, Any]) -> None:
        tracking = settings.tracking
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb

            self._wandb = wandb.init(
                project=tracking.wandb_project, name=settings.name, id=facts["wandb_id"],
                mode=tracking.wandb_mode, config=settings.model_dump(mode="json") | {"facts": dict(facts)},
                resume="allow" if tracking.wandb_mode == "online" else None, dir=self.path.parent,
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip

    def _guarded(self, what: str, call: Callable[[], object]) -> None:
        """Call wandb. Whatever it raises (absent, broken, unreachable) is printed once, and never ends a run."""
        try:
            call()
        except Exception as problem:
            print(f"wandb {what} ({problem}); training goes on, metrics are in {self.path}")
            self._wandb = None


def numbers(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Values by their path in nested mappings.

    >>> list(numbers({"horizon": 8, "accuracy": {16: 0.5}}, "probe"))
    [('probe/horizon', 8), ('probe/accuracy/16', 0.5)]
    """
    for key, value in values.items():
        path = f"{prefix}/{key}"
        yield from numbers(value, path) if isinstance(value, Mapping) else [(path, value)]


def truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`. Damaged lines go too, with a message unless it is an incomplete last one."""
    if not path.is_file():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    steps = [_step(line) for line in lines]
    if damaged := [str(number) for number, logged in enumerate(steps, start=1) if logged is None]:
        print(f"{path}: {len(damaged)} damaged lines are left out: {', '.join(damaged[:10])}")
    kept = [line.decode() for line, logged in zip(lines, steps, strict=True) if logged is not None and logged <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _step(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None if it is damaged."""
    try:
        return int(json.loads(line.decode())["step"])
    except (ValueError, KeyError, TypeError):
        return None


class TrainingProgress(Progress):
    """The bar on a terminal, plain lines elsewhere, nothing with `show=False`."""

    def __init__(self, max_steps: int, step: int, show: bool):
        console = Console(quiet=not show)
        super().__init__(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
            TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not (show and console.is_terminal), speed_estimate_period=DAY,
        )  # fmt: skip
        self.first_step = step
        self.task = self.add_task("train", total=max_steps, completed=step, figures="compiling ...")

    def figures(self, step: int, text: str) -> None:
        """Show the figures of the last logged step."""
        self.update(self.task, completed=step, figures=text)
        if self.disable:
            (task,) = self.tasks
            self.say(f"step {step}/{task.total}  {text}  left {TimeRemainingColumn().render(task)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
