"""What the `config.json` of each model family says, as fields of our decoder. Needs neither torch nor transformers.

    llama        full layers                              qwen3        the same with normalised heads
    mistral      full layers, or sliding layers           smollm3      full and sliding layers, some without rotation
    ministral    sliding layers of one window, and full   granite_swa  sliding and full layers with sinks
    qwen2        the same with biases of q, k and v       windreach    ours: any layers

Whatever the decoder can't compute exactly as the original does is refused, with the field and the reason.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError, read_small_file

Fields = dict[str, Any]

_MOST_JSON_BYTES = 64 << 20  # of config.json, and of an index of weights
_MOST_LAYERS = 1024
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies don't depend on the length of the input
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_KEPT = (  # with the same name and meaning in our decoder
    *SIZES, "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a family's `config.json` leaves out: the defaults of `transformers`."""

    window: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    tied: bool = False
    rms_norm_eps: float = 1e-6


FAMILIES = {
    "granite_swa": Family(window=128, tied=True, rms_norm_eps=1e-5),
    "llama": Family(),
    "ministral": Family(window=4096),
    "mistral": Family(window=4096),
    "qwen2": Family(window=4096),
    "qwen3": Family(window=4096, head_dim=128),
    "smollm3": Family(rope_theta=2e6, tied=True),
}


def read_config(path: str | Path) -> Fields:
    """The fields of `config.json`. Raises UserError if it is no JSON object, or is of an absurd size or depth."""
    file = Path(path) / "config.json"
    fields = read_json(file, "give the folder of a checkpoint")
    for part in (fields, fields.get("text_config")):
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            layers = part.get(name, 1) if isinstance(part, dict) else 1
            if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
                raise UserError(f"{file}: {name} is {layers!r:.60}; give a whole number from 1 to {_MOST_LAYERS:,}")
    return fields


def read_json(file: Path, remedy: str) -> Fields:
    """The JSON object in a file of a checkpoint. Raises UserError, with the `remedy` if there is none."""
    try:
        content = json.loads(read_small_file(file, _MOST_JSON_BYTES))
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise UserError(f"{file} {problem}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); the checkpoint was cut short, take an older one") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; {remedy}")
    return content


def decoder_fields(config: Mapping[str, Any]) -> Fields:
    """The fields of `WindreachConfig` for the content of a `config.json`.

    Raises UserError for another family, and for what our decoder would ignore or compute differently.
    """
    kind = config.get("model_type")
    ours = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}
    if kind == "windreach":
        return {name: value for name, value in config.items() if name not in ours}
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type is {kind!r}; this loader knows {', '.join(FAMILIES)} and windreach")
    _refuse_what_the_decoder_lacks(config)
    family, fields = FAMILIES[kind], {name: config[name] for name in _KEPT if config.get(name) is not None}
    rope = _rope_parameters(config, family)
    if missing := [name for name in SIZES if name not in fields]:
        raise UserError(f"{missing[0]} is missing; copy the file again")
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("rms_norm_eps", family.rms_norm_eps)
    if family.head_dim is not None:
        fields.setdefault("head_dim", family.head_dim)
    return fields | {
        "tie_word_embeddings": config.get("tie_word_embeddings", family.tied),
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2",
        "rope_parameters": rope,
        "sliding_window": _window(config, family),
        "layers": _layers(config, family),
    }


def _refuse_what_the_decoder_lacks(config: Mapping[str, Any]) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UserError(
                f"{name} is {str(config[name]).lower()}; the decoder has biases of q, k and v alone, as in qwen2"
            )
    for name, known in {"hidden_act": "silu", "attention_dropout": 0.0}.items():
        if config.get(name) not in (None, known):
            raise UserError(f"{name} is {config[name]!r}; the decoder knows only {known!r}")
    if config["model_type"] == "llama" and config.get("sliding_window") is not None:
        window = config["sliding_window"]
        raise UserError(f"sliding_window is {window}, which a llama model ignores; remove it, or use mistral")
    if config["model_type"] == "granite_swa":
        heads = config.get("num_attention_heads") or 1
        head_dim = config.get("head_dim") or config.get("hidden_size", 0) // heads
        neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        neutral["attention_multiplier"] = head_dim**-0.5
        for name, value in neutral.items():
            if abs(config.get(name, 1.0) - value) > 1e-6 * value:
                raise UserError(f"{name} is {config.get(name, 1.0)}; the decoder has no multipliers, only {value:g}")


