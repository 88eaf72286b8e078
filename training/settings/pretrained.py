"""Settings that a run takes over from a pretrained model, `model.init.from_pretrained`.

Its sizes, its layers and its tokenizer are filled in when the YAML is read. So the settings.yaml of a run says all, and
the run goes on without the model that it began with. The YAML gives only what is to change.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from data.pretrained import checkpoint_config, tokenizer_name
from model.errors import UserError
from model.families import Fields, decoder_fields
from training.settings.problems import Problem

# What the weights decide. The YAML may not give another value.
_OF_THE_WEIGHTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "qk_norm", "qkv_bias", "tie_word_embeddings",
)  # fmt: skip
_FILLED = (*_OF_THE_WEIGHTS, "sliding_window", "layers", "rope_theta", "max_position_embeddings")
KEPT_BY_LAYERS = ("rope", "rope_theta", "sink")  # what a layer of the YAML leaves out stays as the model has it
NO_WINDOW = 64  # tokens: `sliding_window` where no layer has one


def fill_in(tree: Fields) -> list[Problem]:
    """Fill in `tree`, in place, what the pretrained model decides. Returns what contradicts it."""
    model, at = dict(_section(tree, "model")), ("model", "init", "from_pretrained")
    named = _section(model, "init").get("from_pretrained")
    if not isinstance(named, str):
        return []
    if "grow_from" in model["init"]:
        return [Problem(at, named, "model.init.grow_from is given too", "remove one of them")]
    data = dict(_section(tree, "data"))
    tokenizer = data["tokenizer"] = dict(_section(data, "tokenizer"))
    tree |= {"model": model, "data": data}
    if all(name in model for name in _FILLED) and "model_file" in tokenizer:
        return []
    try:
        theirs = pretrained_settings(named)
    except UserError as error:
        if (saved := _settings_of_the_run(tree, named)) is None:
            return [Problem(at, named, str(error), "correct it")]
        theirs = saved
    problems = [
        Problem(("model", name), model[name], f"the pretrained model has {theirs[name]!r}", "remove it")
        for name in _OF_THE_WEIGHTS
        if name in model and model[name] != theirs[name]
    ]
    for name in _OF_THE_WEIGHTS:
        model.setdefault(name, theirs[name])
    tokenizer.setdefault("model_file", theirs["model_file"])
    _fill_positions(model, theirs)
    return problems + _fill_layers(model, theirs)


def _section(tree: Mapping[str, Any], name: str) -> Fields:
    """A section of the settings; empty if it is missing or no section, which pydantic will say."""
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def pretrained_settings(named: str) -> Fields:
    """The settings of a pretrained model, each layer described. Raises UserError for what the decoder lacks."""
    try:
        fields: Fields = {"qk_norm": False, "qkv_bias": False, **decoder_fields(checkpoint_config(named))}
        fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        rope = dict(fields["rope_parameters"])
        positions = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
        same = (*_OF_THE_WEIGHTS, "max_position_embeddings", "sliding_window", "layers")
        return {name: fields[name] for name in same} | positions | {"model_file": tokenizer_name(named)}
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"its config.json is damaged ({type(error).__name__}: {error}); copy it again") from error


def _settings_of_the_run(tree: Fields, named: str) -> Fields | None:
    """What a run that has begun with this model knows of it. None if it hasn't begun."""
    folder = Path(str(tree.get("run_dir") or f"runs/{tree.get('name')}")).expanduser()
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        saved = yaml.safe_load((folder / "settings.yaml").read_text())
        model, tokenizer = saved["model"], saved["data"]["tokenizer"]
        if model["init"]["from_pretrained"] == named:
            return tokenizer | model | {"layers": list(islice(cycle(model["layers"]), model["num_hidden_layers"]))}
    return None


def _fill_positions(model: Fields, theirs: Fields) -> None:
    """The rotation. New scaling starts from the context that the model was trained on, and sets the longest row."""
    model.setdefault("rope_theta", theirs["rope_theta"])
    before, scaling = theirs["rope_scaling"] or {}, _section(model, "rope_scaling")
    if "rope_scaling" not in model and before:
        model["rope_scaling"] = before
    elif scaling:
        trained = before.get("original_max_position_embeddings") or theirs["max_position_embeddings"]
        if scaling.get("rope_type") != "linear":
            model["rope_scaling"] = scaling = {"original_max_position_embeddings": trained} | scaling
        if isinstance(factor := scaling.get("factor"), int | float) and math.isfinite(factor):
            model.setdefault("max_position_embeddings", int(trained * factor))
    model.setdefault("max_position_embeddings", theirs["max_position_embeddings"])


def _fill_layers(model: Fields, theirs: Fields) -> list[Problem]:
    """The layers, and the window of those that name none."""
    window, own, given = theirs["sliding_window"], theirs["layers"], model.get("layers")
    if given is not None and not (isinstance(given, list) and given and all(isinstance(g, dict) for g in given)):
        return []  # pydantic will say what is wrong
    problems = []
    if given is None:
        layers = [{k: v for k, v in layer.items() if k != "window" or v not in (None, window)} for layer in own]
        if "sliding_window" in model and not any(_takes_the_window(layer) for layer in layers):
            what, remedy = "no layer of the pretrained model takes it", "add model.layers, such as [{kind: sliding}]"
            problems = [Problem(("model", "sliding_window"), model["sliding_window"], what, remedy)]
    else:
        pairs = zip(own, islice(cycle(given), max(len(given), len(own))), strict=False)
        layers = [{k: theirs[k] for k in KEPT_BY_LAYERS if k in theirs} | ours for theirs, ours in pairs]
        layers += given[len(own) :]
    model["layers"] = _pattern(layers)
    if window is None and not any(map(_takes_the_window, layers)):
        window = min((layer["window"] for layer in layers if layer.get("window")), default=NO_WINDOW)
    if window is not None:
        model.setdefault("sliding_window", window)
    return problems


def _takes_the_window(layer: Fields) -> bool:
    """Whether the window of a layer is `model.sliding_window`."""
    return layer.get("kind") != "full" and layer.get("window") is None


def _pattern(layers: list[Fields]) -> list[Fields]:
    """The shortest pattern that gives these layers when it is repeated.

    >>> _pattern([{"a": 1}, {}, {"a": 1}])
    [{'a': 1}, {}]
    """
    return next(layers[:n] for n in range(1, len(layers) + 1) if [*islice(cycle(layers[:n]), len(layers))] == layers)
