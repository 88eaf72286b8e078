"""The progress bar on a terminal, plain lines elsewhere, nothing on ranks other than the first."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

HOURS = 24 * 3600  # seconds of the past from which the time left is computed: all of a run, as steps may take minutes


class TrainingProgress(Progress):
    def __init__(self, max_steps: int, step: int, show: bool):
        console = Console(quiet=not show)
        super().__init__(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"),
            TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not (show and console.is_terminal), speed_estimate_period=HOURS,
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
