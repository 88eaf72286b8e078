"""What each layer of a Hugging Face model may see, read from its config: the theory of reach adapts to it."""

from typing import Any

from model.windows import LayerSpec


def specs_of(config: Any) -> tuple[LayerSpec, ...]:
    """One description per layer, bottom first.

    W counts the current token in all of them: query i sees key j iff i - W < j <= i. A layer that is neither sliding
    nor chunked (full, recurrent, convolutional) counts as `full`: no window bounds what it may bring.

    >>> from transformers import MistralConfig
    >>> specs_of(MistralConfig(num_hidden_layers=1, sliding_window=4096))[0].window
    4096
    """
    config = config.get_text_config()
    local = getattr(config, "attention_layers", None)  # gpt_neo
    if local:
        return tuple(_spec("sliding_attention" if kind == "local" else kind, config.window_size) for kind in local)
    span: int | None = getattr(config, "sliding_window", None)
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    return tuple(_spec(kind, chunk if kind == "chunked_attention" else span) for kind in _kinds(config, span))


def _kinds(config: Any, span: int | None) -> list[str]:
    """The config's own `layer_types`, else the same kind for all. Mistral's code does not read `layer_types`."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and config.model_type != "mistral":
        return list(kinds)
    used = bool(span) and getattr(config, "use_sliding_window", True) is not False
    return ["sliding_attention" if used else "full_attention"] * int(config.num_hidden_layers)


def _spec(kind: str, window: int | None) -> LayerSpec:
    if kind == "sliding_attention" and window:
        return LayerSpec(kind="sliding", window=int(window))
    if kind == "chunked_attention" and window:
        return LayerSpec(kind="chunked", window=int(window))
    return LayerSpec(kind="full")
