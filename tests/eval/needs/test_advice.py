"""Claims about the advice: what a pattern sees, what it costs, and which patterns are on the front."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from eval.models import Examined, specs_of
from eval.needs import advice
from model.errors import UserError
from model.flops import count_parameters

ROWS = [{"context": c, "share": [s, s, s]} for c, s in ((16, 0.0), (64, 0.6), (256, 0.9), (1024, 1.0))]


def examined_of(model):
    return Examined("peer", model, SimpleTokenizer(), specs_of(model.config), folder=None, run_dir=None)


class SimpleTokenizer:
    vocab_size = 64


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return examined_of(LlamaForCausalLM(config))


def pattern(table, window, every):
    (row,) = [row for row in table if (row["window"], row["full_every"]) == (window, every)]
    return row


def test_shares_reach_and_cache_of_each_pattern(llama):
    table = advice.advice(advice.shape_of(llama, None), ROWS, 4096)
    bytes_per_slot = 2 * 2 * 8 * 2  # keys and values, 2 heads of 8 numbers of 2 bytes
    sliding, hybrid, full = pattern(table, 64, 0), pattern(table, 64, 6), pattern(table, None, 1)
    assert (sliding["reach"], hybrid["reach"], full["reach"]) == (6 * 63, None, None)
    assert [sliding[key] for key in advice.BENEFITS] == pytest.approx([0.6, 0.6, 0.9283], abs=5e-5)
    assert [hybrid[key] for key in advice.BENEFITS] == pytest.approx([0.6, 1.0, 1.0])
    assert [full[key] for key in advice.BENEFITS] == [1.0, 1.0, 1.0]
    assert sliding["cache_bytes"] == bytes_per_slot * 6 * 64
    assert hybrid["cache_bytes"] == bytes_per_slot * (5 * 64 + 4096)
    assert full["cache_bytes"] == bytes_per_slot * 6 * 4096
    assert sliding["flops_per_token"] < hybrid["flops_per_token"] < full["flops_per_token"]


def test_the_front_is_what_no_other_pattern_betters(llama):
    table = advice.advice(advice.shape_of(llama, None), ROWS, 32_768)
    front = [row for row in table if row["pareto"]]
    assert not any(advice.dominates(a, b) for a in table for b in front)
    assert all(any(advice.dominates(a, b) for a in front) for b in table if not b["pareto"])
    assert {(row["window"], row["full_every"]) for row in front} == {(w, 0) for w in (16, 64, 256, 1024)}


def test_a_full_layer_is_on_the_front_where_it_is_cheaper_than_the_widest_window(llama):
    table = advice.advice(advice.shape_of(llama, None), ROWS, 2048)
    assert pattern(table, 16, 6)["cache_bytes"] < pattern(table, 1024, 0)["cache_bytes"]
    assert pattern(table, 16, 6)["pareto"]
    assert not pattern(table, 16, 2)["pareto"]


def test_the_priced_shape_is_that_of_the_model(llama):
    shape = advice.shape_of(llama, None)
    assert count_parameters(shape) == llama.model.num_parameters()


def test_a_shape_that_cannot_be_priced_is_refused_and_a_plan_replaces_it():
    gpt2 = examined_of(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)))
    with pytest.raises(UserError, match=r"--model 'peer': its config names no intermediate_size, .*--plan configs/X"):
        advice.shape_of(gpt2, None)
    assert advice.shape_of(gpt2, "configs/tiny.yaml").vocab_size == 64


def test_without_a_gain_there_is_no_advice(llama):
    rows = [row | {"share": None} for row in ROWS]
    assert advice.advice(advice.shape_of(llama, None), rows, 4096) == []
