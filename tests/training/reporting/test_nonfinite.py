import json
from pathlib import Path

import pytest

from data.tasks.vocabulary import recall_vocabulary
from tests.training.conftest import Prepared
from training.curriculum import Curriculum
from training.objective import Measured, Objective, objectives
from training.processes.signals import TrainingFault
from training.reporting.nonfinite import KEPT_FILES, keep_batch, stop_after

FAR = {"needle": 8}
NAN = Measured({"text": float("nan")}, {"text": 0.0}, {"text": 504.0}, grad_norm=float("inf"))


@pytest.fixture
def both(prepared: Prepared) -> list[Objective]:
    curriculum = Curriculum(prepared.settings.recall.curriculum, window=8, reach=21)
    vocabulary = recall_vocabulary(prepared.tokenizer, prepared.settings.recall.values)
    return objectives(prepared.settings, prepared.sources, vocabulary, curriculum, ranks=1)


def test_what_is_kept_is_the_batch_of_the_step_with_its_figures_and_text(
    prepared: Prepared, tmp_path: Path, both: list[Objective]
) -> None:
    said = keep_batch(tmp_path, both[0], NAN, 12, FAR, prepared.tokenizer)
    path = tmp_path / "skipped/step-000013-text-rank-0.json"
    assert said == f"its batch is in {path}"
    batch = both[0].micro_batch(12, both[0].plan(FAR), range(8), FAR)
    facts = json.loads(path.read_text())
    (kept,) = facts["micro_batches"]
    documents = batch.packing.documents
    assert kept["input_ids"] == batch.input_ids.tolist()
    assert kept["documents"] == (None if documents is None else documents.tolist())
    assert kept["targets"]["text"] == [*(tensor.tolist() for tensor in batch.targets["text"][:2]), None]
    assert (facts["step"], facts["objective"], facts["distances"], facts["rows"]) == (13, "text", FAR, [0])
    assert facts["measured"] == {"accuracy_text": "0.0", "grad_norm_text": "inf", "loss_text": "nan"}
    assert facts["text"] == [prepared.tokenizer.decode(row) for row in batch.input_ids.tolist()]


def test_recall_rows_are_kept_with_all_that_was_asked(
    prepared: Prepared, tmp_path: Path, both: list[Objective]
) -> None:
    keep_batch(tmp_path, both[1], Measured({}, {}, {}, grad_norm=float("nan")), 0, FAR, prepared.tokenizer)
    (kept,) = json.loads((tmp_path / "skipped/step-000001-recall-rank-0.json").read_text())["micro_batches"]
    batch = both[1].micro_batch(0, both[1].plan(FAR), range(8), FAR)
    for term, target in batch.targets.items():
        assert kept["targets"][term] == [part if part is None else part.tolist() for part in target]
    assert {"answer", "relay"} <= kept["targets"].keys()
    assert kept["documents"] is None


def test_a_run_that_skips_for_hours_does_not_fill_the_disk(
    prepared: Prepared, tmp_path: Path, both: list[Objective]
) -> None:
    (tmp_path / "skipped").mkdir()
    for i in range(KEPT_FILES):
        (tmp_path / f"skipped/{i}").touch()
    said = keep_batch(tmp_path, both[0], NAN, 12, FAR, prepared.tokenizer)
    assert said == f"{tmp_path}/skipped holds {KEPT_FILES} files already"
    assert len(list((tmp_path / "skipped").iterdir())) == KEPT_FILES


def test_the_run_ends_at_the_limit_and_not_before() -> None:
    stop_after(9, 10, step=30)
    with pytest.raises(TrainingFault, match=r"10 steps in a row(.|\n)*the last one step 31\n(.|\n)*skipped/"):
        stop_after(10, 10, step=31)
