"""A deep stack that starts as a shallower trained one, its layers repeated (stacking: Gong and others, 2019).

What one layer of a relay has learned, to hand a value on by W - 1 tokens, the layer above it needs too. So a stack
grown from a trained relay recalls farther than that one did before it has been trained for a single step.
"""

import re

import torch

from model.decoder import WindreachForCausalLM
from model.errors import UserError


def grown_from(shallow: int, deep: int) -> list[int]:
    """For each layer of the deep stack the layer that it starts as.

    The two ends do work of their own: they find the value and say it. Those between stay as they are, and are followed
    by as many of themselves as are missing, the last ones, so that what each layer reads is what it was trained
    on, or near it. Raises ValueError below three layers.

    >>> grown_from(5, 7), grown_from(4, 9)
    ([0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 2, 1, 2, 1, 2, 3])
    """
    if not 3 <= shallow <= deep:
        raise ValueError(f"{shallow} layers can't grow to {deep}; give at least 3, and no more than there are here")
    between, missing = shallow - 2, deep - shallow
    return [*range(shallow - 1), *(1 + i % between for i in range(-missing, 0)), shallow - 1]


def grow(model: WindreachForCausalLM, trained: WindreachForCausalLM) -> None:
    """Overwrite the weights of `model` with those of `trained`, in place; windows and kinds of layers may differ.

    Raises UserError where a weight has another shape there, or is missing.
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
