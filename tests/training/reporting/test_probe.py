import math

import pytest
import torch
import torch.nn.functional as F

from data.batches import Batch, text_batch
from data.mixture import ConcatRows, Mixture, Shares
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from data.token_store import TokenStore
from model.decoder import InitOptions, WindreachForCausalLM, build_model
from model.windows import reach
from tests.training.conftest import Prepared
from training.curriculum import Curriculum
from training.processes.context import Layout
from training.reporting.probe import Probe, horizon
from training.settings.build import model_config
from training.settings.schema import Settings

WINDOW, REACH = 8, 21


def with_training(settings: Settings, **training: object) -> Settings:
    return settings.model_copy(update={"training": settings.training.model_copy(update=training)})


@pytest.fixture
def decoder(prepared: Prepared) -> WindreachForCausalLM:
    config = model_config(prepared.settings, prepared.tokenizer.vocab_size)
    assert reach(config.specs) == REACH
    return build_model(config, InitOptions(), seed=0)


@pytest.fixture
def vocabulary(prepared: Prepared) -> RecallVocabulary:
    return recall_vocabulary(prepared.tokenizer, prepared.settings.recall.values)


def make_probe(prepared: Prepared, vocabulary: RecallVocabulary | None, **training: object) -> Probe:
    settings = with_training(prepared.settings, **training)
    curriculum = Curriculum(settings.recall.curriculum, WINDOW, REACH)
    return Probe(settings, {"": heldout(prepared)}, vocabulary, curriculum)


def heldout(prepared: Prepared) -> TokenStore:
    return prepared.sources[""].heldout


# -- text -------------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_pays_log_v_bits_a_token(prepared: Prepared, decoder: WindreachForCausalLM) -> None:
    """Logits that are all equal: bits per byte follow from the counts of tokens and bytes alone."""
    torch.nn.init.zeros_(decoder.lm_head.weight)
    rows, seq_len = 8, prepared.settings.data.seq_len
    labels = probed(prepared, rows).labels
    scored = labels[labels != -100]
    n_bytes = heldout(prepared).token_bytes[scored.numpy()].sum()
    expected = len(scored) * math.log2(prepared.tokenizer.vocab_size) / n_bytes
    measured = make_probe(prepared, None, validation_tokens=rows * seq_len).text(decoder)
    assert measured == {"": pytest.approx(expected, rel=1e-6)}


def probed(prepared: Prepared, rows: int) -> Batch:
    """The sequences that the probe reads, by the batch's own rule."""
    mixture = Mixture({"": ConcatRows(heldout(prepared), 64)}, Shares([1.0], rows, 1, seed=0))
    return text_batch(mixture, 0, range(rows))


