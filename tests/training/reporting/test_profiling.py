import gzip
import json
from pathlib import Path

import torch

from training.reporting.profiling import profiled
from training.settings.config_file import load_settings
from training.settings.consistency import inconsistencies
from training.settings.generate import ROOT
from training.settings.schema import ProfileSettings


def work(size: int) -> None:
    torch.ones(size, size) @ torch.ones(size, size)


def run(folder: Path, first: int, last: int, window: ProfileSettings | None) -> list[str]:
    """Steps `first` to `last` - 1; step i multiplies matrices of size i + 1. Returns the messages."""
    said: list[str] = []
    with profiled(window, folder, first, said.append) as after_step:
        for step in range(first, last):
            work(step + 1)
            after_step()
    return said


def products(folder: Path) -> int:
    events = json.loads(gzip.decompress((folder / "profile/trace.json.gz").read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::matmul" for event in events)


def test_window_records_its_steps_alone_and_names_the_top_operations(tmp_path: Path) -> None:
    assert run(tmp_path, 0, 9, ProfileSettings(start_step=3, steps=2)) == [f"profile written to {tmp_path / 'profile'}"]
    assert products(tmp_path) == 2
    table = (tmp_path / "profile/top-ops.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table


def test_run_that_ends_inside_the_window_leaves_what_was_recorded(tmp_path: Path) -> None:
    run(tmp_path, 0, 4, ProfileSettings(start_step=3, steps=10))
    assert products(tmp_path) == 1


def test_run_resumed_inside_the_window_records_the_rest_of_it(tmp_path: Path) -> None:
    run(tmp_path, 4, 9, ProfileSettings(start_step=3, steps=3))
    assert products(tmp_path) == 2


def test_nothing_is_written_without_a_window_or_outside_it(tmp_path: Path) -> None:
    assert run(tmp_path, 0, 4, None) == []
    assert run(tmp_path, 0, 4, ProfileSettings(start_step=5, steps=1)) == []
    assert run(tmp_path, 6, 9, ProfileSettings(start_step=4, steps=2)) == []
    assert not (tmp_path / "profile").exists()


def test_window_after_the_last_step_is_refused() -> None:
    settings = load_settings(ROOT / "configs/smoke.yaml")
    late = settings.training.model_copy(update={"profile": ProfileSettings(start_step=settings.training.max_steps)})
    (problem,) = inconsistencies(settings.model_copy(update={"training": late}))
    assert problem.keys == ("training", "profile", "start_step")
    assert "training.max_steps = 40, so nothing is recorded" in problem.what
