"""Small configurations and inputs that the model tests share."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM, build_model

VOCAB = 61


def tiny_config(layers: Iterable[dict[str, Any]] | None = None, **fields: Any) -> WindreachConfig:
    """Three sliding layers with W = 5 unless told otherwise; 4 heads on 2 key-value heads."""
    layers = None if layers is None else list(layers)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3 if layers is None else len(layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return WindreachConfig(**{**sizes, **fields}, layers=layers)


def tiny_model(layers: Iterable[dict[str, Any]] | None = None, seed: int = 0, **fields: Any) -> WindreachForCausalLM:
    return build_model(tiny_config(layers, **fields), seed=seed).eval()


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Ids from 1 on, so that 0 can be padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
