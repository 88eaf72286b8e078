"""FlexAttention: any layer kind as one compiled kernel that skips the blocks nobody sees (Dong et al., 2412.05496).

On CUDA it has a gradient; on a CPU it runs forward only.

Legend: B batch, T query positions, S key positions, H heads, G kv heads, D head size.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.errors import UserError
from model.places import Places
from model.windows import LayerSpec, visible


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Compiled on CUDA. On a CPU the compiled kernel of torch 2.13 gave wrong numbers for short rows: not there."""
    if q.device.type != "cpu":
        return _compiled()(q, k, v, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
        return flex_attention(q, k, v, **options)


@dataclass(frozen=True)
class FlexMask:
    """The blocks to be scored and the pairs inside them; for T tokens, and one key more if there is a sink."""

    blocks: BlockMask
    tokens: int


def flex_mask(spec: LayerSpec, places: Places) -> FlexMask:
    """Made once for all layers of a kind."""
    positions, documents = places.positions, places.documents
    rows, t = positions.shape if documents is None else documents.shape
    keys = F.pad(positions, (0, 1))
    ids = None if documents is None else F.pad(documents, (0, 1), value=-1)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = visible(spec, _at(positions, b, q), _at(keys, b, k)) & (k < t)
        if ids is not None:
            seen = seen & (_at(ids, b, q) == _at(ids, b, k)) & (_at(ids, b, k) >= 0)
        return seen | (k == t) if spec.sink else seen

    device = positions.device
    made = create_block_mask(
        sees, rows if rows > 1 else None, None, t, t + spec.sink, device=device.type, _compile=device.type == "cuda"
    )
    return FlexMask(made, t)


def _at(x: Tensor, b: Tensor, i: Tensor) -> Tensor:
    """Element of (B or 1, T): one row serves all."""
    return x[0, i] if len(x) == 1 else x[b, i]


def flex(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None = None
) -> Tensor:
    """Attention (B, H, T, D). A sink is a key more, of value zero, whose score is the learned logit."""
    if q_bhtd.device.type == "cpu" and torch.is_grad_enabled() and q_bhtd.requires_grad:
        raise UserError(
            "model.attention_backend is 'flex', and FlexAttention has no gradient on a CPU; train with auto or blocked"
        )
    mask = places.made if isinstance(places.made, FlexMask) else flex_mask(spec, places)
    gqa = q_bhtd.shape[1] != k_bgsd.shape[1]
    if sink_h is None:
        return _run(q_bhtd, k_bgsd, v_bgsd, block_mask=mask.blocks, enable_gqa=gqa)
    t, sinks = mask.tokens, sink_h.float()

    def scored(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(k == t, sinks[h].to(score.dtype), score)

    k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k_bgsd, v_bgsd))
    return _run(q_bhtd, k, v, score_mod=scored, block_mask=mask.blocks, enable_gqa=gqa)
