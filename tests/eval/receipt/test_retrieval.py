"""Claims about `python -m eval.receipt.retrieval`: its attention is that of the model, and what it prints is taken."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.haystack import open_haystack
from eval.models import load_model
from eval.receipt import retrieval
from eval.receipt.recall import open_probes
from eval.receipt.states import layers_of
from model.errors import cli


def test_the_shares_are_those_of_the_attention_of_transformers(untrained_run, tmp_path):
    tokenizer = load_model(str(untrained_run), "cpu").tokenizer
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tokenizer.vocab_size, initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    examined = load_model(str(tmp_path), "cpu")
    (probe, *_) = open_probes(tokenizer, open_haystack(load_model(str(untrained_run), "cpu")), [48], seed=0)
    items = [probe.item(i, 48) for i in range(2)]
    with torch.no_grad():
        maps = theirs(input_ids=torch.tensor([item.tokens for item in items]), output_attentions=True).attentions
    at = items[0].value_position
    expected = [float(layer[:, :, -1, at - 1 : at + 2].sum(dim=(1, 2)).mean()) for layer in maps]
    assert retrieval.shares_on_values(examined, probe, range(2)) == pytest.approx(expected, rel=1e-4)
    assert not any(layer.self_attn._forward_pre_hooks for layer in examined.model.model.layers)


def test_the_pattern_is_one_that_the_receipt_takes(before, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["r", str(before), "--keep", "1", "--distance", "48", "--n", "2", "--window", "8"])
    assert cli(retrieval.main) == 0
    text = capsys.readouterr().out
    layers = layers_of(text.rpartition("layers: ")[2], 3)
    assert sorted(map(str, layers)) == ["{'kind': 'full'}", *["{'window': 8, 'global_tokens': 4}"] * 2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--keep", "3"], "--keep 3: the model has 3 layers; keep fewer of them full"),
        (["--distance", "9"], "'9': give a whole number of at least 16"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(before, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["r", str(before), *arguments])
    try:
        code = cli(retrieval.main)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert sentence in capsys.readouterr().err
