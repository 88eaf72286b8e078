"""Claims about bits per byte: every token once, every byte once."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from data.mixture import open_sources, prepare_sources
from eval import loss
from eval.forward import token_nats
from eval.haystack import Haystack, HeldOutDocument, encode_documents, open_haystack
from eval.models import load_hugging_face, load_model
from eval.plots import loss_figure
from model.errors import UserError
from training.run.folder import data_hashes
from training.settings.schema import Settings


@pytest.fixture(scope="module")
def examined(untrained_run):
    return load_model(str(untrained_run), "cpu")


@given(st.integers(2, 400), st.integers(1, 40), st.integers(2, 60))
def test_stretches_score_each_token_once_and_with_its_context(n_tokens, context, more):
    made = list(loss.stretches(n_tokens, context + more, context))
    scored = [t for _, first, end in made for t in range(first, end)]
    assert scored == list(range(1, n_tokens))
    assert all(first - start == min(context, first) for start, first, _ in made)
    assert all(end - start <= context + more for start, _, end in made)


@pytest.mark.parametrize(("text", "has_curves"), [("The sea was calm. " * 9, True), ("ab", False)])
def test_short_documents_have_bits_per_byte_and_the_curves_that_fit(examined, text, has_curves):
    haystack = Haystack("short", encode_documents(examined.tokenizer, [text] * 3, None))
    result = loss.measure(examined, haystack, rows=4)
    assert 0 < result["bits_per_byte"] < 30
    assert result["tokens"] == sum(len(document.tokens) - 1 for document in haystack.documents)
    assert bool(result["by_position"]) == bool(result["by_context"]) == has_curves
    loss_figure([result])


def test_bytes_of_the_held_out_text_are_exact(examined, untrained_run):
    written = (untrained_run.parent / "heldout.txt").read_bytes()
    haystack = open_haystack(examined)
    assert sum(document.n_bytes for document in haystack.documents) == len(written)


def test_the_perplexity_of_a_pretrained_model_is_that_of_transformers(examined, tmp_path):
    """Held-out text through our decoder and through the library's model, from the same folder."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=examined.tokenizer.vocab_size, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    examined.tokenizer.save(tmp_path)
    ours, haystack = load_model(str(tmp_path), "cpu"), open_haystack(examined, max_tokens=600)
    theirs = replace(ours, model=load_hugging_face(tmp_path, "theirs").eval())
    assert (ours.ours, theirs.ours) == (True, False)
    ppl, expected = (loss.bits_per_byte(e, haystack, 96, 32)["perplexity"] for e in (ours, theirs))
    assert ppl == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("max_tokens", [2, 57, 1000])
def test_bytes_of_a_text_cut_short_are_those_of_its_tokens(examined, max_tokens):
    (document,) = open_haystack(examined, max_tokens=max_tokens).documents
    assert len(document.tokens) == max_tokens
    text = examined.tokenizer.decode([int(t) for t in document.tokens if t != examined.tokenizer.bos_id])
    assert document.n_bytes == len(text.encode())


def test_held_out_text_of_one_token_is_refused(examined):
    with pytest.raises(UserError, match=r"^held-out text '.*' has no document of two tokens; give .*--max-tokens"):
        open_haystack(examined, max_tokens=1)


def test_a_text_is_cut_between_characters(examined):
    (document,) = encode_documents(examined.tokenizer, ["äöü" * 10], max_bytes=7)
    assert document.n_bytes == 6
    assert examined.tokenizer.decode(document.tokens.tolist()) == "äöü"


def test_no_more_text_is_read_than_is_asked_for(examined):
    texts = iter(["The sea", " was calm.", "A ship came."])
    assert [document.n_bytes for document in encode_documents(examined.tokenizer, texts, max_bytes=9)] == [7, 2]
    assert list(texts) == ["A ship came."]


def test_held_out_text_that_has_changed_since_the_run_is_refused(untrained_run, tmp_path):
    """Its documents may be training text of the run."""
    run = shutil.copytree(untrained_run, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["data_sha256"]["heldout"] = "0" * 64
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"run: the text under this run has changed since .*\n  heldout: sha256 0"):
        open_haystack(load_model(str(run), "cpu"))
    assert open_haystack(load_model(str(run), "cpu"), text=str(untrained_run.parent / "heldout.txt")).documents


