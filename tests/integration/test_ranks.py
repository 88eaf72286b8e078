"""A step is the same accumulated, at once, or on two processes. If one process dies, the other ends with a message."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.template import ROOT, Forked
from tests.integration.tiny_run import (
    metrics,
    run,
    start_as_a_user,
    start_ranks,
    wait_for_step,
    write_chat,
    write_config,
    write_mixture,
)
from training.run.checkpoint import checkpoints


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


def test_two_processes_with_unequal_numbers_of_answer_tokens_equal_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder, processes in ((one, 1), (two, 2)):
        run(write_chat(folder, max_steps=4), processes=processes)
    steps, same = [
        [row[k] for row in metrics(folder).values() for k in ("loss_text", "grad_norm_text")] for folder in (one, two)
    ]
    assert steps == pytest.approx(same, rel=1e-3)
    validated = [metrics(folder, "validation")[4]["bits_per_byte"] for folder in (one, two)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-3)


def test_two_processes_of_accelerate_launch_equal_one_and_end_together_on_a_mistake(
    tmp_path: Path, at_once: list[float]
) -> None:
    config = write_config(tmp_path, max_steps=5)
    process = start_as_a_user(config, processes=2)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert figures(tmp_path) == pytest.approx(at_once, rel=1e-3)
    assert out.count("done: 5 steps") == 1
    assert run(config, "training.optimizer.lr=0.5", processes=2, expect=2).count("with other settings") == 2


EXCHANGE = """
from accelerate.utils import gather_object
from training.processes.ranks import ask_main, join_ranks, sum_over_ranks
from training.processes.signals import end_process

join_ranks()
for i in range(5):
    assert sum_over_ranks({"a": 1.0}) == {"a": 2.0} and ask_main(lambda: i) == i and gather_object([i]) == [i, i]
end_process(0)
"""


def test_two_processes_end_without_an_abort_in_the_transport(tmp_path: Path) -> None:
    """Without `end_process` this program nearly always ends in an abort, and a real run sometimes does."""
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "exchange.py"]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# -- another number of processes --------------------------------------------------------------------------------------


def test_one_process_then_two_then_one_see_the_same_batches_as_one_alone(tmp_path: Path) -> None:
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    for folder in (alone, changing):
        folder.mkdir()
        write_config(folder, max_steps=9)
    run(alone / "tiny.yaml")
    config = changing / "tiny.yaml"
    stopped_at = []
    for processes, step in ((1, 2), (2, 5)):
        stop_after_step(changing, step, start_ranks(config, processes=processes))
        stopped_at.append(max(metrics(changing)))
    assert f"at step {stopped_at[-1]}" in run(config)
    assert stopped_at[0] < stopped_at[1] < 9
    assert figures(changing) == pytest.approx(figures(alone), rel=1e-3)
    rows = [metrics(f) for f in (alone, changing)]
    for column in ("tokens", "distance", "lr"):
        assert [r[column] for r in rows[0].values()] == [r[column] for r in rows[1].values()]


def test_two_processes_that_go_on_with_a_mixture_of_one_see_its_batches(tmp_path: Path) -> None:
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    for folder in (alone, changing):
        folder.mkdir()
        write_mixture(folder, max_steps=6)
    run(alone / "tiny.yaml")
    stop_after_step(changing, 2, start_ranks(changing / "tiny.yaml", processes=1))
    assert 2 <= max(metrics(changing)) < 6
    run(changing / "tiny.yaml", processes=2)
    assert figures(changing) == pytest.approx(figures(alone), rel=1e-3)
    for source in ("web", "books"):
        by_source = [[row[f"loss_text_{source}"] for row in metrics(folder).values()] for folder in (alone, changing)]
        assert by_source[0] == pytest.approx(by_source[1], rel=1e-3)


def test_processes_that_cannot_share_a_step_equally_are_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=2)
    run(config)
    output = run(config, processes=3, expect=2)
    assert "step-000002: was saved by 1 process; 3 would train on other batches" in output
    assert "a step has 8 rows of text, which 3 can't share equally" in output
    assert "start it with 1 process, or with a number that divides 8" in output
    assert "Traceback" not in output


def stop_after_step(folder: Path, step: int, processes: list[Forked]) -> None:
    """SIGTERM to every process once `step` is logged; each must end with code 75."""
    wait_for_step(folder, step, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 75, errors


# -- one of two dies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_rank_dies_the_other_ends_within_a_minute_with_a_message(tmp_path: Path, victim: int) -> None:
    config = write_config(tmp_path, max_steps=2000, save_every_steps=3)
    processes = start_ranks(config, processes=2)
    wait_for_step(tmp_path, 4, processes)
    processes[victim].send_signal(signal.SIGKILL)
    out, errors = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == 1, out + errors
    assert "fault: another process of this run has ended, so this one ends too" in errors
    assert "the same command goes on from the last checkpoint" in errors
    assert "Traceback" not in errors
    processes[victim].communicate(timeout=300)
    assert checkpoints(tmp_path / "run")


def test_a_signal_to_launcher_and_ranks_alike_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    """As from a terminal or a batch system. The launcher hands it on, so that each rank gets it twice."""
    config = write_config(tmp_path, max_steps=2000, save_every_steps=1000)
    launcher = start_as_a_user(config, processes=2)
    wait_for_step(tmp_path, 2, [launcher])
    os.killpg(launcher.pid, signal.SIGTERM)
    out, errors = launcher.communicate(timeout=300)
    assert errors.count("SIGTERM: finishing this step, then a checkpoint") == 2
    assert out.count("stopped at step") == 1
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_when_the_launcher_is_killed_its_processes_write_a_checkpoint_and_end(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=2000, save_every_steps=1000)
    launcher = start_as_a_user(config, processes=2)
    wait_for_step(tmp_path, 2, [launcher])
    launcher.kill()
    _, errors = launcher.communicate(timeout=300)  # until its processes, which have the same streams, have ended
    assert errors.count("SIGTERM: finishing this step, then a checkpoint") == 2
    assert len(checkpoints(tmp_path / "run")) == 1


def test_two_processes_that_share_out_muon_equal_one(tmp_path: Path) -> None:
    muon = {"max_steps": 5, "optimizer": {"kind": "muon", "lr": 0.003}}
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        run(write_config(folder, **muon), processes=processes)
    assert figures(two) == pytest.approx(figures(one), rel=3e-3)
