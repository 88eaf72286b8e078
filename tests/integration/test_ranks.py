"""The same step, however it is cut: accumulated, at once, or over two processes."""

from pathlib import Path

import pytest

from tests.integration.tiny_run import metrics, run, write_config


def figures(folder: Path) -> list[float]:
    return [
        row[k] for row in metrics(folder).values() for k in ("loss_text", "loss_answer", "loss_relay", "grad_norm_text")
    ]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("once")
    run(write_config(folder, max_steps=5))
    return figures(folder)


def test_one_row_eight_times_equals_eight_rows_once(tmp_path: Path, at_once: list[float]) -> None:
    run(write_config(tmp_path, max_steps=5, micro_batch_tokens=64))
    assert figures(tmp_path) == pytest.approx(at_once, rel=1e-3)


def test_two_processes_equal_one(tmp_path: Path, at_once: list[float]) -> None:
    output = run(write_config(tmp_path, max_steps=5), processes=2)
    assert figures(tmp_path) == pytest.approx(at_once, rel=1e-3)
    assert output.count("done: 5 steps") == 1


def test_a_mistake_found_by_the_main_process_ends_both(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_steps=2))
    output = run(tmp_path / "tiny.yaml", "training.optimizer.lr=0.5", processes=2, expect=1)
    assert "holds a run with other settings" in output


def test_two_processes_that_share_out_muon_equal_one(tmp_path: Path) -> None:
    muon = {"max_steps": 5, "optimizer": {"kind": "muon", "lr": 0.003}}
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        run(write_config(folder, **muon), processes=processes)
    assert figures(two) == pytest.approx(figures(one), rel=3e-3)
