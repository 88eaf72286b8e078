"""Checkpoints of Hugging Face: what is written is of the first type that can express the stack, and what is read is
checked before memory is taken.

    mistral     equal plain layers, sliding or full        ministral   plain sliding layers of one window, and full ones
    qwen3       the same with normalised heads             qwen2       the same with biases of q, k and v
    smollm3     the same as ministral, some layers not rotated             windreach   anything else

`model.families` lists what is read. A plain layer has no sink, no global tokens, and the model's own rotary positions.
"""

import errno
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    MinistralConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from model.config import WindreachConfig
from model.errors import UserError
from model.families import decoder_fields, read_config, read_json
from model.flops import count_parameters as count_parameters
from model.projections import split_name
from model.windows import LayerSpec

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STUMBLES = (StrictDataclassError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
_ARCHITECTURES = {
    "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "smollm3": "SmolLM3ForCausalLM", "windreach": "WindreachForCausalLM",
}  # fmt: skip


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
    rotated = [replace(spec, rope=True) for spec in config.specs]
    plain = all(spec in (LayerSpec("full"), LayerSpec("sliding", spec.window or 1)) for spec in rotated)
    some_not_rotated = not all(spec.rope for spec in config.specs)
    traits = {"qwen2": config.qkv_bias, "qwen3": config.qk_norm, "smollm3": some_not_rotated}
    special = [kind for kind, present in traits.items() if present]
    if not plain or len(windows) > 1 or len(special) > 1:
        return "windreach"
    if special:
        return special[0]
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
        _save_tokenizer(tokenizer, path, config, model.generation_config)
    config.save_pretrained(path)
    _add_rope_scaling(path / "config.json")
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


def _add_rope_scaling(file: Path) -> None:
    """Say scaled rotary positions also as transformers 4 and other readers look for them. They would go unscaled."""
    fields = json.loads(file.read_text())
    scaling = {name: value for name, value in fields["rope_parameters"].items() if name != "rope_theta"}
    if scaling["rope_type"] != "default":
        file.write_text(json.dumps(fields | {"rope_scaling": scaling}, indent=2, sort_keys=True) + "\n")


def _exported(config: WindreachConfig) -> PreTrainedConfig:
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    kind = exported_type(config)
    if kind == "windreach":
        return WindreachConfig(**fields)
    for ours in ("layers", "attention_backend", "qk_norm", "qkv_bias"):
        fields.pop(ours)
    fields["sliding_window"] = next((s.window for s in config.specs if s.kind == "sliding"), None)
    if kind == "mistral":
        return MistralConfig(**fields)
    fields["layer_types"] = [f"{s.kind}_attention" for s in config.specs]
    if kind == "ministral":
        return MinistralConfig(**fields)
    fields["use_sliding_window"] = fields["sliding_window"] is not None
    if kind == "smollm3":
        return SmolLM3Config(**fields, no_rope_layers=[int(s.rope) for s in config.specs])
    return Qwen2Config(**fields) if kind == "qwen2" else Qwen3Config(**fields)


def _save_tokenizer(
    tokenizer: SavedTokenizer, path: Path, config: PreTrainedConfig, generation: GenerationConfig | None
) -> None:
    """Write the tokenizer with the lengths of the model and a token for padding; its ids go into `config`.

    `generation_config.json` is that of the pretrained model. It may name several tokens that end an answer.
    """
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
    if generation is None or generation._from_model_config:  # nobody wrote it
        generation = GenerationConfig(**ids)
    generation.to_json_file(path / "generation_config.json")  # not save_pretrained, which refuses what people publish


# ------------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | Path, backend: str = "auto") -> WindreachConfig:
    """The decoder for a checkpoint of a family in `model.families`. UserError for any other, and for what it lacks."""
    return decoder_config(read_config(path), str(Path(path) / "config.json"), backend)


def decoder_config(fields: dict[str, Any], where: str, backend: str = "auto") -> WindreachConfig:
    """The same from the fields of a config.json, which come from `where`."""
    try:
        return WindreachConfig(**decoder_fields(fields) | {"attention_backend": backend})
    except (UserError, *_STUMBLES) as error:
        # `transformers` checks types, and stumbles over other values. It raises whatever the stumble raises.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {reason}") from error


def load_generation_config(path: Path) -> GenerationConfig | None:
    """What `generation_config.json` says of sampling and of the ends of answers. None if there is no such file."""
    if not (path / "generation_config.json").exists():
        return None
    try:
        read = GenerationConfig.from_dict(read_json(path / "generation_config.json", "copy it again"))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'generation_config.json'}: {' '.join(str(error).split())}; correct it") from error
    read._from_model_config = False  # so that it is written again
    return read


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index names. Other files beside them may be old copies."""
    names = {_WEIGHTS}
    if not (path / _WEIGHTS).exists() and (path / _INDEX).exists():
        try:
            names = set(map(str, read_json(path / _INDEX, "copy it again")["weight_map"].values()))
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


def check_shapes(path: Path, expected: Mapping[str, torch.Tensor], tied: bool, may_lack: Collection[str] = ()) -> None:
    """Raises UserError if the files in `path` hold other weights than those `expected`, which may be on meta."""
    saved = {_our_name(name): shape for name, shape in weight_shapes(path).items()}
    wanted = {name: tuple(weight.shape) for name, weight in expected.items()}
    for name in ("lm_head.weight",) * tied + tuple(may_lack):
        if name not in saved:
            wanted.pop(name)
    problems = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    problems += [f"{name} is unknown" for name in saved.keys() - wanted.keys()]
    common = sorted(wanted.keys() & saved.keys())
    problems += [f"{name} is {saved[name]}, not {wanted[name]}" for name in common if saved[name] != wanted[name]]
    if problems:
        shown = "\n  ".join(sorted(problems)[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: weights and config.json don't belong together: {shown}{more}")


def _our_name(name: str) -> str:
    """The name in our state dict of a weight in a file of any family."""
    return name.replace(".self_attn.sinks", ".self_attn.sink_logits")  # granite_swa


class SavedWeights:
    """The weights in a checkpoint folder by the names of our parameters. Each is read when it is asked for.

    The files are mapped, so processes of one machine share what they read. Only projections that are one parameter in
    memory are copied, to be joined. The headers of the files must have been checked (`check_shapes`).
    """

    def __init__(self, folder: Path):
        files = [safe_open(file, "pt") for file in weight_files(folder)]
        self._files = {_our_name(name): (name, file) for file in files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return split_name(name)[0] in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        """The weight in the dtype of the file. Don't write into it."""
        tensors = [file.get_tensor(saved) for saved, file in map(self._files.__getitem__, split_name(name))]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
