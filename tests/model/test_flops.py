"""What a configuration is said to cost is what it costs."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import WindreachConfig
from model.decoder import build_model
from model.flops import cache_bytes, count_parameters, flops_per_token, forward_flops
from model.windows import keys_per_query
from tests.model.tiny import VOCAB, tiny_config, token_ids

T = 24


def test_mistral_7b_has_its_parameters_and_its_cache() -> None:
    config = WindreachConfig()
    assert count_parameters(config) == 7_241_732_096
    assert cache_bytes(config) == 4096 * 32 * 2 * 8 * 128 * 2 == 512 * 2**20


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sink", [False, True])
def test_parameters_are_those_of_the_built_model(tied: bool, sink: bool) -> None:
    layers = [{"window": 5, "sink": sink}, {"kind": "full"}]
    config = tiny_config(layers, tie_word_embeddings=tied, head_dim=10)
    model = build_model(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert count_parameters(config) - count_parameters(tiny_config([{"window": 5}, {"kind": "full"}], head_dim=10)) == (
        4 * sink - 32 * VOCAB * tied
    )


@pytest.mark.parametrize("training", [False, True])
def test_flops_of_full_layers_are_those_that_torch_counts_less_the_masked_pairs(training: bool) -> None:
    config = tiny_config([{"kind": "full"}] * 2, attention_backend="reference")
    model = build_model(config).train(training)
    with FlopCounterMode(display=False) as counter:
        loss = model(token_ids(1, T), labels=token_ids(1, T)).loss
        if training:
            loss.backward()
    # The oracle multiplies all T x T pairs; a query sees (T + 1) / 2 of them on average.
    masked_pairs = T * (T - 1) / 2
    wasted = 2 * 4 * config.num_attention_heads * config.head_dim * masked_pairs * (3 if training else 1)
    assert flops_per_token(config, T, training) * T == counter.get_total_flops() - wasted


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("tokens", [24, 64])
def test_flops_of_matrices_are_those_that_torch_counts_whatever_the_attention(backend: str, tokens: int) -> None:
    """Weights are multiplied as plain matrices (mm), scores and mixtures in batches (bmm)."""
    config = tiny_config([{"window": 5}, {"window": 3, "sink": True}, {"kind": "full"}], attention_backend=backend)
    counts = step_counts(config, tokens)
    parts = forward_flops(config, tokens)
    assert counts[torch.ops.aten.mm] == 3 * tokens * (sum(parts.values()) - parts["attention"])


def test_blocks_multiply_two_blocks_of_keys_for_each_block_of_queries() -> None:
    """The convention counts visible keys; a block of C = 16 queries meets 2C keys, of which W = 5 are visible."""
    config, tokens, block = tiny_config([{"window": 5}] * 2, attention_backend="blocked"), 64, 16
    computed = step_counts(config, tokens)[torch.ops.aten.bmm]
    said = 3 * tokens * forward_flops(config, tokens)["attention"]
    assert computed / said == pytest.approx(2 * block / keys_per_query(config.specs[0], tokens))


def step_counts(config: WindreachConfig, tokens: int) -> dict[Any, int]:
    """FLOPs of a forward and backward pass by operator."""
    model = build_model(config).train()
    with FlopCounterMode(display=False) as counter:
        model(token_ids(1, tokens), labels=token_ids(1, tokens)).loss.backward()
    return counter.get_flop_counts()["Global"]


def test_flops_follow_the_window_and_stop_growing_with_the_length() -> None:
    window = [{"window": 5}] * 2
    narrow, wide = tiny_config(window), tiny_config([{"window": 10}] * 2)
    per_key = 4 * narrow.num_attention_heads * narrow.head_dim
    longer = flops_per_token(narrow, 100, False) - flops_per_token(narrow, 50, False)
    spec = narrow.specs[0]
    assert longer == pytest.approx(2 * per_key * (keys_per_query(spec, 100) - keys_per_query(spec, 50)))
    assert longer < per_key
    wider = flops_per_token(wide, 10_000, False) - flops_per_token(narrow, 10_000, False)
    assert wider == pytest.approx(2 * per_key * 5, rel=1e-2)


def test_cache_of_full_layers_grows_with_the_length_in_blocks_of_256() -> None:
    config = tiny_config([{"window": 5}, {"kind": "full"}])
    per_slot = 2 * 2 * 8 * 2
    assert cache_bytes(config, length=1000) == per_slot * (5 + 1024)
    assert cache_bytes(config, batch=3, dtype_bytes=4, length=10) == 6 * per_slot * (5 + 256)


def test_counting_allocates_no_weight() -> None:
    with torch.device("cpu"):
        assert count_parameters(WindreachConfig(num_hidden_layers=400)) > 80e9


def test_biases_are_counted() -> None:
    config = tiny_config(qkv_bias=True)
    assert count_parameters(config) == sum(p.numel() for p in build_model(config).parameters())
