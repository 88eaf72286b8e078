"""Hugging Face checkpoints: saved as Mistral or Qwen3 if such a config can express the stack, else as Windreach."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from model.config import WindreachConfig
from model.errors import UserError
from model.flops import count_parameters as count_parameters
from model.windows import LayerSpec

_WEIGHTS = "model.safetensors"
_ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM", "windreach": "WindreachForCausalLM"}


def is_mistral(config: WindreachConfig) -> bool:
    """Whether all layers are the same plain sliding or full layer, which is all that a Mistral config can express."""
    return not config.qk_norm and _is_plain(config.specs) and len(set(config.specs)) == 1


def is_qwen3(config: WindreachConfig) -> bool:
    """Whether heads are normalised and all layers are full or slide with one window, as a Qwen3 config can express."""
    windows = {spec.window for spec in config.specs if spec.kind == "sliding"}
    return config.qk_norm and _is_plain(config.specs) and len(windows) <= 1


def _is_plain(specs: Iterable[LayerSpec]) -> bool:
    return all(spec in (LayerSpec("full"), LayerSpec("sliding", spec.window or 1)) for spec in specs)


def save_hf(model: PreTrainedModel, path: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write `config.json` and `model.safetensors`. A tied output matrix is left out, as `transformers` does.

    `state_dict`: the whole weights, where those of `model` are sharded over processes.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = _exported(model.config)
    config.architectures = [_ARCHITECTURES[config.model_type]]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(path)
    state_dict = model.state_dict() if state_dict is None else state_dict
    weights = {name.replace("_orig_mod.", ""): w.detach().contiguous() for name, w in state_dict.items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    save_file(weights, path / _WEIGHTS, metadata={"format": "pt"})


def _exported(config: WindreachConfig) -> PreTrainedConfig:
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    if not is_mistral(config) and not is_qwen3(config):
        return WindreachConfig(**fields)
    for ours in ("layers", "attention_backend", "qk_norm"):
        fields.pop(ours)
    fields["sliding_window"] = next((s.window for s in config.specs if s.kind == "sliding"), None)
    if is_mistral(config):
        return MistralConfig(**fields)
    layer_types = [f"{s.kind}_attention" for s in config.specs]
    return Qwen3Config(**fields, layer_types=layer_types, use_sliding_window=fields["sliding_window"] is not None)


def load_config(path: str | Path, backend: str = "auto") -> WindreachConfig:
    """Read `config.json` of a mistral, ministral, qwen3 or windreach checkpoint. Raises UserError for any other."""
    file = Path(path) / "config.json"
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; give the folder of a checkpoint") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); the checkpoint was cut short, take an older one") from error
    kind = fields.pop("model_type", None)
    if kind == "ministral":
        window = fields["sliding_window"]
        fields["layers"] = [_spec_of(name, window) for name in fields.pop("layer_types")]
    elif kind == "qwen3":
        fields = _from_qwen3(Qwen3Config(**fields), file)
    elif kind not in ("mistral", "windreach"):
        raise UserError(f"{file}: model_type is {kind!r}; this loader knows mistral, ministral, qwen3 and windreach")
    for name in ("architectures", "transformers_version", "layer_types"):
        fields.pop(name, None)
    return WindreachConfig(**{**fields, "attention_backend": backend})


def _from_qwen3(config: Qwen3Config, file: Path) -> dict[str, Any]:
    if config.attention_bias:
        raise UserError(f"{file}: attention_bias is true; the decoder has no biases")
    fields = config.to_dict()
    for theirs in ("model_type", "attention_bias", "use_sliding_window", "max_window_layers", "layer_types"):
        fields.pop(theirs, None)
    fields["layers"] = [_spec_of(name, config.sliding_window) for name in config.layer_types]
    return fields | {"qk_norm": True}


def _spec_of(layer_type: str, window: int) -> dict[str, object]:
    return {"kind": "sliding", "window": window} if layer_type == "sliding_attention" else {"kind": "full"}


def read_checkpoint(path: str | Path, backend: str) -> tuple[WindreachConfig, dict[str, torch.Tensor]]:
    """The config and the weights in a checkpoint folder. Raises UserError for a missing or damaged file."""
    path = Path(path)
    config = load_config(path, backend)
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(path):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} can't be read ({error}); it was cut short, take an older checkpoint") from error
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return config, weights


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index names. Other files beside them may be old copies."""
    index = path / f"{_WEIGHTS}.index.json"
    if (path / _WEIGHTS).is_file() or not index.is_file():
        names = {_WEIGHTS}
    else:
        try:
            names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no index of weights ({error}); copy it again") from error
    for name in sorted(names):
        if not (path / name).is_file() or Path(name).name != name:
            raise UserError(f"{path} holds no {name}; give the folder of a checkpoint")
    return [path / name for name in sorted(names)]