def test_bits_do_not_depend_on_how_rows_are_grouped(
    prepared: Prepared, decoder: WindreachForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = make_probe(prepared, None, validation_tokens=24 * 64)
    together = probe.text(decoder)
    monkeypatch.setattr("training.reporting.probe.ROWS", 5)
    assert probe.text(decoder) == pytest.approx(together, rel=1e-5)


def test_text_shorter_than_asked_for_is_read_once(prepared: Prepared, decoder: WindreachForCausalLM) -> None:
    rows = (heldout(prepared).n_tokens - 1) // 64
    all_rows = make_probe(prepared, None, validation_tokens=rows * 64).text(decoder)
    assert make_probe(prepared, None, validation_tokens=10**9).text(decoder) == all_rows


def test_bits_are_told_by_source_and_together(prepared: Prepared, decoder: WindreachForCausalLM) -> None:
    """The same text twice has the same bits twice, and another text others; all together lie between them."""
    settings = with_training(prepared.settings, validation_tokens=512)
    stores = {"web": heldout(prepared), "again": heldout(prepared), "books": prepared.sources[""].train}
    bits = Probe(settings, stores, None, Curriculum(settings.recall.curriculum, WINDOW, REACH)).text(decoder)
    assert bits["web"] == bits["again"] != bits["books"]
    assert min(bits.values()) < bits[""] < max(bits.values())
    alone = make_probe(prepared, None, validation_tokens=512).text(decoder)
    assert alone == {"": bits["web"]}


# -- recall -----------------------------------------------------------------------------------------------------------


def answering(decoder: WindreachForCausalLM, query: int, value: int) -> None:
    """Make the decoder say `value` after `query` whatever came before: its layers add nothing to the embedding."""
    for layer in decoder.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.zeros_(decoder.lm_head.weight)
    with torch.no_grad():
        decoder.lm_head.weight[value] = decoder.model.embed_tokens.weight[query]


def test_accuracy_is_the_share_of_questions_answered_right(
    prepared: Prepared, decoder: WindreachForCausalLM, vocabulary: RecallVocabulary
) -> None:
    probe = make_probe(prepared, vocabulary, probe_items=40)
    first = probe.items["needle"][WINDOW][0]
    answering(decoder, first.tokens[first.query_position], first.value)
    expected = {d: sum(i.value == first.value for i in group) / 40 for d, group in probe.items["needle"].items()}
    assert expected[WINDOW] > 0
    assert probe.recall(decoder)["needle"] == expected


def test_ranks_share_the_questions(
    prepared: Prepared, decoder: WindreachForCausalLM, vocabulary: RecallVocabulary
) -> None:
    probe = make_probe(prepared, vocabulary, probe_items=21)
    first = probe.items["needle"][WINDOW][0]
    answering(decoder, first.tokens[first.query_position], first.value)
    whole, shares = probe.recall(decoder)["needle"], []
    for rank in (0, 1):
        probe.layout = Layout(rank, ranks=2)
        shares.append(probe.recall(decoder)["needle"])
    assert {d: shares[0][d] + shares[1][d] for d in whole} == pytest.approx(whole)


def test_questions_are_the_same_at_every_start_and_stand_at_their_distance(
    prepared: Prepared, vocabulary: RecallVocabulary
) -> None:
    one, two = (make_probe(prepared, vocabulary, probe_items=5).items["needle"] for _ in range(2))
    assert one == two
    assert list(one) == [8, 16, 21]
    for distance, group in one.items():
        for question in group:
            value_position = question.query_position - distance
            assert question.tokens[value_position] == question.value
            assert len(question.tokens) == 21 + 2 * WINDOW


def test_asked_distances_replace_the_default_ones(prepared: Prepared, vocabulary: RecallVocabulary) -> None:
    assert list(make_probe(prepared, vocabulary, probe_distances=[3, 9]).items["needle"]) == [3, 9]


def test_without_recall_nothing_is_asked(prepared: Prepared, decoder: WindreachForCausalLM) -> None:
    assert make_probe(prepared, None).recall(decoder) == {}
    assert horizon({}) == 0


def test_a_probe_leaves_the_decoder_as_it_was(
    prepared: Prepared, decoder: WindreachForCausalLM, vocabulary: RecallVocabulary
) -> None:
    decoder.train()
    before = {name: w.clone() for name, w in decoder.state_dict().items()}
    random = torch.get_rng_state()
    probe = make_probe(prepared, vocabulary, probe_items=2, validation_tokens=128)
    probe.text(decoder), probe.recall(decoder)
    assert decoder.training
    assert all(p.grad is None for p in decoder.parameters())
    assert all(torch.equal(before[name], w) for name, w in decoder.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_bits_are_those_of_cross_entropy(prepared: Prepared, decoder: WindreachForCausalLM) -> None:
    batch = probed(prepared, 4)
    with torch.no_grad():
        logits = decoder(batch.input_ids, batch.documents).logits
    nats = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()
    scored = batch.labels[batch.labels != -100]
    expected = nats / math.log(2) / heldout(prepared).token_bytes[scored.numpy()].sum()
    assert make_probe(prepared, None, validation_tokens=256).text(decoder)[""] == pytest.approx(expected, rel=1e-5)
