"""Configuration of the decoder: Mistral's fields and a description of every layer."""

from typing import Any

from transformers import MistralConfig

from model.errors import UserError
from model.families import ROPE_TYPES
from model.windows import LayerSpec


class WindreachConfig(MistralConfig):
    """`MistralConfig` plus `layers`: one dict of `LayerSpec` fields per layer (default: all sliding).

    qk_norm: RMSNorm of each head's queries and keys before they are rotated, as in Qwen3.
    qkv_bias: biases of queries, keys and values, as in Qwen2.
    attention_backend: `auto`, or one of `model.attention.BACKENDS`.
    Raises UserError for shapes that can't be built.
    """

    model_type = "windreach"

    layers: list[dict[str, Any]] | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        super().__post_init__(**kwargs)
        if self.layers is None:
            kind = "full" if self.sliding_window is None else "sliding"
            self.layers = [{"kind": kind, "window": self.sliding_window}] * self.num_hidden_layers
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads is {self.num_attention_heads}, not a multiple of "
                f"model.num_key_value_heads = {self.num_key_value_heads}; change one of them"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary positions need an even number")
        if len(self.layers) != self.num_hidden_layers:
            raise UserError(
                f"model.layers describes {len(self.layers)} layers, but model.num_hidden_layers is "
                f"{self.num_hidden_layers}; change one of them"
            )
        self._refuse_what_the_decoder_lacks()
        _ = self.specs  # raises for a layer that can't be built

    def _refuse_what_the_decoder_lacks(self) -> None:
        """Settings of other Mistral-like models that would else be ignored in silence."""
        assert isinstance(self.rope_parameters, dict)
        only = {
            "hidden_act": (self.hidden_act, ("silu",)),
            "attention_dropout": (self.attention_dropout, (0.0,)),
            "rope_parameters.rope_type": (self.rope_parameters.get("rope_type", "default"), ROPE_TYPES),
        }
        for name, (value, known) in only.items():
            if value not in known:
                raise UserError(f"model.{name} is {value!r}; the decoder knows only {', '.join(map(repr, known))}")

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What each layer may see, bottom first."""
        assert self.layers is not None
        return tuple(_spec(i, layer) for i, layer in enumerate(self.layers))

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies."""
        assert isinstance(self.rope_parameters, dict)
        return float(self.rope_parameters["rope_theta"])


def _spec(i: int, layer: dict[str, Any]) -> LayerSpec:
    try:
        return LayerSpec(**layer)
    except (UserError, TypeError) as error:
        raise UserError(f"model.layers[{i}]: {error}") from error
