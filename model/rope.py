"""Rotary position embedding, half-split as in `transformers` (element i pairs with element i + D/2).

Legend: B batch, T positions, H heads, D head size.
Source: Su et al., "RoFormer", arXiv 2104.09864.
"""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cosines and sines


def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position (D / 2,) in float32, from 1 down to nearly 1 / theta."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float, device=device) / head_dim)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines, each (B, T, D) in float32, of positions (B, T)."""
    angles = positions[..., None].float() * frequencies(head_dim, theta, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_bhtd: Tensor, cos_btd: Tensor, sin_btd: Tensor) -> Tensor:
    """Turn queries or keys (B, H, T, D) by the angles of their positions."""
    a, b = x_bhtd.chunk(2, dim=-1)
    cos, sin = (x[:, None, :, : a.shape[-1]] for x in (cos_btd, sin_btd))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_bhtd.dtype)
