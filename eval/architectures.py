"""What each layer of a model may see, read from its config."""

from collections.abc import Sequence
from typing import Any

from model import windows
from model.windows import LayerSpec


def specs_of(config: Any) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per layer, bottom layer first, from the config of our decoder or of a Hugging Face model.

    W counts the current token in all of them: query i sees key j iff i - W < j <= i. A layer that is neither sliding
    nor chunked (full attention, recurrence, convolution) is described as `full`, because no window limits it.

    >>> from transformers import MistralConfig
    >>> specs_of(MistralConfig(num_hidden_layers=1, sliding_window=4096))[0].window
    4096
    """
    if hasattr(config, "specs"):
        return tuple(config.specs)
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if getattr(config, "attention_layers", None):  # gpt_neo
        layer_types, window = config.attention_layers, config.window_size
    elif getattr(config, "layer_types", None) and config.model_type != "mistral":  # whose code ignores layer_types
        layer_types = config.layer_types
    else:
        uses_window = window and getattr(config, "use_sliding_window", True) is not False
        layer_types = ["sliding_attention" if uses_window else "full_attention"] * config.num_hidden_layers
    windowed = {"sliding_attention": ("sliding", window), "local": ("sliding", window)}
    windowed["chunked_attention"] = ("chunked", chunk)
    specs = (windowed.get(layer_type, ("full", None)) for layer_type in layer_types)
    return tuple(LayerSpec(kind, size) if size else LayerSpec("full") for kind, size in specs)


def smallest_window(specs: Sequence[LayerSpec]) -> int | None:
    """The smallest window of the stack in tokens; None if all layers are full."""
    return min((spec.window for spec in specs if spec.window and spec.kind != "full"), default=None)


def nominal_reach(specs: Sequence[LayerSpec], window: int) -> int:
    """The reach in tokens by which distances are chosen: R, or layers x (W - 1) where full layers make R infinite.

    >>> nominal_reach([LayerSpec("sliding", 16), LayerSpec("full")], window=16)
    30
    """
    reach = windows.reach(specs)
    return len(specs) * (window - 1) if reach is None else reach
