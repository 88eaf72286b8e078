"""Ten kills of kill_test.py, and its checks. Runs are forks of one process that has imported everything, to be fast."""

import shutil
from pathlib import Path

from tests.integration.kill_test import KINDS, Kill, Victims, newest, start_fork
from tests.integration.template import ROOT

CONFIG = ROOT / "configs/tiny.yaml"


def test_ten_kills_at_random_moments_lose_nothing_but_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    victims = Victims(CONFIG, ["training.max_steps=30"], tmp_path, start_fork, seed=3)
    kills = list(victims.kill(10))
    assert victims.result.problems == []
    assert len(kills) == 10
    assert max(kill.step - kill.checkpoint for kill in kills) <= victims.save_every
    assert victims.result.resumes >= 3
    assert {kill.kind for kill in kills} == set(KINDS)


def test_other_figures_other_weights_and_lost_checkpoints_are_noticed(tmp_path: Path) -> None:
    """The checks above can fail: with a checkpoint cut short, checkpoints removed, and another seed."""
    victims = Victims(CONFIG, ["training.max_steps=12"], tmp_path, start_fork, seed=0)
    list(victims.kill(0))
    reference, other = tmp_path / "reference", tmp_path / "other"
    victims.check_kill(reference, Kill("step", 12, newest(reference), while_writing=False))
    assert victims.result.problems == []

    (reference / "checkpoints/step-000012/hf/model.safetensors").write_bytes(b"")
    victims.check_kill(reference, Kill("step", 12, 12, while_writing=False))
    assert "reference: step-000012 is broken: " in victims.result.problems[0]
    shutil.rmtree(reference / "checkpoints")
    victims.check_kill(reference, Kill("step", 12, newest(reference), while_writing=False))
    assert victims.result.problems[1:] == ["reference: killed at step 12, checkpoint 10 is missing"]

    victims.arguments.append("seed=1")
    victims.run_to_end(other)
    victims.check_end(other)
    assert any("train of step 1 differs in" in problem for problem in victims.result.problems)
    assert "other: the weights at the end are not those of the reference" in victims.result.problems
