"""The decoder before its first step: drawn at random, grown from a shallower run, or read from a pretrained model.

A deep stack may start from a shallower trained one by repeating its layers (stacking: Gong et al., 2019). A layer of a
relay has learned to move a value by W - 1 tokens, and the layer above it needs the same. So the grown stack recalls
farther than the shallow one before its first training step.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.pretrained import checkpoint_folder
from data.tokenizer import Tokenizer, load_tokenizer, prepare_tokenizer
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM, build_model, empty_model
from model.errors import UserError
from model.hub import check_shapes, weight_files
from training.objective import RELAY_HEAD
from training.run.checkpoint import file_sha256, load_state, newest_valid, refuse_damaged
from training.run.folder import check_same_data, read_facts, run_dir
from training.settings.build import init_options
from training.settings.schema import Settings


def begins(settings: Settings, resume: str) -> bool:
    """Whether this is a run's first start, at which no checkpoint will be resumed."""
    return resume == "never" or (resume == "auto" and newest_valid(run_dir(settings)) is None)


def run_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer of the run: prepared, or its own copy where that of the pretrained model is gone."""
    own = run_dir(settings) / "tokenizer"
    try:
        return prepare_tokenizer(settings)
    except UserError:
        if settings.model.init.from_pretrained is None or not own.is_dir():
            raise
        return load_tokenizer(own)


# -- a pretrained model ------------------------------------------------------------------------------------------------


def new_decoder(config: WindreachConfig, settings: Settings) -> WindreachForCausalLM:
    """The decoder with random weights. With `model.init.from_pretrained` on the meta device, where it takes no memory.

    Its memory and its weights follow, when it is known how the processes share it.
    """
    if settings.model.init.from_pretrained is not None:
        return empty_model(config)
    return build_model(config, init_options(settings), settings.seed)


def pretrained_folder(decoder: WindreachForCausalLM, settings: Settings, resume: str) -> Path | None:
    """The folder of `model.init.from_pretrained`, whose weights fit `decoder`. None if a run doesn't begin with one.

    Every rank calls this. Raises UserError if weights are missing or have other shapes.
    """
    named = settings.model.init.from_pretrained
    if named is None or not begins(settings, resume):
        return None
    try:
        folder, expected = checkpoint_folder(named), decoder.state_dict()
        new = [name for name in expected if name.endswith("sink_logits")]
        check_shapes(folder, expected, decoder.config.tie_word_embeddings, may_lack=new)
        return folder
    except UserError as error:
        raise UserError(f"model.init.from_pretrained = {named!r}: {error}") from error


def weights_fact(folder: Path | None) -> dict[str, str]:
    """The SHA-256 of pretrained weights for run.json: that of all files in the order of their names."""
    if folder is None:
        return {}
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(np.memmap(file, mode="r").data)
    return {"pretrained_sha256": digest.hexdigest()}


# -- a shallower run ---------------------------------------------------------------------------------------------------


def grow_from_run(
    decoder: WindreachForCausalLM, settings: Settings, tokenizer: Tokenizer, resume: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Fill `decoder`, in place, with the layers of the run `model.init.grow_from`.

    Returns a fact about that run for run.json, and its relay head. Does nothing if no run is named or a checkpoint will
    be resumed. Every rank calls this and gets the same answer.
    Raises UserError if that run has no export, another tokenizer or other widths.
    """
    named = settings.model.init.grow_from
    if named is None or not begins(settings, resume):
        return {}, {}
    run = Path(named).expanduser()
    export = run / "hf"
    try:
        if not export.is_dir():
            raise UserError("holds no hf/, the export of a finished run; train that one first")
        refuse_damaged(export)
        check_same_data(run, read_facts(run), {"tokenizer_sha256": tokenizer.sha256})
        grow(decoder, WindreachForCausalLM.from_pretrained(export))
        return {"grown_from_sha256": file_sha256(export / "model.safetensors")}, _relay_head(run, settings)
    except UserError as error:
        raise UserError(f"model.init.grow_from = {named!r}: {error}") from error


def _relay_head(run: Path, settings: Settings) -> dict[str, Tensor]:
    """The relay head of the run's last checkpoint, if both runs have one. A new head would mislead trained layers."""
    checkpoint = newest_valid(run) if settings.recall.enabled and settings.recall.relay_loss_weight else None
    head = load_state(checkpoint)[1].get(RELAY_HEAD) if checkpoint is not None else None
    if head is not None and len(head) != settings.recall.values:
        raise UserError(f"recall.values is {len(head)} there, {settings.recall.values} here")
    return {} if head is None else {RELAY_HEAD: head}


def grown_from(shallow: int, deep: int) -> list[int]:
    """For each layer of the deep stack, the layer of the shallow one whose weights it starts from.

    The first and the last layer do work of their own: they find the value and output it. The middle layers stay, and
    the last of them are repeated, so that each layer reads what it was trained on or something close.
    Raises ValueError for fewer than three layers.

    >>> grown_from(5, 7), grown_from(4, 9)
    ([0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 2, 1, 2, 1, 2, 3])
    """
    if not 3 <= shallow <= deep:
        raise ValueError(f"{shallow} layers can't grow to {deep}; start from at least 3 layers, and at most {deep}")
    middle, missing = shallow - 2, deep - shallow
    return [*range(shallow - 1), *(1 + i % middle for i in range(-missing, 0)), shallow - 1]


def grow(model: WindreachForCausalLM, trained: WindreachForCausalLM) -> None:
    """Overwrite the weights of `model` with those of `trained`, in place. Windows and kinds of layers may differ.

    Raises UserError where `trained` lacks a weight or has another shape.
    """
    theirs, ours = trained.state_dict(), model.state_dict()
    try:
        order = grown_from(len(trained.model.layers), len(model.model.layers))
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, weight in ours.items():
        source = re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{order[int(found[1])]}.", name)
        there = tuple(theirs[source].shape) if source in theirs else "missing"
        if there != tuple(weight.shape):
            raise UserError(f"{source} is {there} there, {name} {tuple(weight.shape)} here; give both the same widths")
        with torch.no_grad():
            weight.copy_(theirs[source])
