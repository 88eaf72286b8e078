"""The progress bar on a terminal, plain lines elsewhere, silence on ranks other than the first."""

import time
from types import TracebackType

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

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def figures(self, step: int, text: str) -> None:
        """Show the figures of the last logged step."""
        if self.bar:
            self.bar.update(self.task, completed=step, figures=text)
        elif self.show:
            print(f"step {step}/{self.max_steps}  {text}  left {self._left(step)}", flush=True)

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.show:
            print(text, flush=True)

    def _left(self, step: int) -> str:
        done = max(1, step - self.first_step)
        seconds = int((time.monotonic() - self.began) / done * (self.max_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
