"""Checkpoints of Hugging Face: what is written is of the first type that can express the stack, and what is read is
checked before memory is taken.

    mistral     equal plain layers, sliding or full        ministral   plain sliding layers of one window, and full ones
    qwen3       the same with normalised heads             windreach   anything else

Read are these and llama. A plain layer has no sink, no global tokens, and the model's own rotary positions.
"""

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from model.config import WindreachConfig
from model.errors import UserError, read_small_file
from model.flops import count_parameters as count_parameters
from model.windows import LayerSpec

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_JSON_BYTES = 64 << 20  # of config.json, and of an index of weights
_MOST_LAYERS = 1024
_ARCHITECTURES = {
    "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "windreach": "WindreachForCausalLM",
}  # fmt: skip
_THEIRS = {"llama": LlamaConfig, "ministral": MinistralConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
_COMMON = [field.name for field in dataclass_fields(MistralConfig)]


class SavedTokenizer(Protocol):
    """What an export needs of a tokenizer."""

    bos_id: int | None
    eos_id: int | None

    def get_vocab(self) -> dict[str, int]: ...
    def save(self, folder: str | Path) -> None: ...


# ------------------------------------------------------------------------------------------------------------- writing


def exported_type(config: WindreachConfig) -> str:
    """The first type of the list above that can express the stack."""
    windows = {spec.window for spec in config.specs if spec.kind == "sliding"}
    plain = all(spec in (LayerSpec("full"), LayerSpec("sliding", spec.window or 1)) for spec in config.specs)
    if not plain or len(windows) > 1:
        return "windreach"
    if config.qk_norm:
        return "qwen3"
    return "mistral" if len(set(config.specs)) == 1 else "ministral"


def save_hf(
    model: PreTrainedModel, path: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None,
    tokenizer: SavedTokenizer | None = None,
) -> None:  # fmt: skip
    """Write `config.json` and `model.safetensors`; with a tokenizer also its files and `generation_config.json`.

    `state_dict`: the whole weights, where those of `model` are sharded over processes. A tied output matrix is left
    out, as `transformers` does. Raises OSError where the disk is full.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = _exported(model.config)
    config.architectures = [_ARCHITECTURES[config.model_type]]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.rope_theta = model.config.rope_base  # also where transformers 4 and other readers look for it
    if tokenizer is not None:
        _save_tokenizer(tokenizer, path, config)
    config.save_pretrained(path)
    state_dict = model.state_dict() if state_dict is None else state_dict
    weights = {name.replace("_orig_mod.", ""): w.detach().contiguous() for name, w in state_dict.items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    try:
        save_file(weights, path / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # all that is left of an OSError
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path / _WEIGHTS)) from error
    (path / _WEIGHTS).chmod((path / "config.json").stat().st_mode)  # safetensors lets nobody else read it


def _exported(config: WindreachConfig) -> PreTrainedConfig:
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    kind = exported_type(config)
    if kind == "windreach":
        return WindreachConfig(**fields)
    for ours in ("layers", "attention_backend", "qk_norm"):
        fields.pop(ours)
    fields["sliding_window"] = next((s.window for s in config.specs if s.kind == "sliding"), None)
    if kind == "mistral":
        return MistralConfig(**fields)
    fields["layer_types"] = [f"{s.kind}_attention" for s in config.specs]
    if kind == "ministral":
        return MinistralConfig(**fields)
    return Qwen3Config(**fields, use_sliding_window=fields["sliding_window"] is not None)


def _save_tokenizer(tokenizer: SavedTokenizer, path: Path, config: PreTrainedConfig) -> None:
    """Write the tokenizer with the lengths of the model and a token for padding; its ids go into `config`."""
    tokenizer.save(path)
    file = path / "tokenizer_config.json"
    described = json.loads(file.read_text())
    # Batches need one. Trainers ignore the labels of padding: nobody misses <unk>, but a model must learn </s>.
    described["pad_token"] = described.get("pad_token") or described.get("unk_token") or described["eos_token"]
    described["model_max_length"] = config.max_position_embeddings
    described["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 know
    file.write_text(json.dumps(described, indent=2, ensure_ascii=False))
    pad_id = tokenizer.get_vocab()[described["pad_token"]]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad_id}
    for name, token_id in ids.items():
        setattr(config, name, token_id)
    GenerationConfig(**ids).save_pretrained(path)


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of `config.json`. Raises UserError if it is no JSON object, or is of an absurd size or depth."""
    file = Path(path) / "config.json"
    fields = _read_json(file, "give the folder of a checkpoint")
    for part in (fields, fields.get("text_config")):
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            layers = part.get(name, 1) if isinstance(part, dict) else 1
            if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
                raise UserError(f"{file}: {name} is {layers!r:.60}; give a whole number from 1 to {_MOST_LAYERS:,}")
    return fields


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
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


def load_config(path: str | Path, backend: str = "auto") -> WindreachConfig:
    """The decoder for a checkpoint of one of the types above. UserError for any other, and for what it lacks."""
    file, fields = Path(path) / "config.json", read_config(path)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in (*_THEIRS, "windreach"):
        known = ", ".join(sorted(_THEIRS))
        raise UserError(f"{file}: model_type is {kind!r}; this loader knows {known} and windreach")
    for name in ("architectures", "dtype", "torch_dtype"):  # the decoder's are ours to choose
        fields.pop(name, None)
    try:
        if kind != "windreach":
            fields = _of_theirs(_THEIRS[kind](**fields))
        return WindreachConfig(**fields | {"attention_backend": backend})
    except (UserError, StrictDataclassError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # `transformers` checks types, and stumbles over other values. It raises whatever the stumble raises.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: {reason}") from error


def _of_theirs(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of our config for one of another type. Raises UserError for what our decoder would ignore."""
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(f"{name} is true; the decoder has no biases")
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if config.model_type == "llama" and window is not None:
        raise UserError(f"sliding_window is {window}, which a llama model ignores; remove it, or use mistral")
    if config.model_type == "mistral" or layer_types is None:  # mistral's own code ignores layer_types
        layer_types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    fields = {name: getattr(config, name) for name in _COMMON if hasattr(config, name)}
    fields["layers"] = [_spec_of(name, window) for name in layer_types]
    return fields | {"sliding_window": window, "qk_norm": config.model_type == "qwen3"}


def _spec_of(layer_type: str, window: int | None) -> dict[str, object]:
    if layer_type not in ("sliding_attention", "full_attention"):
        raise UserError(f"layer_types holds {layer_type!r}; the decoder knows sliding_attention and full_attention")
    return {"kind": "sliding", "window": window} if layer_type == "sliding_attention" else {"kind": "full"}


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index names. Other files beside them may be old copies."""
    names = {_WEIGHTS}
    if not (path / _WEIGHTS).exists() and (path / _INDEX).exists():
        try:
            names = set(map(str, _read_json(path / _INDEX, "copy it again")["weight_map"].values()))
        except (KeyError, AttributeError) as error:
            raise UserError(f"{path / _INDEX} is no index of weights ({error}); copy it again") from error
    for name in sorted(names):
        if not (path / name).is_file() or Path(name).name != name:  # a pipe would be waited for
            raise UserError(f"{path} holds no {name}; give the folder of a checkpoint")
    return [path / name for name in sorted(names)]


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, from the headers of the files. Raises UserError for a missing or damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as weights:
                names = weights.keys()
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} can't be read ({error}); it was cut short, take an older checkpoint") from error
    return shapes


def check_shapes(path: Path, expected: Mapping[str, torch.Tensor], tied: bool) -> None:
    """Raises UserError if the files in `path` hold other weights than those `expected`, which may be on meta."""
    saved, wanted = weight_shapes(path), {name: tuple(weight.shape) for name, weight in expected.items()}
    if tied and "lm_head.weight" not in saved:
        wanted.pop("lm_head.weight")
    problems = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    problems += [f"{name} is unknown" for name in saved.keys() - wanted.keys()]
    common = sorted(wanted.keys() & saved.keys())
    problems += [f"{name} is {saved[name]}, not {wanted[name]}" for name in common if saved[name] != wanted[name]]
    if problems:
        shown = "\n  ".join(sorted(problems)[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: weights and config.json don't belong together: {shown}{more}")


def load_weights(path: Path, tied: bool) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint folder whose headers have been checked. `tied`: the output is the embedding."""
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        weights |= load_file(file)
    if tied:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights
