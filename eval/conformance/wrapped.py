"""Finds the decoder layers and attention modules of a model, also inside PEFT or `DistributedDataParallel`."""

from typing import Any, NamedTuple

from torch import nn

from model.errors import UserError


class Layer(NamedTuple):
    """A decoder layer and the module whose output is compared: its attention, or the layer where it has none."""

    decoder_layer: nn.Module
    attention: nn.Module


def unwrapped(model: Any) -> Any:
    """The model inside of `DistributedDataParallel` and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Any) -> list[Layer]:
    """The decoder layers, bottom layer first. Raises UserError if the model has no list of them."""
    config = unwrapped(model).config
    count = getattr(config, "get_text_config", lambda: config)().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(f"{type(model).__name__} holds no nn.ModuleList of its {count} layers, so none can be measured")
    largest = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    return [Layer(layer, _attention_of(layer)) for layer in largest]


def _attention_of(layer: nn.Module) -> nn.Module:
    named = (m for m in layer.modules() if m is not layer and _is_attention(type(m).__name__.lower()))
    return next(named, layer)


def _is_attention(name: str) -> bool:
    return ("attention" in name or "attn" in name) and "norm" not in name
