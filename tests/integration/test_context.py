"""Rows shared by several processes (`training.context_parallel`): the run of one process, resumed and ended."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.integration.tiny_run import losses, metrics, run, start_ranks, wait_for_step, write_config

OPTIONS = {"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 9, "validate_every_steps": 2}
COLUMNS = ("loss_text", "loss_answer", "loss_relay", "accuracy_text", "grad_norm_text", "grad_norm_recall")


def figures(folder: Path, first: int = 0) -> list[float]:
    trained = [row[name] for step, row in metrics(folder).items() if step > first for name in COLUMNS]
    held_out = [row["bits_per_byte"] for step, row in metrics(folder, "validation").items() if step > first]
    return trained + held_out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(write_config(folder, **OPTIONS))
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    run(write_config(folder, context_parallel=2, **OPTIONS), processes=2)
    return folder


def test_two_processes_that_share_each_row_equal_one(alone: Path, shared: Path) -> None:
    assert figures(shared) == pytest.approx(figures(alone), rel=1e-4)
    probes = [metrics(folder, "probe") for folder in (alone, shared)]
    assert [row["accuracy"] for row in probes[0].values()] == [row["accuracy"] for row in probes[1].values()]


def resumed(source: Path, folder: Path, processes: int, parts: int) -> Path:
    """A copy of the run in `source`, resumed at step 2 of 4."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("step-000004"))
    for name in ("tiny.yaml", "run/settings.yaml"):
        (folder / name).write_text((folder / name).read_text().replace(str(source), str(folder)))
    overrides = (f"training.context_parallel={parts}", "--resume", str(folder / "run/checkpoints/step-000002"))
    assert "at step 2" in run(folder / "tiny.yaml", *overrides, processes=processes)
    return folder


def test_resume_is_bit_equal(shared: Path, tmp_path: Path) -> None:
    again = resumed(shared, tmp_path, processes=2, parts=2)
    assert losses(again) == losses(shared)
    assert (again / "run/hf/model.safetensors").read_bytes() == (shared / "run/hf/model.safetensors").read_bytes()


def test_one_process_goes_on_with_what_two_that_shared_rows_saved(shared: Path, tmp_path: Path) -> None:
    again = resumed(shared, tmp_path, processes=1, parts=1)
    assert figures(again) == pytest.approx(figures(shared), rel=1e-4)


def test_four_processes_in_two_groups_go_on_with_what_one_saved(alone: Path, tmp_path: Path) -> None:
    again = resumed(alone, tmp_path, processes=4, parts=2)
    assert figures(again) == pytest.approx(figures(alone), rel=1e-4)


def test_processes_that_are_no_multiple_of_the_parts_are_refused(tmp_path: Path) -> None:
    output = run(write_config(tmp_path, context_parallel=2, max_steps=2), expect=2)
    assert "training.context_parallel is 2, and this run has 1 process; start it with a multiple of 2" in output
    assert "Traceback" not in output


def test_when_a_neighbour_is_killed_the_others_end_with_a_sentence(tmp_path: Path) -> None:
    config = write_config(tmp_path, context_parallel=3, max_steps=2000)
    processes = start_ranks(config, processes=3)
    wait_for_step(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGKILL)
    for process in (processes[0], processes[2]):
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 1, out + errors
        assert "fault: another process of this run has ended, so this one ends too" in errors
        assert "Traceback" not in errors
    processes[1].communicate(timeout=60)
