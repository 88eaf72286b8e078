"""From settings to the decoder's configuration."""

from typing import Any

from model.config import WindreachConfig
from model.decoder import InitOptions
from training.settings.schema import LayerSettings, ModelSettings, Settings


def model_config(settings: Settings, vocab_size: int) -> WindreachConfig:
    """The decoder that `settings.model` describes, for a tokenizer of `vocab_size` pieces.

    A larger `model.vocab_size` leaves rows unused; a smaller one was refused when the data was prepared.
    """
    m = settings.model
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
        qk_norm=m.qk_norm,
        tie_word_embeddings=m.tie_word_embeddings,
        attention_backend=m.attention_backend,
    )


def init_options(settings: Settings) -> InitOptions:
    """How weights are drawn. A run that grows from another one (`grow_from`) draws them too, and overwrites them."""
    return InitOptions(**settings.model.init.model_dump(exclude={"grow_from"}))


def layer_dicts(m: ModelSettings) -> list[dict[str, Any]]:
    """`LayerSpec` fields of every layer, bottom first: the pattern repeated over the depth."""
    return [_layer(m.layers[i % len(m.layers)], m.sliding_window) for i in range(m.num_hidden_layers)]


def _layer(layer: LayerSettings, sliding_window: int) -> dict[str, Any]:
    window = None if layer.kind == "full" else layer.window or sliding_window
    return layer.model_dump() | {"window": window}
