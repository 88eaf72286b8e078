"""Ten of the hundred kills. Starts are forks of one process that has imported everything: ten are affordable so."""

from collections import Counter
from pathlib import Path

from tests.integration.kill_test import Victims, newest, rows
from tests.integration.template import ROOT, Forked

CONFIG = ROOT / "configs/tiny.yaml"


def start_fork(arguments: list[str], log: Path) -> Forked:
    return Forked(["train.py", *arguments], log)


def test_ten_kills_at_random_moments_lose_nothing_but_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    victims = Victims(CONFIG, ["training.max_steps=30"], tmp_path, start_fork, seed=3)
    kills = list(victims.kill(10))
    assert victims.result.problems == []
    assert len(kills) == 10
    assert max(kill.step - kill.checkpoint for kill in kills) <= victims.save_every
    assert victims.result.resumes >= 3
    assert len(Counter(kill.kind for kill in kills)) == 3


def test_a_row_that_differs_and_a_lost_checkpoint_are_found(tmp_path: Path) -> None:
    """The checks above can fail: another seed, and a checkpoint taken away."""
    victims = Victims(CONFIG, ["training.max_steps=12"], tmp_path, start_fork, seed=0)
    list(victims.kill(0))
    other = tmp_path / "other"
    victims.arguments.append("seed=1")
    victims.run_to_end(other)
    victims.check_end(other)
    assert any("train of step 1 differs in" in p for p in victims.result.problems)
    assert "other: the weights at the end are not those of the reference" in victims.result.problems
    assert newest(other) == 12
    assert ("train", 12) in rows(other)
