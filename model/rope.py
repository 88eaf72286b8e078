"""Rotary position embedding, half-split as in `transformers`: element i of a head pairs with element i + D/2.

Legend: B batch, T positions, H heads, D head size.
Source: Su et al., "RoFormer", arXiv 2104.09864.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import WindreachConfig
from model.packing import Packing, kept_per_shape

Rotary = tuple[Tensor, Tensor]  # cosines and sines


@dataclass(frozen=True, eq=False)
class Rope:
    """How a kind of layer rotates queries and keys.

    frequencies: (D / 2,) in radians a token. factor: cosines and sines are multiplied by it (YaRN).
    """

    frequencies: Tensor
    factor: float = 1.0


@torch.inference_mode(False)
def rope_of(config: WindreachConfig, theta: float, device: torch.device) -> Rope:
    """The rotation with base `theta`, scaled as `config.rope_parameters` say. `transformers` computes the scaling."""
    assert isinstance(config.rope_parameters, dict)
    kind, d = config.rope_parameters["rope_type"], config.head_dim
    if kind == "default":
        return Rope(1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float, device=device) / d))
    of_theta = copy(config)
    of_theta.rope_parameters = config.rope_parameters | {"rope_theta": theta}
    return Rope(*ROPE_INIT_FUNCTIONS[kind](of_theta, device))


def rotary_tables(packing: Packing, rope: Rope) -> Rotary:
    """Cosines and sines of the tokens' positions, each (B or 1, 1, T, D / 2) in float32. Kept for whole rows."""
    if packing.whole:
        return _of_whole_rows(packing.positions.shape[1], rope)
    return _tables(packing.positions, rope)


@kept_per_shape
def _of_whole_rows(tokens: int, rope: Rope) -> Rotary:
    return _tables(Packing.of_whole_rows(tokens, rope.frequencies.device).positions, rope)


def _tables(positions: Tensor, rope: Rope) -> Rotary:
    angles = (positions[..., None].float() * rope.frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if rope.factor == 1 else (cos * rope.factor, sin * rope.factor)


def rotate(x_bhtd: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys (B, H, T, D) rotated by the angles of their positions."""
    (a, b), (cos, sin) = x_bhtd.chunk(2, dim=-1), rotary
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_bhtd.dtype)