def _rope_parameters(config: Mapping[str, Any], family: Family) -> Fields:
    """The rotation of all layers, in the form of transformers 5. Older files have `rope_theta` and `rope_scaling`."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise UserError(f"rope_parameters is {scaling!r:.80}; the decoder knows one section for all layers")
    parameters = {name: value for name, value in scaling.items() if name != "type" and value is not None}
    parameters.setdefault("rope_type", scaling.get("type", "default"))
    parameters.setdefault("rope_theta", config.get("rope_theta", family.rope_theta))
    if (partial := parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"partial_rotary_factor is {partial!r}; the decoder rotates whole heads")
    if parameters["rope_type"] not in ROPE_TYPES:
        kinds = ", ".join(map(repr, ROPE_TYPES))
        raise UserError(f"rope_parameters.rope_type is {parameters['rope_type']!r}; the decoder knows only {kinds}")
    if parameters["rope_type"] in ("llama3", "yarn"):
        before = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = before or config.get("max_position_embeddings")
    return parameters


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """The window of the sliding layers; None if there is none."""
    if config["model_type"] in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window"):
        return None
    window: int | None = config.get("sliding_window", family.window)
    return window


def _layers(config: Mapping[str, Any], family: Family) -> list[Fields]:
    """`LayerSpec` fields of every layer, bottom first."""
    kind, window, depth = config["model_type"], _window(config, family), config["num_hidden_layers"]
    types = config.get("layer_types")
    rotated = _rotated(config, depth)
    if kind in ("llama", "mistral"):  # whose code ignores layer_types
        types = None
    if types is None:
        types = ["sliding_attention" if _slides(config, i, rotated) and window else "full_attention"
                 for i in range(depth)]  # fmt: skip
    if not isinstance(types, list) or len(types) != depth:
        raise UserError(f"layer_types is {types!r:.80}; the model has {depth} layers")
    layers, base = [_layer(name, window) for name in types], _rope_parameters(config, family)["rope_theta"]
    for layer, theta in zip(layers, rotated, strict=True):
        layer |= {} if theta in (None, base) else {"rope": False} if theta == 0 else {"rope_theta": float(theta)}
        layer |= {"sink": True} if kind == "granite_swa" else {}
    return layers


def _slides(config: Mapping[str, Any], i: int, rotated: list[float | None]) -> bool:
    """Whether layer i slides in a model that has a window, but no `layer_types`."""
    match config["model_type"]:
        case "granite_swa":
            return i % 4 != 0
        case "qwen2" | "qwen3":
            return i >= int(config.get("max_window_layers", 28))
        case "smollm3":
            return rotated[i] == 0
    return True


def _rotated(config: Mapping[str, Any], depth: int) -> list[float | None]:
    """For each layer the base of its rotation: None is the model's, 0 is no rotation."""
    if config["model_type"] == "granite_swa":
        thetas = config.get("layer_rope_theta") or [None] * depth
    elif config["model_type"] == "smollm3":
        every = int(config.get("no_rope_layer_interval", 4))
        rope = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(depth)]
        thetas = [None if on else 0 for on in rope[:depth]]
    else:
        return [None] * depth
    if len(thetas) != depth:
        raise UserError(f"it describes the rotation of {len(thetas)} layers; the model has {depth}")
    return list(thetas)


def _layer(layer_type: Any, window: int | None) -> Fields:
    if layer_type == "full_attention":
        return {"kind": "full"}
    if layer_type != "sliding_attention":
        raise UserError(f"layer_types holds {layer_type!r}; the decoder knows sliding_attention and full_attention")
    if window is None:
        raise UserError("layer_types holds 'sliding_attention', but no window is in use; correct the file")
    return {"kind": "sliding", "window": window}
