"""The model to be checked: with its weights, or small and with random weights from a config."""

import warnings
from pathlib import Path
from typing import Any

from model.errors import UserError

WINDOW = 8  # tokens
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "intermediate_size_mlp": 64,
    "shared_expert_intermediate_size": 32, "vocab_size": 96, "vocab_size_per_layer_input": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "query_pre_attn_scalar": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "sliding_window": WINDOW, "window_size": WINDOW, "attention_chunk_size": WINDOW,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def build(name: str, changes: dict[str, Any] | None = None) -> Any:
    """A small model with random weights. name: a folder with config.json, or a model type such as `gemma3_text`.

    It has the windows' pattern of the config, W = 8, and as few layers as show all kinds of them. changes: settings
    that differ from the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = Path(name).is_dir()
        config = AutoConfig.from_pretrained(name, trust_remote_code=False) if known else AutoConfig.for_model(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {name!r}: {str(error).splitlines()[0]}; give a folder with config.json") from error
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shrunk(config.get_text_config(), changes or {}), dtype=torch.float32)


def shrunk(config: Any, other: dict[str, Any]) -> Any:
    """The same architecture in small."""
    described = config.to_dict() | other
    total, count = config.num_hidden_layers, layers_needed(described.get("layer_types") or [])
    lists = {k: v[:count] for k, v in described.items() if isinstance(v, list) and len(v) == total}
    changes = {name: size for name, size in SMALL.items() if described.get(name) is not None}
    return type(config)(**described | lists | changes | {"num_hidden_layers": count})


def layers_needed(layer_types: list[str]) -> int:
    """Layers up to the first of the last kind, and at least two.

    >>> layers_needed(["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
    3
    """
    return max([2, *(layer_types.index(kind) + 1 for kind in {*layer_types})])


def load(name: str, window: int | None = None) -> Any:
    """The model of a folder or a hub name in float32, or our own decoder; with another window if one is given."""
    raise NotImplementedError
