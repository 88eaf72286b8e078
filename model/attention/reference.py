"""Dense attention with an explicit mask: the oracle, and the forms that read a cache of few keys.

Legend: B batch, T query positions, S key positions, H heads, G kv heads, R = H / G (not the reach), D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.packing import Packing, may_see
from model.windows import LayerSpec

# q (B, H, T, D), k and v (B, G, S, D), sink logits (H,) or None -> (B, H, T, D) in the dtype of v.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

QUERIES_PER_MASK = 256  # of a chunk behind a cache: the mask has a column for every key in the cache
LOOP_KEYS = 256  # for one compiled query on a CPU: up to this many keys, generated loops are faster than a kernel


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products with `x` are computed, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def at_least_float32(x: Tensor) -> Tensor:
    """A softmax in less precision loses too much. float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend_dense(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, seen_bts: Tensor, sink_h: Tensor | None = None
) -> Tensor:
    """Softmax in float32 over the keys that `seen_bts` (B or 1, T, S) marks; a sink takes its share of each softmax."""
    b, h, t, d = q_bhtd.shape
    g = k_bgsd.shape[1]
    q_grouped = q_bhtd.reshape(b, g, h // g * t, d)
    scores = at_least_float32(q_grouped @ k_bgsd.transpose(-1, -2)).reshape(b, g, h // g, t, -1) * d**-0.5
    sinks = None if sink_h is None else at_least_float32(sink_h).reshape(1, g, -1, 1, 1)
    weights = _softmax(scores, seen_bts[:, None, None], sinks)
    out = weights.to(v_bgsd.dtype).reshape(b, g, h // g * t, -1) @ v_bgsd
    return out.reshape(b, h, t, d)


def _softmax(scores: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of the seen scores. Rows that see nothing are zero."""
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    weights = torch.exp(scores - peak.detach()) * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak.detach())
    return weights / total.clamp_min(torch.finfo(scores.dtype).tiny)


@dataclass(frozen=True)
class Dense:
    """The oracle. seen: bool (B or 1, T, S), see `model.packing.may_see`."""

    seen: Tensor

    @staticmethod
    def of(spec: LayerSpec, queries: Packing, keys: Packing) -> "Dense":
        return Dense(may_see(spec, queries, keys))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return attend_dense(q, k, v, self.seen, sinks)


@dataclass(frozen=True)
class Causal:
    """A full layer over rows that are one document each: the causal kernel of PyTorch."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if q.device.type == "cuda" and q.dtype == torch.float32:  # its kernel for float32 knows no grouped queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@dataclass(frozen=True)
class MaskedChunk:
    """A chunk of queries over the keys of a cache, a few queries at a time: their masks never exist all at once."""

    spec: LayerSpec
    queries: Packing
    keys: Packing

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        outs, gqa = [], q.shape[1] != k.shape[1]
        for part, packing in zip(q.split(QUERIES_PER_MASK, 2), self.queries.split(QUERIES_PER_MASK)):
            seen = may_see(self.spec, packing, self.keys)
            if sinks is None:
                outs.append(F.scaled_dot_product_attention(part, k, v, seen[:, None], enable_gqa=gqa))
            else:
                outs.append(attend_dense(part, k, v, seen, sinks))
        return torch.cat(outs, 2)


def attend_one(bias_bs: Tensor, q: Tensor, k: Tensor, v: Tensor, sink_h: Tensor | None = None) -> Tensor:
    """One query a row over all slots of a cache. bias_bs: (B, 1, 1, S), 0 for a key that is seen, else -inf.

    The R heads of a kv head take the place of query positions, so that keys are not repeated.
    """
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    return _mix_one(bias_bs, grouped, k, v, sink_h).reshape(q.shape)


def kernel_is_slow(q: Tensor) -> bool:
    """Whether the kernel of PyTorch leaves processors idle for one query: on a GPU a few of them get all keys."""
    return q.is_cuda


def _mix_one(bias: Tensor, q_bgrd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, sink_h: Tensor | None) -> Tensor:
    no_kernel = kernel_is_slow(q_bgrd)
    in_loop = torch.compiler.is_compiling() and (no_kernel or k_bgsd.shape[2] <= LOOP_KEYS)
    if sink_h is None and not in_loop and not no_kernel:
        return F.scaled_dot_product_attention(q_bgrd, k_bgsd, v_bgsd, bias)
    scores = (q_bgrd[:, :, :, None] * k_bgsd[:, :, None]).sum(-1) if in_loop else q_bgrd @ k_bgsd.mT
    scores = scores.float() * q_bgrd.shape[-1] ** -0.5 + bias
    if sink_h is not None:
        sinks = sink_h.float().view(1, *q_bgrd.shape[1:3], 1).expand(len(scores), -1, -1, -1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : k_bgsd.shape[2]].to(v_bgsd.dtype)
    return (weights[..., None] * v_bgsd[:, :, None]).sum(-2) if in_loop else weights @ v_bgsd
