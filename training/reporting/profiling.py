"""A window of steps under `torch.profiler`: where the time goes, as a trace and as a table.

    runs/NAME/profile/trace.json.gz    for chrome://tracing or ui.perfetto.dev
    runs/NAME/profile/top-ops.txt      the operations that took most time themselves

Only the main process records. Others wait for it in their collectives, which the trace shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, profile

from training.settings.schema import ProfileSettings


@contextmanager
def profiled(
    settings: ProfileSettings | None, run_dir: Path, step: int, say: Callable[[str], None]
) -> Iterator[Callable[[], object]]:
    """Records the steps that the settings name; yields a function that must be called after every step.

    `step` is the index of the first step of this start. The files are written at the window's end, or at the run's.
    """
    if settings is None:
        yield lambda: None
        return
    folder, first = run_dir / "profile", settings.start_step - step
    last = first + settings.steps - 1
    actions = dict.fromkeys(range(first, last), ProfilerAction.RECORD) | {last: ProfilerAction.RECORD_AND_SAVE}

    def write(profiler: profile) -> None:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
        (folder / "top-ops.txt").write_text(table)
        say(f"profile written to {folder}")

    with profile(schedule=lambda done: actions.get(done, ProfilerAction.NONE), on_trace_ready=write) as profiler:
        yield profiler.step
