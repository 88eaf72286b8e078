"""What a configuration costs: parameters, FLOPs and cache bytes, without allocating a weight."""

import torch

from model.config import WindreachConfig
from model.windows import cache_slots, keys_per_query


def count_parameters(config: WindreachConfig) -> int:
    """Parameters of the model, tied embeddings counted once.

    >>> count_parameters(WindreachConfig())
    7241732096
    """
    from model.decoder import WindreachForCausalLM

    with torch.device("meta"):
        model = WindreachForCausalLM(config)
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    own = {id(p): p.numel() for p in model.parameters()}
    untied = model.lm_head.weight is not model.model.embed_tokens.weight
    return sum(own.values()) - (tied if untied else 0)


def flops_per_token(config: WindreachConfig, seq_len: int, training: bool = True) -> float:
    """FLOPs per token of a document of `seq_len` tokens, 2 per multiply-add; only visible keys are counted.

    Matrices: 2 per weight, the output matrix included, the embedding look-up not. Attention: 4 * H * D per visible
    key (scores and mixture). A training step costs three forward passes.
    """
    e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    h, g = config.num_attention_heads, config.num_key_value_heads
    matrices = config.num_hidden_layers * (e * d * (2 * h + 2 * g) + 3 * e * i) + e * config.vocab_size
    counts = {spec: keys_per_query(spec, seq_len) for spec in set(config.specs)}
    attention = sum(4 * h * d * counts[spec] for spec in config.specs)
    return (2 * matrices + attention) * (3 if training else 1)


def cache_bytes(config: WindreachConfig, dtype_bytes: int = 2, batch: int = 1, length: int | None = None) -> int:
    """Bytes of keys and values that generation holds; `length` is needed when a layer is full."""
    per_slot = 2 * batch * config.num_key_value_heads * config.head_dim * dtype_bytes
    return per_slot * sum(cache_slots(spec, length or 0) for spec in config.specs)
