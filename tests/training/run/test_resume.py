import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tasks.vocabulary import recall_vocabulary
from model.errors import UserError
from tests.training.conftest import Prepared
from tests.training.run.test_folder import changed, opened
from training.curriculum import Curriculum, CurriculumState, State
from training.objective import Objective, objectives, step_plan
from training.run.folder import check_same_batches, check_same_data, decide_once

HERE = Path("runs/a/checkpoints/step-000003")


def for_processes(prepared: Prepared, processes: int, **dotted: Any) -> list[Objective]:
    settings = changed(prepared.settings, **dotted)
    curriculum = Curriculum(settings.recall.curriculum, window=8, reach=21)
    vocabulary = recall_vocabulary(prepared.tokenizer, settings.recall.values)
    return objectives(settings, prepared.sources, vocabulary, curriculum, processes)


def needle(first: int, end: int) -> list[dict[str, int]]:
    return [{"needle": distance} for distance in range(first, end)]


def test_progress_survives_json_also_that_of_the_first_version() -> None:
    """The first version kept the curriculum one level deeper."""
    state = State(step=3, curriculum={"needle": CurriculumState(24, 0.5), "keys": CurriculumState(16)})
    saved = json.loads(json.dumps(asdict(state)))
    assert State.of(saved) == state
    assert State.of(saved | {"curriculum": {"states": saved["curriculum"]}}) == state


def test_distances_are_logged_by_task_where_there_are_several() -> None:
    one, two = {"needle": CurriculumState(24)}, {"needle": CurriculumState(24), "keys": CurriculumState(16)}
    assert State(curriculum=one).columns() == {"distance": 24}
    assert State(curriculum=two).columns() == {"distance": 24, "distance_needle": 24, "distance_keys": 16}


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_numbers_of_processes_that_divide_the_rows_are_fine(prepared: Prepared, processes: int) -> None:
    now = for_processes(prepared, processes)
    assert [o.plan({"needle": 8}).rows for o in now] == [8, 8]
    check_same_batches(HERE, now, 1, needle(8, 22))


def test_smaller_micro_batches_keep_the_rows_of_every_process() -> None:
    whole, cut = (step_plan(512, 64, micro_batch_tokens, ranks=2) for micro_batch_tokens in (None, 128))
    for rank in (0, 1):
        rows = [[row for rows in plan.micro_ranges(rank, 2) for row in rows] for plan in (whole, cut)]
        assert rows[0] == rows[1] == list(range(4 * rank, 4 * rank + 4))
    assert len(cut.micro_ranges(0, 2)) == 2 > len(whole.micro_ranges(0, 2))


def test_a_number_that_does_not_divide_them_is_refused(prepared: Prepared) -> None:
    with pytest.raises(UserError) as caught:
        check_same_batches(HERE, for_processes(prepared, 3), 2, needle(8, 22))
    assert str(caught.value) == (
        f"{HERE}: was saved by 2 processes; 3 would train on other batches\n"
        "  a step has 8 rows of text, which 3 can't share equally\n"
        "  start it with 2 processes, or with a number that divides 8"
    )


def test_rows_that_only_a_later_distance_has_are_looked_at(prepared: Prepared) -> None:
    """192 tokens are six rows of 32 while D + 2W fits into them, up to D = 16, and three of 64 after."""
    lengths = {"recall__curriculum__row_lengths": [32], "recall__tokens_per_step": 192}
    now = for_processes(prepared, 2, **lengths)
    check_same_batches(HERE, now, 1, needle(8, 17))
    with pytest.raises(UserError, match="a step has 3 rows of recall at distance 17, which 2 can't share equally"):
        check_same_batches(HERE, now, 1, needle(8, 22))


@pytest.mark.parametrize(
    ("fact", "other", "expected"),
    [
        ("data_sha256", {"train": "0", "heldout": "0"}, "the text under this run has changed"),
        ("tokenizer_sha256", "0", "was trained with another tokenizer"),
    ],
)
def test_a_checkpoint_made_from_other_text_or_tokens_is_refused(
    prepared: Prepared, tmp_path: Path, fact: str, other: Any, expected: str
) -> None:
    settings = changed(prepared.settings, run_dir=str(tmp_path / "run"))
    opened(settings, "auto")
    facts = decide_once(settings, prepared.tokenizer, prepared.sources, torch.device("cpu"))
    check_same_data(HERE, facts, facts)
    with pytest.raises(UserError, match=expected):
        check_same_data(HERE, facts, facts | {fact: other})
