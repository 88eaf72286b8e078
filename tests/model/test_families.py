"""A pretrained model of every family computes here what it computes in `transformers`, and what can't is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.families import FAMILIES, decoder_fields
from model.hub import save_hf
from tests.model.tiny import VOCAB, token_ids

W, T, DEPTH = 5, 37, 5
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
HYBRID = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
ROPE = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, given attention": {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5},
    "yarn, mscale": {
        "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.2, "mscale_all_dim": 0.5, "beta_fast": 8.0,
        "beta_slow": 2.0, "truncate": False,
    },
}  # fmt: skip
GRANITE = {"attention_multiplier": 8**-0.5, "sliding_window": W, "layer_types": HYBRID}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral, full": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": W}),
    "ministral": ("ministral", {"sliding_window": W, "layer_types": HYBRID}),
    "qwen3, full": ("qwen3", {}),
    "qwen3, upper layers slide": ("qwen3", {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 2}),
    "qwen2, full": ("qwen2", {}),
    "qwen2, upper layers slide": ("qwen2", {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 2}),
    "smollm3, full": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3, sliding": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 1, 0], "use_sliding_window": True, "sliding_window": W},
    ),
    "granite_swa": ("granite_swa", GRANITE),
    "granite_swa, bases": ("granite_swa", GRANITE | {"layer_rope_theta": [100.0, 0, 1e4, 0, 50.0]}),
}
CASES = [
    *((name, "default") for name in MODELS),
    *((name, rope) for name in ("llama", "qwen3, full", "granite_swa, bases") for rope in ROPE if rope != "default"),
]  # fmt: skip


def saved(folder: Path, kind: str, rope: str = "default", **fields: Any) -> torch.nn.Module:
    """A random model of transformers, written into `folder`."""
    torch.manual_seed(0)
    parameters = {"rope_type": rope.partition(",")[0], "rope_theta": 100.0} | ROPE[rope]
    config = CONFIG_MAPPING[kind](**SIZES | {"rope_parameters": parameters} | fields)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "sinks", "bias")):  # which start as ones and zeros
            torch.nn.init.normal_(weight, 1.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("name", "rope"), CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers_beyond_the_window_and_behind_a_cache(
    tmp_path: Path, name: str, rope: str
) -> None:
    kind, fields = MODELS[name]
    theirs, ids = saved(tmp_path, kind, rope, **fields), token_ids(2, T)
    ours = WindreachForCausalLM.from_pretrained(tmp_path)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, atol=2e-4, rtol=0)
    cache = RingCache(ours.config)
    parts = [ours(part, past_key_values=cache).logits for part in (ids[:, :20], ids[:, 20:21], ids[:, 21:])]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("rope", [rope for rope in ROPE if rope != "default"])
@torch.no_grad()
def test_scaling_matters_and_is_exported(tmp_path: Path, rope: str) -> None:
    saved(tmp_path / "theirs", "llama", rope)
    saved(tmp_path / "plain", "llama")
    ours, ids = WindreachForCausalLM.from_pretrained(tmp_path / "theirs"), token_ids(1, T)
    plain = WindreachForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    assert (ours(ids).logits - plain).abs().max() > 0.01
    save_hf(ours, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert back.config.model_type == "mistral"
    torch.testing.assert_close(back(ids).logits, ours(ids).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["smollm3, sliding", "qwen2, upper layers slide", "qwen3, upper layers slide"])
@torch.no_grad()
def test_a_family_with_a_trait_of_its_own_is_exported_as_itself(tmp_path: Path, name: str) -> None:
    kind, fields = MODELS[name]
    saved(tmp_path / "theirs", kind, **fields)
    ours, ids = WindreachForCausalLM.from_pretrained(tmp_path / "theirs"), token_ids(1, T)
    save_hf(ours, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert back.config.model_type == kind
    torch.testing.assert_close(back(ids).logits, ours(ids).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = saved(tmp_path, "llama").to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = WindreachForCausalLM.from_pretrained(tmp_path)
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.model.layers[1].mlp.down_proj.weight, theirs.model.layers[1].mlp.down_proj.weight.float())


def test_rotation_is_not_rounded_with_the_weights(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "yarn")
    half = WindreachForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half(token_ids(1, 4))
    assert half.model.ropes[0].frequencies.dtype == torch.float32
    assert half.model.ropes[0].factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; this loader knows granite_swa, llama, "),
        ({"attention_bias": True}, "attention_bias is true; the decoder has biases of q, k and v alone"),
        ({"mlp_bias": True}, "mlp_bias is true; the decoder has biases of q, k and v alone"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the decoder knows only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; the decoder knows only 0.0"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_parameters.rope_type is 'dynamic'; the decoder knows",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "the decoder knows one section for all"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; the decoder rotates whole",
        ),
        ({"sliding_window": 5}, "sliding_window is 5, which a llama model ignores"),
        ({"num_attention_heads": None}, "num_attention_heads is missing; copy the file again"),
        ({"model_type": "granite_swa", "residual_multiplier": 0.22}, "residual_multiplier is 0.22; the decoder has no"),
        ({"model_type": "granite_swa"}, "attention_multiplier is 1.0; the decoder has no multipliers, only 0.353553"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 5}, "but no window is in use"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 5}, "layer_types holds 'chunked_attention'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "the model has 5 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "it describes the rotation of 1 layers; the model has 5"),
    ],
)
def test_what_the_decoder_lacks_is_refused_with_field_and_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        decoder_fields({"model_type": "llama"} | SIZES | fields)
    assert message in str(refusal.value)


def test_older_files_are_read_as_transformers_reads_them() -> None:
    scaling = {"type": "yarn", "factor": 2.0}
    fields = decoder_fields({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling} | SIZES)
    assert fields["rope_parameters"] == {
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5, "original_max_position_embeddings": 64,
    }  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_of_a_family_are_those_of_transformers(kind: str) -> None:
    theirs = CONFIG_MAPPING[kind](attention_multiplier=128**-0.5) if kind == "granite_swa" else CONFIG_MAPPING[kind]()
    written = json.loads(theirs.to_json_string(use_diff=False))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    short = {name: written[name] for name in (*sizes, "attention_multiplier", "model_type") if name in written}
    full = decoder_fields(written)
    for name in ("rms_norm_eps", "rope_parameters", "sliding_window", "layers", "tie_word_embeddings", "qk_norm"):
        assert decoder_fields(short)[name] == full[name], name
