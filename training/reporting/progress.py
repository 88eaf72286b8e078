"""The progress bar on a terminal, plain lines elsewhere, nothing on ranks other than the first."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    def __init__(self, max_steps: int, step: int, show: bool):
        self.max_steps, self.first_step, self.show = max_steps, step, show
        self.began = time.monotonic()
        self.bar = None
        if show and Console().is_terminal:
            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self.task = self.bar.add_task("train", total=max_steps, completed=step, figures="compiling ...")

    def __enter__(self) -> "TrainingProgress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def figures(self, step: int, text: str) -> None:
        """Show the figures of the last logged step."""
        if self.bar:
            self.bar.update(self.task, completed=step, figures=text)
            return
        seconds = (time.monotonic() - self.began) / max(1, step - self.first_step) * (self.max_steps - step)
        self.say(f"step {step}/{self.max_steps}  {text}  left {timedelta(seconds=int(seconds))}")

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.show:
            print(text, flush=True)