def test_bits_per_byte_are_also_told_by_source(examined):
    documents = open_haystack(examined).documents[0].tokens
    parts = {"web": [documents[:300], documents[300:500]], "books": [documents[500:700]]}

    def named(name):
        n_bytes = examined.tokenizer.token_bytes()
        return [HeldOutDocument(tokens, int(n_bytes[tokens].sum()), name) for tokens in parts[name]]

    def measured(documents):
        return loss.bits_per_byte(examined, Haystack("text", documents), 60, 21)

    both = measured([*named("web"), *named("books")])
    by_source = both["bits_per_byte_by_source"]
    assert by_source == {name: pytest.approx(measured(named(name))["bits_per_byte"], rel=1e-6) for name in parts}
    assert by_source["web"] != by_source["books"]
    assert "bits_per_byte_by_source" not in measured(named("web"))


def test_of_a_conversation_the_answers_alone_count(examined):
    tokens = open_haystack(examined).documents[0].tokens[:300]
    token_bytes, scored = examined.tokenizer.token_bytes(), np.zeros(300, bool)
    scored[40:60] = scored[200:203] = True
    nats = token_nats(examined, torch.from_numpy(tokens[None]))[0]
    n_bytes = int(token_bytes[tokens[scored]].sum())
    without = HeldOutDocument(tokens, n_bytes, "", np.zeros(300, bool))
    haystack = Haystack("text", [HeldOutDocument(tokens, n_bytes, "", scored), without])
    result = loss.bits_per_byte(examined, haystack, 60, 30)
    assert (result["tokens"], result["bytes"]) == (23, n_bytes)
    assert result["bits_per_byte"] == pytest.approx(nats[scored[1:]].sum() / math.log(2) / n_bytes, rel=1e-4)


def test_every_source_of_a_run_gives_its_part_of_the_held_out_text(examined, untrained_run, tmp_path):
    settings, run = yaml.safe_load((untrained_run / "settings.yaml").read_text()), tmp_path / "run"
    data = settings["data"]
    (tmp_path / "other.txt").write_text("A grey ship came over the water. " * 40)
    web = {name: data.pop(name) for name in ("source", "train_files", "heldout_files")} | {"name": "web"}
    data["sources"] = [web, web | {"name": "books", "heldout_files": [str(tmp_path / "other.txt")]}]
    shutil.copytree(untrained_run, run)
    (run / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML without aliases
    described, tokenizer = Settings.model_validate(settings), examined.tokenizer
    sources = open_sources(prepare_sources(described, tokenizer), tokenizer, described.data)
    facts = {"data_sha256": data_hashes(sources), "tokenizer_sha256": tokenizer.sha256}
    (run / "run.json").write_text(json.dumps(facts))
    haystack = open_haystack(load_model(str(run), "cpu"), max_tokens=200)
    assert [(len(d.tokens), d.source) for d in haystack.documents] == [(100, "web"), (100, "books")]


def test_overlapping_stretches_give_the_loss_of_one_long_pass(examined):
    tokens = open_haystack(examined).documents[0].tokens[:150]
    whole = token_nats(examined, torch.from_numpy(tokens)[None]).sum()
    document, nats = HeldOutDocument(tokens, 1), loss.document_nats
    assert nats(examined, document, 50, 21, [].append) == pytest.approx(whole, rel=1e-5)
    assert nats(examined, document, 50, 4, [].append) != pytest.approx(whole, rel=1e-5)


def test_bits_per_byte_is_nats_over_ln_2_over_bytes(examined):
    result = loss.measure(examined, open_haystack(examined, max_tokens=2000), rows=4)
    nats = result["nats_per_token"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"])
    assert result["tokens"] == 1999
    assert [row["context"] for row in result["by_context"]] == [1, 2, 4, 8, 16, 32, 64]


def test_context_beyond_the_reach_changes_nothing(examined):
    table = loss.by_context(examined, open_haystack(examined), length=80, rows=4, seed=0)
    far = [row["bits_per_token"] for row in table if row["context"] > 21]
    near = next(row["bits_per_token"] for row in table if row["context"] == 8)
    assert max(far) - min(far) < 1e-4
    assert abs(near - far[0]) > 1e-4
