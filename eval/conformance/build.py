"""Makes the model to check: loads it with its weights, or builds a small one with random weights from a config."""

from pathlib import Path
from typing import Any

from eval.models import load_hugging_face, load_weights, locate
from model.errors import UserError

WINDOW = 8  # tokens
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "intermediate_size_mlp": 64,
    "shared_expert_intermediate_size": 32, "vocab_size": 96, "vocab_size_per_layer_input": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "query_pre_attn_scalar": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "sliding_window": WINDOW, "window_size": WINDOW, "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8,
    "v_head_dim": 8,
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
    count = other.get("num_hidden_layers", count)
    by_layer: dict[str, Any] = {k: v[:count] for k, v in described.items() if isinstance(v, list) and len(v) == total}
    if special := described.get("per_layer_config"):
        by_layer["per_layer_config"] = {n: changed for n, changed in special.items() if int(n) < count}
    changes = {k: size for k, size in SMALL.items() if described.get(k) is not None and k not in other}
    return type(config)(**described | by_layer | changes | {"num_hidden_layers": count})


def layers_needed(layer_types: list[str]) -> int:
    """Layers up to the first of the last kind, and at least two.

    >>> layers_needed(["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
    3
    """
    return max([2, *(layer_types.index(kind) + 1 for kind in {*layer_types})])


def load(name: str, window: int | None = None) -> Any:
    """The model of a folder or a hub name with its weights in float32; with another sliding window if one is given.

    A run folder, and a checkpoint in our own format, is run by our decoder. All others are run by transformers.
    """
    run_dir, folder = locate(Path(name))
    ours = folder is not None and (run_dir is not None or '"windreach"' in (folder / "config.json").read_text())
    if not ours:
        return load_hugging_face(folder, name, **({} if window is None else {"sliding_window": window}))
    if window is not None:
        raise UserError("--window changes models of transformers only; train a run with another sliding_window")
    return load_weights(folder, name)
