"""A window of steps under `torch.profiler`: where the time goes, as a trace and as a table.

    runs/NAME/profile/trace.json.gz    for chrome://tracing or ui.perfetto.dev
    runs/NAME/profile/top-ops.txt      the operations that took most time themselves

Only the main process records. Others wait for it in their collectives, which the trace shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile

from training.settings.schema import ProfileSettings

TOP = 40  # operations in the table


class ProfileWindow:
    """Records the steps of the settings, and writes the files at the window's end, or at the run's if that is first."""

    def __init__(self, settings: ProfileSettings | None, run_dir: Path, record: bool, say: Callable[[str], None]):
        self.folder, self.say = run_dir / "profile", say
        self.steps = range(settings.start_step, settings.start_step + settings.steps) if settings and record else ()
        self.profiler: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Surrounds the step with this index, counted from 0."""
        if step in self.steps and self.profiler is None:
            self.profiler = profile()  # of the CPU, and of the GPU where there is one
            self.profiler.start()
        yield
        if self.steps and step == self.steps[-1]:
            self.finish()

    def finish(self) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        self.folder.mkdir(exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=key, row_limit=TOP, max_name_column_width=80)
        (self.folder / "top-ops.txt").write_text(table)
        self.profiler, self.steps = None, ()
        self.say(f"profile written to {self.folder}")

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *problem: object) -> None:
        self.finish()
