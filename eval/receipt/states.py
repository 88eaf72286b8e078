"""The states of one model that a receipt compares: original, windowed, adapted."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import yaml

from data.pretrained import checkpoint_folder
from eval.models import Examined, load_model
from model.errors import UserError, printable
from training.settings.pretrained import KEPT_BY_LAYERS

ORIGINAL, WINDOWED, ADAPTED = "original", "windowed", "adapted"


def open_states(
    before: str, after: str | None, patterns: Sequence[str] = (), device: str | None = None
) -> dict[str, Examined]:
    """The original first; with AFTER also windowed and adapted; then one windowed state for each pattern.

    Raises UserError where there is nothing to compare, and where AFTER has other sizes or another tokenizer.
    """
    if after is None and not patterns:
        raise UserError("a receipt compares states; give AFTER, the run folder of the adapted model, or --layers")
    original = load_before("BEFORE", before, device)
    states = {ORIGINAL: original}
    if after is not None:
        adapted = load_model(after, device, ours_only=True)
        if original.tokenizer.get_vocab() != adapted.tokenizer.get_vocab():
            raise UserError(
                f"AFTER {adapted.name!r} has another tokenizer than BEFORE {original.name!r}, and figures of "
                "the two can't be compared; give the model that AFTER started from"
            )
        states |= {WINDOWED: with_config(original, adapted.model.config), ADAPTED: adapted}
    for text in patterns:
        name, _, pattern = text.rpartition("=")
        given = zip(original.specs, layers_of(pattern, original.layers), strict=True)
        layers = [{field: getattr(spec, field) for field in KEPT_BY_LAYERS} | layer for spec, layer in given]
        config = original.model.config.to_dict() | {"layers": layers}
        states[name or pattern] = with_config(original, type(original.model.config)(**config))
    return states


def load_before(argument: str, name: str, device: str | None) -> Examined:
    """A pretrained model in our decoder, by any name that `model.init.from_pretrained` takes.

    `argument` is what a sentence calls it. Raises UserError if there is none, or one that the decoder can't run.
    """
    try:
        folder = checkpoint_folder(name)
    except UserError as error:
        raise UserError(f"{argument} {name!r}: {error}") from error
    return replace(load_model(str(folder), device, ours_only=True), name=printable(name.rstrip("/")))


def layers_of(pattern: str, depth: int) -> list[dict[str, Any]]:
    """The layers of a pattern such as `[{window: 64}, {kind: full}]`, repeated over the depth; UserError if it is none.

    >>> layers_of("[{window: 64}, {window: 64}, {kind: full}]", 4)[2:]
    [{'kind': 'full'}, {'window': 64}]
    """
    try:
        layers = yaml.safe_load(pattern)
    except yaml.YAMLError:
        layers = None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise UserError(
            f"--layers {pattern!r} is no list of layers; write it as model.layers is written in a config, such as "
            "'[{window: 64}, {window: 64}, {kind: full}]'"
        )
    return list(islice(cycle(layers), depth))


def with_config(original: Examined, config: Any) -> Examined:
    """The original weights, shared in memory, in a decoder with other layers. Sinks that it lacks start at logit 0."""
    import torch

    from model.decoder import WindreachForCausalLM

    with torch.device("meta"):
        model = WindreachForCausalLM(config)
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, original.model))
    sinks = {name for name in ours.keys() - theirs.keys() if name.endswith("sink_logits")}
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (ours, theirs)]
    for name in sorted((shapes[0].keys() | shapes[1].keys()) - sinks):
        if shapes[0].get(name) != shapes[1].get(name):
            raise UserError(
                f"AFTER is not BEFORE {original.name!r} with other layers: {name} is {_text(shapes[0].get(name))} in "
                f"AFTER and {_text(shapes[1].get(name))} in BEFORE; give the model that AFTER started from"
            )
    zeros = {name: torch.nn.Parameter(torch.zeros(ours[name].shape, device=original.device)) for name in sinks}
    for name, parameter in (theirs | zeros).items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
    return replace(original, model=model.eval(), specs=config.specs)


def _text(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
