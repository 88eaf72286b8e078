"""Training on conversations: the loss and its gradient come from the answers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState

from data.mixture import Source, open_sources, prepare_sources
from data.tokenizer import prepare_tokenizer
from model.decoder import WindreachForCausalLM, build_model
from tests.integration import tiny_run
from training.curriculum import Curriculum
from training.objective import Scorer, TextObjective, Work, differentiate
from training.reporting.probe import Probe
from training.settings.build import model_config
from training.settings.schema import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("chat")
    return Settings.model_validate(json.loads(tiny_run.write_chat(folder).read_text()))


@pytest.fixture(scope="module")
def source(settings: Settings) -> Source:
    tokenizer = prepare_tokenizer(settings)
    (source,) = open_sources(prepare_sources(settings, tokenizer), tokenizer, settings.data).values()
    return source


def decoder_of(settings: Settings) -> WindreachForCausalLM:
    return build_model(model_config(settings, prepare_tokenizer(settings).vocab_size), seed=0)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def by_hand(decoder: WindreachForCausalLM, settings: Settings, file: str) -> tuple[torch.Tensor, int]:
    """The loss of each conversation alone, unpacked: the mean over the tokens of the answers, found in the text."""
    tokenizer = prepare_tokenizer(settings)
    losses, n = [], 0
    for line in Path(file).read_text().splitlines():
        user, answer = json.loads(line)["messages"]
        prompt = tokenizer.encode(f"user:\n{user['content']}\nassistant:\n")
        scored = [*tokenizer.encode(answer["content"]), tokenizer.eos_id]
        ids = torch.tensor([[*prompt, *scored, *tokenizer.encode("\n")]])
        logits = decoder(ids).logits[0, len(prompt) - 1 : len(prompt) + len(scored) - 1]
        losses.append(F.cross_entropy(logits, torch.tensor(scored), reduction="sum"))
        n += len(scored)
    return torch.stack(losses).sum() / n, n


@pytest.mark.parametrize("micro_batch_tokens", [None, 64])
def test_the_gradient_is_that_of_the_answers_each_in_its_own_conversation(
    settings: Settings, source: Source, micro_batch_tokens: int | None
) -> None:
    """All rows in one step, packed, against each conversation alone; micro-batches have unequal numbers of answers."""
    rows = len(source.rows)
    training = settings.training.model_copy(
        update={"tokens_per_step": rows * settings.data.seq_len, "micro_batch_tokens": micro_batch_tokens}
    )
    objective = TextObjective(settings.model_copy(update={"training": training}), {"": source}, ranks=1)
    batches = objective.micro_batches(0, {}, 0)
    assert (len({len(batch.targets["text"].labels) for batch in batches}) > 1) == (micro_batch_tokens is not None)
    scorer, alone = Scorer(decoder_of(settings), None), decoder_of(settings)
    figures = differentiate(objective, Accelerator(cpu=True), scorer, Work.of(objective, batches)).tolist()
    loss, n = by_hand(alone, settings, *settings.data.train_files)
    loss.backward()
    assert figures[2] == n
    assert figures[0] / n == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients(alone)
    for name, gradient in gradients(scorer.decoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_micro_batch_without_an_answer_adds_nothing(settings: Settings, source: Source) -> None:
    objective = TextObjective(settings, {"": source}, ranks=1)
    (batch,) = objective.micro_batches(0, {}, 0)[:1]
    target = batch.targets["text"]
    empty = batch._replace(targets={"text": target._replace(index=target.index[:0], labels=target.labels[:0])})
    for micro in (empty, empty.padded()):
        scorer = Scorer(decoder_of(settings), None)
        figures = differentiate(objective, Accelerator(cpu=True), scorer, Work.of(objective, [micro]))
        assert not any(gradient.any() for gradient in gradients(scorer).values())
        assert figures.tolist()[0] == 0.0


def test_validation_is_bits_per_byte_of_the_answers(settings: Settings, source: Source) -> None:
    """Against the loss at the labels and the bytes of the answers in the text."""
    PartialState(cpu=True)
    decoder = decoder_of(settings)
    whole: dict[str, Any] = {"validation_tokens": 10**6}
    settings = settings.model_copy(update={"training": settings.training.model_copy(update=whole)})
    expected, n = by_hand(decoder, settings, *settings.data.heldout_files)
    n_bytes = sum(
        len(json.loads(line)["messages"][1]["content"].encode())
        for line in Path(settings.data.heldout_files[0]).read_text().splitlines()
    )
    curriculum = Curriculum(settings.recall.curriculum, 8, 8)
    found = Probe(settings, {"": source.heldout}, None, curriculum).text(decoder)[""]
    assert found == pytest.approx(expected.item() * n / n_bytes / 0.6931471805599453, rel=1e-4)
