"""A deep stack that starts from a shallower trained one by repeating its layers (stacking: Gong et al., 2019).

A layer of a relay has learned to move a value by W - 1 tokens, and the layer above it needs the same. So the grown
stack recalls farther than the shallow one before its first training step.
"""

import re

import torch

from model.decoder import WindreachForCausalLM
from model.errors import UserError


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
