"""Configuration of the decoder: Mistral's fields and a description of every layer."""

from typing import Any

from transformers import MistralConfig

from model.errors import UserError
from model.windows import LayerSpec


class WindreachConfig(MistralConfig):
    """`MistralConfig` plus `layers`: one dict of `LayerSpec` fields per layer (default: all sliding).

    attention_backend: `auto`, `reference` or `blocked`.
    Raises UserError for shapes that can't be built.
    """

    model_type = "windreach"

    layers: list[dict[str, Any]] | None = None
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.layers is None:
            kind = "full" if self.sliding_window is None else "sliding"
            self.layers = [{"kind": kind, "window": self.sliding_window}] * self.num_hidden_layers
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads is {self.num_attention_heads}, not a multiple of "
                f"model.num_key_value_heads = {self.num_key_value_heads}; change one of them"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary positions need an even number")
        if len(self.layers) != self.num_hidden_layers:
            raise UserError(f"{len(self.layers)} layers are described, but num_hidden_layers is {self.num_hidden_layers}")

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What each layer may see, bottom first."""
        assert self.layers is not None
        return tuple(LayerSpec(**layer) for layer in self.layers)

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies."""
        assert isinstance(self.rope_parameters, dict)
        return float(self.rope_parameters["rope_theta"])
