"""Parameters, FLOPs and cache bytes of a configuration, computed without building the model."""

from model.config import WindreachConfig
from model.windows import cache_slots, keys_per_query


def parameters(config: WindreachConfig) -> dict[str, int]:
    """Number of parameters by part. Tied embeddings count once.

    >>> parameters(WindreachConfig())["embedding"] == 32000 * 4096
    True
    """
    e, d, k = config.hidden_size, config.head_dim, config.num_hidden_layers
    h, g = config.num_attention_heads, config.num_key_value_heads
    assert d is not None
    embedding = config.vocab_size * e
    return {
        "embedding": embedding,
        "attention": k * 2 * e * d * (h + g) + k * d * (h + 2 * g) * config.qkv_bias,
        "sinks": h * sum(spec.sink for spec in config.specs),
        "feed-forward": k * 3 * e * config.intermediate_size,
        "norms": (2 * k + 1) * e + 2 * k * d * config.qk_norm,
        "output": 0 if config.tie_word_embeddings else embedding,
    }


def count_parameters(config: WindreachConfig) -> int:
    """Number of parameters of the model. Tied embeddings count once.

    >>> count_parameters(WindreachConfig())
    7241732096
    """
    return sum(parameters(config).values())


def forward_flops(config: WindreachConfig, seq_len: int) -> dict[str, float]:
    """FLOPs of a forward pass by part, per token of a document of `seq_len` tokens. A multiply-add is 2 FLOPs.

    Matrices cost 2 per weight, the embedding nothing, attention 4 * H * D per *visible* key (scores and weighted sum).
    A backend may compute more pairs than are visible: blocks two to three times as many, the reference all T x T.
    These do not count as work of the model.
    """
    e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    h, g, k = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    counts = {spec: keys_per_query(spec, seq_len) for spec in set(config.specs)}
    return {
        "projections": 2 * k * e * d * (2 * h + 2 * g),
        "feed-forward": 2 * k * 3 * e * i,
        "attention": sum(4 * h * d * counts[spec] for spec in config.specs),
        "output": 2 * e * config.vocab_size,
    }


def flops_per_token(config: WindreachConfig, seq_len: int, training: bool = True) -> float:
    """FLOPs per token, the sum of `forward_flops`. A training step costs three forward passes."""
    return sum(forward_flops(config, seq_len).values()) * (3 if training else 1)


def cache_bytes(config: WindreachConfig, dtype_bytes: int = 2, batch: int = 1, length: int | None = None) -> int:
    """Bytes of keys and values in the cache after `length` tokens, which matters only if a layer is full."""
    per_slot = 2 * batch * config.num_key_value_heads * config.head_dim * dtype_bytes
    return per_slot * sum(cache_slots(spec, length or 0) for spec in config.specs)
