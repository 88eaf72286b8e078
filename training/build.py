"""From settings to the decoder's configuration."""

from typing import Any

from model.config import WindreachConfig
from model.errors import UserError
from training.settings import LayerSettings, ModelSettings, Settings


def model_config(settings: Settings, vocab_size: int) -> WindreachConfig:
    """The decoder that `settings.model` describes, for a tokenizer of `vocab_size` pieces.

    Raises UserError when `model.vocab_size` is smaller than the tokenizer's.
    """
    m = settings.model
    if m.vocab_size is not None and m.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {m.vocab_size}, but the tokenizer has {vocab_size} pieces\n"
            f"  set it to {vocab_size} or more, or remove it to take the tokenizer's"
        )
    return WindreachConfig(
        vocab_size=m.vocab_size or vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_hidden_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_key_value_heads,
        head_dim=m.head_size,
        sliding_window=m.sliding_window,
        layers=layer_dicts(m),
        max_position_embeddings=m.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        rms_norm_eps=m.rms_norm_eps,
        tie_word_embeddings=m.tie_word_embeddings,
        attention_backend=m.attention_backend,
    )


def layer_dicts(m: ModelSettings) -> list[dict[str, Any]]:
    """`LayerSpec` fields of every layer, bottom first: the pattern repeated over the depth."""
    return [_layer(m.layers[i % len(m.layers)], m.sliding_window) for i in range(m.num_hidden_layers)]


def _layer(layer: LayerSettings, sliding_window: int) -> dict[str, Any]:
    window = None if layer.kind == "full" else layer.window or sliding_window
    return layer.model_dump() | {"window": window}
