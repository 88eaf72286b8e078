"""FlexAttention: any layer kind as one compiled kernel that skips blocks which nobody sees (Dong et al., 2412.05496).

Which blocks of SIDE queries and SIDE keys are scored follows from the positions in them. Blocks that not everybody sees
are masked inside. So no mask of T x T exists, and nothing is read from the device.

On CUDA it has a gradient. On a CPU it runs forward only.

Legend: B batch, T positions, H heads, G kv heads, D head size, N blocks of a row.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from model.packing import Packing
from model.windows import LayerSpec, visible

SIDE = 128  # tokens of a block: what the kernels are made for

# Compiled by itself, so that layers which are not compiled never make all scores. Each shape is a compilation: `Flex`
# keeps them few. Beyond the limit PyTorch goes on without compiling; `fullgraph` makes that an error.
_compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
MOST_COMPILATIONS = 256


@dataclass(frozen=True)
class Flex:
    """The blocks to score, and the mask inside them, for rows padded to a whole number of blocks."""

    blocks: BlockMask
    pad: int

    @staticmethod
    def of(spec: LayerSpec, packing: Packing) -> "Flex":
        t = packing.positions.shape[1]
        size = _round_up(t)
        packing = _pad(packing, size - t)
        partial, full = _blocks_seen(spec, packing)
        of_queries = *_in_order(partial), *_in_order(full)
        of_keys = *_in_order(partial.mT), *_in_order(full.mT)
        mask = _mask(spec, packing)
        return Flex(BlockMask((size, size), *of_queries, *of_keys, BLOCK_SIZE=(SIDE, SIDE), mask_mod=mask), size - t)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """A sink takes its share of each softmax: the share follows from the log-sum-exp of the other scores."""
        options: dict[str, Any] = {"block_mask": self.blocks, "enable_gqa": q.shape[1] != k.shape[1]}
        t = q.shape[2]
        if self.pad:
            q, k, v = (F.pad(x, (0, 0, 0, self.pad)) for x in (q, k, v))
        if sinks is None:
            return _run(q, k, v, **options)[:, :, :t]
        out, aux = _run(q, k, v, return_aux=AuxRequest(lse=True), **options)
        share = 1 - torch.sigmoid(sinks.float()[:, None] - aux.lse)
        return (out * share[..., None].to(out.dtype))[:, :, :t]


def _run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Compiled on CUDA. On a CPU the compiled kernel of torch 2.13 returned wrong numbers for short rows."""
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)
    if q.device.type != "cpu":
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
            return _compiled(q, k, v, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
        return flex_attention(q, k, v, **options)


def _mask(spec: LayerSpec, packing: Packing) -> Any:
    """What FlexAttention asks for each query and key of a block that is not seen in full."""
    positions, ids, whole = packing.positions, packing.documents, packing.whole

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if whole:
            return visible(spec, q, k)
        seen = visible(spec, _at(positions, b, q), _at(positions, b, k))
        if ids is not None:
            seen = seen & (_at(ids, b, q) == _at(ids, b, k)) & (_at(ids, b, k) >= 0)
        return seen

    return sees


def _at(x: Tensor, b: Tensor, i: Tensor) -> Tensor:
    """Element i of row b of x (B or 1, T)."""
    return x[0, i] if len(x) == 1 else x[b, i]


def _round_up(tokens: int) -> int:
    """Tokens of a row with padding: up to 16 blocks, then up to 16 times 2 blocks, and so on.

    >>> [_round_up(tokens) for tokens in (5, 128, 129, 2048, 2049)]
    [128, 128, 256, 2048, 2304]
    """
    step = SIDE
    while 16 * step < tokens:
        step *= 2
    return -(-tokens // step) * step


def _pad(packing: Packing, pad: int) -> Packing:
    """The packing with padding behind. Whole rows only become longer: nobody sees what comes later."""
    positions, ids = packing.positions, packing.documents
    if packing.whole:
        return Packing.of_whole_rows(positions.shape[1] + pad, positions.device)
    ids = torch.zeros_like(positions) if ids is None else ids
    return Packing(F.pad(positions, (0, pad)), F.pad(ids, (0, pad), value=-1))


def _blocks_seen(spec: LayerSpec, packing: Packing) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries sees at least in part, and which in full: bool (B, 1, N, N), disjoint.

    A block of queries and an earlier block of keys share at most one document: the first of the queries and the last
    of the keys. The nearest and the farthest of their tokens in it decide. A block that nobody sees may count as seen
    in part.
    """
    ids = torch.zeros_like(packing.positions) if packing.documents is None else packing.documents
    ids, positions = (x.unflatten(1, (-1, SIDE)) for x in (ids, packing.positions.expand(len(ids), -1)))
    rows = torch.arange(ids.shape[1], device=ids.device)
    most = torch.iinfo(ids.dtype).max
    first, last = ids.where(ids >= 0, most).amin(-1), ids.amax(-1)
    q_low, q_high = _range(positions, ids == first[..., None])
    k_low, k_high = _range(positions, ids == last[..., None])
    of_query, of_key = (slice(None), slice(None), None), (slice(None), None, slice(None))

    shared = (first[of_query] == last[of_key]) & (last[of_key] >= 0)
    near, far = _near_and_far(spec)
    seen = visible(near, q_low[of_query], k_high[of_key])
    if spec.global_tokens:
        seen = seen | (k_low[of_key] < spec.global_tokens)
    earlier, same = rows[None, :, None] > rows, rows[None, :, None] == rows
    some = (earlier & shared & seen) | (same & (last >= 0)[of_key])

    one_document = (ids == ids[..., :1]).all(-1)
    full = earlier & shared & one_document[of_query] & one_document[of_key]
    full = full & visible(far, q_high[of_query], k_low[of_key]) & (spec.dilation == 1)
    return (some & ~full)[:, None], full[:, None]


def _near_and_far(spec: LayerSpec) -> tuple[LayerSpec, LayerSpec]:
    """Layers without global tokens of which the nearest pair sees if any does, and the farthest only if all do."""
    spec = replace(spec, global_tokens=0)
    return (replace(spec, kind="sliding", window=spec.ring_slots, dilation=1) if spec.dilation > 1 else spec), spec


def _range(positions: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of the `chosen` positions of each block (B, N, SIDE)."""
    most = torch.iinfo(positions.dtype).max
    return positions.where(chosen, most).amin(-1), positions.where(chosen, -1).amax(-1)


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are marked, and the indices of all blocks with the marked ones in front: int32."""
    order = blocks.int().contiguous().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()
