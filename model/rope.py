"""Rotary position embedding, half-split as in `transformers`: element i of a head pairs with element i + D/2.

Legend: B batch, T positions, H heads, D head size.
Source: Su et al., "RoFormer", arXiv 2104.09864.
"""

import torch
from torch import Tensor

from model.packing import Packing, kept_per_shape

Rotary = tuple[Tensor, Tensor]  # cosines and sines


def rotary_tables(packing: Packing, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of the tokens' positions, each (B or 1, 1, T, D / 2) in float32. Kept for whole rows."""
    if packing.whole:
        return _of_whole_rows(packing.positions.shape[1], head_dim, theta, packing.positions.device)
    return _tables(packing.positions, head_dim, theta)


@kept_per_shape
def _of_whole_rows(tokens: int, head_dim: int, theta: float, device: torch.device) -> Rotary:
    return _tables(Packing.of_whole_rows(tokens, device).positions, head_dim, theta)


def _tables(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float, device=positions.device) / head_dim)
    angles = (positions[..., None].float() * frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_bhtd: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys (B, H, T, D) rotated by the angles of their positions."""
    (a, b), (cos, sin) = x_bhtd.chunk(2, dim=-1), rotary
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_bhtd.dtype)
