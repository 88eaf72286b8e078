"""FlexAttention: any layer kind as one compiled kernel that skips blocks which nobody sees (Dong et al., 2412.05496).

On CUDA it has a gradient. On a CPU it runs forward only.

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
from model.packing import Packing
from model.windows import LayerSpec, visible


@dataclass(frozen=True)
class Flex:
    """The blocks to score and the mask inside them, for T tokens. A layer with sinks has one more key, at index T."""

    blocks: BlockMask
    tokens: int

    @staticmethod
    def of(spec: LayerSpec, packing: Packing) -> "Flex":
        positions, documents = packing.positions, packing.documents
        rows, t = positions.shape if documents is None else documents.shape
        keys = F.pad(positions, (0, 1))
        ids = None if documents is None else F.pad(documents, (0, 1), value=-1)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = visible(spec, _at(positions, b, q), _at(keys, b, k)) & (k < t)
            if ids is not None:
                seen = seen & (_at(ids, b, q) == _at(ids, b, k)) & (_at(ids, b, k) >= 0)
            return seen | (k == t) if spec.sink else seen

        device, batch = positions.device.type, rows if rows > 1 else None
        blocks = create_block_mask(sees, batch, None, t, t + spec.sink, device=device, _compile=device == "cuda")
        return Flex(blocks, t)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """A sink is one more key, with value zero, whose score is the learned logit."""
        if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            raise UserError(
                "model.attention_backend is 'flex', and FlexAttention has no gradient on a CPU; "
                "train with auto or blocked"
            )
        gqa = q.shape[1] != k.shape[1]
        if sinks is None:
            return _run(q, k, v, block_mask=self.blocks, enable_gqa=gqa)
        t, sink_h = self.tokens, sinks.float()

        def with_sink(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(k == t, sink_h[h].to(score.dtype), score)

        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return _run(q, k, v, score_mod=with_sink, block_mask=self.blocks, enable_gqa=gqa)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Compiled on CUDA. On a CPU the compiled kernel of torch 2.13 returned wrong numbers for short rows."""
    if q.device.type != "cpu":
        return _compiled()(q, k, v, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
        return flex_attention(q, k, v, **options)


def _at(x: Tensor, b: Tensor, i: Tensor) -> Tensor:
    """Element i of row b of x (B or 1, T)."""
    return x[0, i] if len(x) == 1 else x[b, i]
