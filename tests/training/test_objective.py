"""The work of a step: which head runs at which position."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from model.decoder import build_model
from model.packing import Packing
from tests.model.tiny import tiny_model
from tests.training.conftest import Prepared
from training.cross_entropy import Score
from training.objective import (
    Measured,
    Plan,
    Scorer,
    Target,
    TextObjective,
    Work,
    differentiate,
    measured_names,
    step_flops,
    weighted_loss,
)
from training.settings.build import model_config
from training.settings.schema import Settings


def test_relay_positions_are_charged_the_relay_head_and_not_the_vocabulary() -> None:
    """The difference that scored positions make, against what torch counts."""
    decoder = tiny_model([{"window": 5}])
    scorer = Scorer(decoder, relay_values=3)
    ids, plan = torch.arange(20).view(2, 10), Plan(rows=2, seq_len=10, micro_rows=2)
    packing = Packing.of_whole_rows(10, ids.device)

    def counted(scored: int, relayed: int) -> int:
        targets = {"text": Target(torch.arange(scored), torch.zeros(scored, dtype=torch.long))}
        targets["relay"] = Target(torch.arange(relayed), torch.zeros(relayed, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            weighted_loss(scorer(ids, packing, targets), torch.ones(2), torch.ones(2), ranks=1).backward()
        return counter.get_total_flops()

    def expected(scored: int, relayed: int) -> float:
        return step_flops(decoder.config, plan, scored, relayed, relay_values=3)

    assert counted(12, 5) - counted(7, 5) == expected(12, 5) - expected(7, 5)
    assert counted(7, 9) - counted(7, 5) == expected(7, 9) - expected(7, 5)
    assert step_flops(decoder.config, plan, 7) == expected(7, 0)


def test_the_loss_is_the_mean_over_the_tokens_of_all_ranks_times_the_ranks() -> None:
    scores = {
        term: Score(torch.tensor(total), torch.ones(1), torch.tensor([total]))
        for term, total in (("answer", 6.0), ("text", 8.0))
    }
    loss = weighted_loss(scores, torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.0]), ranks=2)
    assert loss.item() == 2 * (6 / 3 + 0.5 * 8)


def test_columns_are_means_by_term_and_by_task_where_there_are_several() -> None:
    right = {"answer": 2.0, "text": 0.0, "needle": 1.0, "keys": 1.0}
    count = {"answer": 4.0, "text": 0.0, "needle": 1.0, "keys": 3.0}
    loss = {"answer": 6.0, "text": 0.0, "needle": 3.0, "keys": 3.0}
    measured = Measured(loss, right, count, grad_norm=2.0)
    assert measured.columns("recall") == {
        "grad_norm_recall": 2.0, "loss_answer": 1.5, "accuracy_answer": 0.5, "loss_text_of_recall": 0.0,
        "accuracy_text_of_recall": 0.0, "loss_needle": 3.0, "accuracy_needle": 1.0, "loss_keys": 1.0,
        "accuracy_keys": pytest.approx(1 / 3),
    }  # fmt: skip
    assert measured.finite
    del right["keys"], count["keys"]
    assert measured.columns("recall").keys() == {
        "grad_norm_recall", "loss_answer", "accuracy_answer", "loss_text_of_recall", "accuracy_text_of_recall"
    }  # fmt: skip
    assert not Measured({"text": float("nan")}, {}, {}, grad_norm=1.0).finite
    assert not Measured({"text": 1.0}, {}, {}, grad_norm=float("inf")).finite


def test_losses_of_text_by_source_add_up_to_the_loss_of_text(prepared: Prepared) -> None:
    """The figures of `differentiate` for two sources, against the loss at the labels of each."""
    alone = prepared.sources[""]
    described = prepared.settings.model_dump()
    files = {name: described["data"].pop(name) for name in ("source", "train_files", "heldout_files")}
    described["data"]["sources"] = [files | {"name": name, "weight": w} for name, w in (("web", 0.7), ("books", 0.3))]
    settings = Settings.model_validate(described)
    objective = TextObjective(settings, {"web": alone, "books": alone}, ranks=1)
    assert objective.groups == ("text_web", "text_books")
    scorer = Scorer(build_model(model_config(settings, prepared.tokenizer.vocab_size), seed=0), None)
    batches = [micro.padded() for micro in objective.micro_batches(3, {}, 0)]
    figures = differentiate(objective, Accelerator(cpu=True), scorer, Work.of(objective, batches)).tolist()
    measured: dict[str, dict[str, float]] = {}
    for (what, name), figure in zip(measured_names(objective), figures, strict=False):
        measured.setdefault(what, {})[name] = figure
    for sums in measured.values():
        assert sums["text_web"] + sums["text_books"] == pytest.approx(sums["text"], rel=1e-5)
    (batch,) = objective.micro_batches(3, {}, 0)
    with torch.no_grad():
        score = scorer(batch.input_ids, batch.packing, batch.targets)["text"]
    groups = batch.targets["text"].groups
    assert groups is not None
    for number, name in enumerate(objective.groups):
        assert measured["loss"][name] == pytest.approx(score.losses[groups == number].sum().item(), rel=1e-4)
        assert measured["count"][name] == (groups == number).sum() > 0
    columns = Measured(**measured).columns("text")
    assert {"loss_text", "loss_text_web", "accuracy_text_web", "loss_text_books"} <= columns.keys()
