"""The teacher: what it says, what it costs, and which models can't be one."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM, build_model
from model.errors import UserError
from model.hub import save_hf
from tests.training.conftest import Prepared
from training.distillation import Teacher, load_teacher, teacher_config, teacher_hash
from training.objective import DISTILLATION, Scorer, TextObjective, Work, differentiate, measured_names, teacher_flops
from training.settings.build import model_config
from training.settings.schema import Settings


def with_teacher(prepared: Prepared, folder: Path, weight: float = 0.5, temperature: float = 2.0) -> Settings:
    described = prepared.settings.model_dump()
    described["training"]["distillation"] = {"weight": weight, "temperature": temperature, "teacher": str(folder)}
    return Settings.model_validate(described)


def other_config(prepared: Prepared, **changed: object) -> WindreachConfig:
    """A narrower model with other layers."""
    config = model_config(prepared.settings, prepared.tokenizer.vocab_size)
    fields = {"hidden_size": 16, "layers": [{"kind": "full"}, {"window": 8}, {"window": 3}]} | changed
    kept = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version", *fields)}
    return WindreachConfig(**kept, **fields)


@pytest.fixture
def folder(prepared: Prepared, tmp_path: Path) -> Path:
    save_hf(build_model(other_config(prepared), seed=5), tmp_path / "teacher", tokenizer=prepared.tokenizer)
    return tmp_path / "teacher"


def load(settings: Settings, prepared: Prepared) -> Teacher:
    vocab_size = prepared.tokenizer.vocab_size
    teacher = load_teacher(settings, prepared.tokenizer, vocab_size, torch.device("cpu"))
    assert teacher is not None
    return teacher


def scorer_and_work(prepared: Prepared, folder: Path) -> tuple[TextObjective, Scorer, Work]:
    settings = with_teacher(prepared, folder)
    objective = TextObjective(settings, prepared.sources, ranks=1)
    decoder = build_model(model_config(settings, prepared.tokenizer.vocab_size), seed=0)
    scorer = Scorer(decoder, None, teacher=load(settings, prepared))
    return objective, scorer, Work.of(objective, objective.micro_batches(3, {}, 0))


def test_the_gradient_of_a_step_is_that_of_both_whole_models(prepared: Prepared, folder: Path) -> None:
    """Logits of all positions, torch's own divergence, and the mean over the scored tokens."""
    objective, scorer, work = scorer_and_work(prepared, folder)
    figures = differentiate(objective, Accelerator(cpu=True), scorer, work).tolist()
    gradients = {name: p.grad.clone() for name, p in scorer.decoder.named_parameters() if p.grad is not None}
    scorer.zero_grad()

    teacher = WindreachForCausalLM.from_pretrained(folder)
    losses, divergences = [], []
    for batch in work.micro_batches:
        at, labels = batch.targets["text"].index, batch.targets["text"].labels
        documents = batch.packing.documents
        ours = scorer.decoder(batch.input_ids, documents=documents).logits.flatten(0, 1)[at]
        with torch.no_grad():
            theirs = teacher(batch.input_ids, documents=documents).logits.flatten(0, 1)[at]
        losses.append(torch.nn.functional.cross_entropy(ours, labels, reduction="sum"))
        both = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        divergences.append(4 * torch.nn.functional.kl_div(*both, log_target=True, reduction="sum"))
    loss, divergence, count = torch.stack(losses).sum(), torch.stack(divergences).sum(), work.counts[0].item()
    ((loss + 0.5 * divergence) / count).backward()
    for name, p in scorer.decoder.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)
    measured = dict(zip(measured_names(objective), figures, strict=False))
    assert measured["loss", DISTILLATION] == pytest.approx(divergence.item(), rel=1e-4)
    assert measured["loss", "text"] == pytest.approx(loss.item(), rel=1e-4)
    assert measured["count", DISTILLATION] == measured["count", "text"] == count


def test_a_teacher_is_neither_trained_nor_saved(prepared: Prepared, folder: Path) -> None:
    _, scorer, _ = scorer_and_work(prepared, folder)
    assert scorer.teacher is not None
    weights = {id(p) for p in scorer.teacher.decoder.parameters()}
    assert not weights & {id(p) for p in scorer.parameters()}
    assert not any(p.requires_grad for p in scorer.teacher.decoder.parameters())
    assert not [name for name in scorer.state_dict() if "teacher" in name]


def test_the_flops_of_a_teacher_are_those_that_torch_counts(prepared: Prepared, folder: Path) -> None:
    """Its head runs at the scored positions; attention computes more than the visible keys, which alone are counted."""
    settings = with_teacher(prepared, folder)
    teacher = load(settings, prepared)
    objective = TextObjective(settings, prepared.sources, ranks=1)
    plan = objective.plan({})
    batch = objective.micro_batch(0, plan, range(plan.rows), {})

    def counted(scored: int) -> float:
        with FlopCounterMode(display=False) as counter:
            lesson = teacher.lesson(batch.input_ids, batch.packing, batch.targets["text"].index[:scored])
            _ = lesson.hidden_nf @ lesson.weight_vf.mT
        return counter.get_total_flops()

    config = teacher.decoder.config
    head = teacher_flops(config, plan, 12) - teacher_flops(config, plan, 5)
    assert counted(12) - counted(5) == head == 7 * 2 * config.hidden_size * config.vocab_size
    assert teacher_flops(config, plan, 12) < counted(12) < 2 * teacher_flops(config, plan, 12)


def test_a_teacher_of_another_vocabulary_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    save_hf(build_model(other_config(prepared, vocab_size=99)), tmp_path)
    with pytest.raises(UserError) as refused:
        load(with_teacher(prepared, tmp_path), prepared)
    said = str(refused.value)
    assert said.startswith(f"training.distillation: the teacher '{tmp_path}': it has 99 tokens and the model 400\n")
    assert "give a teacher with the same vocabulary, or data.tokenizer.model_file the tokenizer of the teacher" in said


def test_a_teacher_whose_tokens_have_other_numbers_is_refused(prepared: Prepared, folder: Path) -> None:
    (folder / "tokenizer.model").unlink()  # it says the same, and is read first
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    *_, one, other = vocabulary
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match="its tokenizer has other tokens"):
        load(with_teacher(prepared, folder), prepared)


def test_a_teacher_whose_context_is_shorter_than_a_row_is_refused_also_in_a_later_stage(
    prepared: Prepared, tmp_path: Path
) -> None:
    save_hf(build_model(other_config(prepared, max_position_embeddings=64)), tmp_path, tokenizer=prepared.tokenizer)
    described = with_teacher(prepared, tmp_path).model_dump()
    assert described["data"]["seq_len"] == 64
    teacher_config(Settings.model_validate(described))
    described["training"]["stages"] = [{"start": 0.5, "set": {"data.seq_len": 128}}]
    for refuse in (teacher_config, lambda settings: load(settings, prepared)):
        with pytest.raises(UserError, match=r"its context is 64 tokens, and rows have data.seq_len = 128\n  give a te"):
            refuse(Settings.model_validate(described))


def test_a_missing_teacher_is_named_by_its_setting(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training.distillation: the teacher .*/none.: there is no such folder"):
        teacher_config(with_teacher(prepared, tmp_path / "none"))


def test_the_hash_is_that_of_the_weights(prepared: Prepared, folder: Path) -> None:
    settings = with_teacher(prepared, folder)
    before = teacher_hash(settings)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert before is not None
    assert teacher_hash(settings) not in (None, before)
    assert teacher_hash(prepared.settings) is None
