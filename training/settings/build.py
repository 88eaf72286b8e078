"""From settings to the decoder's configuration. torch is imported only where one is built: checks must be fast."""

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from training.settings.schema import ModelSettings, Settings

if TYPE_CHECKING:
    from model.config import WindreachConfig
    from model.decoder import InitOptions


def model_config(settings: Settings, vocab_size: int) -> "WindreachConfig":
    """The decoder that `settings.model` describes, for a tokenizer of `vocab_size` tokens."""
    from model.config import WindreachConfig

    m = settings.model
    fields = m.model_dump(exclude={"rope_theta", "rope_scaling", "init"})
    fields |= {"vocab_size": m.vocab_size or vocab_size, "head_dim": m.head_size, "layers": layer_dicts(m)}
    scaling = m.rope_scaling.model_dump(exclude_none=True) if m.rope_scaling else {"rope_type": "default"}
    return WindreachConfig(rope_parameters=scaling | {"rope_theta": m.rope_theta}, **fields)


def init_options(settings: Settings) -> "InitOptions":
    """How weights are drawn. A run that grows from another one (`grow_from`) draws them too, and overwrites them."""
    from model.decoder import InitOptions

    return InitOptions(**settings.model.init.model_dump(exclude={"grow_from", "from_pretrained"}))


def layer_dicts(m: ModelSettings) -> list[dict[str, Any]]:
    """`LayerSpec` fields of every layer, bottom first: the pattern repeated over the depth."""
    return [
        layer.model_dump() | {"window": None if layer.kind == "full" else layer.window or m.sliding_window}
        for layer in islice(cycle(m.layers), m.num_hidden_layers)
    ]
