"""Attention under a layer's visibility: the dense oracle and the blocked form in O(n * W).

Legend: B batch, T query positions, S key positions, H heads, G kv heads, R = H / G, D head size,
        N blocks, C queries a block, K keys a block.
`positions` count from the start of the document; `documents` are ids, -1 for padding. Both are (B or 1, T).
Rows that see no key (padding) give zeros.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.errors import UserError
from model.windows import LayerSpec, visible

BACKENDS = ("reference", "blocked")


@dataclass(frozen=True)
class Places:
    """Where tokens stand: positions and, if there is more than one document or padding, document ids.

    `bias` is what `block_bias` makes of them for one kind of layer, so that layers of a kind share it.
    """

    positions: Tensor
    documents: Tensor | None = None
    bias: Tensor | None = None


def choose_backend(name: str, specs: tuple[LayerSpec, ...]) -> str:
    """The backend that runs `name`: `auto` is `blocked`, which falls on the oracle for no layer silently.

    Raises UserError when the backend is unknown or can't do what a layer asks.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"model.attention_backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    missing = [reason for spec in specs if (reason := _blocked_refusal(spec))]
    if name == "blocked" and missing:
        raise UserError(f"attention backend 'blocked' {missing[0]}; set model.attention_backend to reference")
    if name == "auto":
        return "reference" if missing else "blocked"
    return name


def _blocked_refusal(spec: LayerSpec) -> str | None:
    if spec.global_tokens:
        return "can't do global tokens"
    return None


def _in_blocks(spec: LayerSpec, backend: str, t: int) -> bool:
    """Whether T queries are enough for blocks to pay."""
    return backend == "blocked" and spec.ring_slots is not None and 2 * spec.ring_slots < t


def prepare(spec: LayerSpec, places: Places, backend: str) -> Places:
    """The places with what layers of one kind need to know of them, made once."""
    if _in_blocks(spec, backend, places.positions.shape[1]):
        return replace(places, bias=block_bias(spec, places))
    return places


def attend(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, backend: str, sink_h: Tensor | None
) -> Tensor:
    """Self-attention of a whole sequence (S = T); returns (B, H, T, D) in the dtype of the values."""
    if backend == "blocked":
        if spec.kind == "full" and places.documents is None and sink_h is None:
            gqa = q_bhtd.shape[1] != k_bgsd.shape[1]
            return F.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, is_causal=True, enable_gqa=gqa)
        if _in_blocks(spec, backend, q_bhtd.shape[2]):
            return blocked(q_bhtd, k_bgsd, v_bgsd, spec, places, sink_h)
    return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, places, places, sink_h)


def attend_after(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    spec: LayerSpec,
    q: Places,
    k: Places,
    backend: str,
    sink_h: Tensor | None,
) -> Tensor:
    """Attention of a chunk over what a cache holds: keys in order of age, of which the last T are the chunk's own."""
    t, before = q_bhtd.shape[2], k_bgsd.shape[2] - q_bhtd.shape[2]
    if _in_blocks(spec, backend, t):
        return blocked(F.pad(q_bhtd, (0, 0, before, 0)), k_bgsd, v_bgsd, spec, k, sink_h)[:, :, before:]
    return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, q, k, sink_h)


def see(spec: LayerSpec, q: Places, k: Places) -> Tensor:
    """Bool (B or 1, T, S): visibility by position, and never across documents or from padding."""
    seen = visible(spec, q.positions[:, :, None], k.positions[:, None, :])
    if q.documents is not None:
        assert k.documents is not None
        same = q.documents[:, :, None] == k.documents[:, None, :]
        seen = seen & same & (k.documents >= 0)[:, None, :]
    return seen


def attend_between(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, q: Places, k: Places, sink_h: Tensor | None
) -> Tensor:
    """Dense attention with an explicit mask: the oracle, and the form that serves a cache. Softmax in float32."""
    b, h, t, d = q_bhtd.shape
    g = k_bgsd.shape[1]
    q_grouped = q_bhtd.reshape(b, g, h // g * t, d)
    scores = (q_grouped @ k_bgsd.transpose(-1, -2)).float().reshape(b, g, h // g, t, -1) * d**-0.5
    weights = _softmax(scores, see(spec, q, k)[:, None, None], _sinks(sink_h, g, 5))
    out = weights.to(v_bgsd.dtype).reshape(b, g, h // g * t, -1) @ v_bgsd
    return out.reshape(b, h, t, d)


def _sinks(sink_h: Tensor | None, groups: int, dims: int) -> Tensor | None:
    """Sink logits (H,) as (1, G, R, 1, …) with `dims` dimensions."""
    return None if sink_h is None else sink_h.float().reshape(1, groups, -1, *[1] * (dims - 3))


def _softmax(scores: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of visible scores; a sink takes its share; rows that see nothing are zero."""
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    weights = torch.exp(scores - peak.detach()) * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak.detach())
    return weights / total.clamp_min(torch.finfo(scores.dtype).tiny)


def blocked(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None = None
) -> Tensor:
    """Blocks of C queries, each against the K = 2C keys that any of them may see: O(T * W) time and memory.

    All blocks are one batched matrix product; keys are not repeated for grouped queries. With W = 3 and C = 4,
    block 1 (queries 4 to 7) multiplies keys 0 to 7, of which the mask leaves 2 to 7.
    """
    b, h, t, d = q_bhtd.shape
    g, c = k_bgsd.shape[1], _block(spec)
    n = -(-t // c)
    bias = block_bias(spec, places) if places.bias is None else places.bias
    q = F.pad(q_bhtd.transpose(1, 2), (0, 0, 0, 0, 0, n * c - t))
    q = q.reshape(b, n, c, g, h // g, d).permute(0, 1, 3, 4, 2, 5).contiguous()
    out = _Blocks.apply(q, _pairs_of_blocks(k_bgsd, n, c), _pairs_of_blocks(v_bgsd, n, c), bias, sink_h)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(b, h, n * c, d)[:, :, :t]


def _block(spec: LayerSpec) -> int:
    """C, the queries of a block: no fewer than its window, so that a block and its predecessor hold all keys."""
    assert spec.ring_slots is not None
    return max(16, spec.ring_slots)


def _pairs_of_blocks(x_bgtd: Tensor, n: int, c: int) -> Tensor:
    """Keys or values to (B, N, G, 2C, D): each block behind its predecessor (zeros before the first)."""
    blocks = F.pad(x_bgtd.transpose(1, 2), (0, 0, 0, 0, c, n * c - x_bgtd.shape[2])).unflatten(1, (n + 1, c))
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2).transpose(2, 3).contiguous()


class _Blocks(torch.autograd.Function):
    """Softmax attention inside blocks: q (B, N, G, R, C, D), k and v (B, N, G, K, D), bias (B or 1, N, C, K).

    Derived by hand because autograd gives the gradient of the keys transposed, and undoing that costs more than all
    products together. Weights are kept for the way back in the dtype of the values.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink_h: Tensor | None) -> Tensor:
        scores = (q.flatten(3, 4) @ k.mT).float().view(*q.shape[:5], -1) * q.shape[-1] ** -0.5 + bias[:, :, None, None]
        sinks = None if sink_h is None else sink_h.float().view(1, 1, *q.shape[2:4], 1, 1)
        weights, sunk = _shares(scores, sinks)
        weights = weights.to(v.dtype).flatten(3, 4)
        ctx.save_for_backward(q, k, v, weights, *([] if sunk is None else [sunk]))
        return (weights @ v).view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, *sunk = ctx.saved_tensors
        grad = grad.flatten(3, 4)
        moved = weights * (grad @ v.mT).float()
        mean = moved.sum(-1, keepdim=True)
        grad_scores = ((moved - weights * mean) * q.shape[-1] ** -0.5).to(q.dtype)
        grad_q = (grad_scores @ k).view_as(q)
        grad_sinks = -(sunk[0] * mean.view_as(sunk[0])).sum((0, 1, 4, 5)).flatten() if sunk else None
        return grad_q, grad_scores.mT @ q.flatten(3, 4), weights.mT @ grad, None, grad_sinks


def _shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Softmax over the last dimension of scores, -inf where unseen, and what goes to the sinks."""
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    peak = peak if sinks is None else torch.maximum(peak, sinks)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if sinks is None:
        return weights / total, None
    sunk = torch.exp(sinks - peak)
    return weights / (total + sunk), sunk / (total + sunk)


def block_bias(spec: LayerSpec, places: Places) -> Tensor:
    """Float (B or 1, N, C, 2C) to add to scores in blocks: 0 where a query sees a key, else -inf.

    Padding has a position far below 0 as a key: nobody's window reaches it.
    """
    t = places.positions.shape[1]
    c = _block(spec)
    n = -(-t // c)
    pad, unseen = n * c - t, torch.iinfo(torch.int64).min // 2

    def in_blocks(x: Tensor, value: int) -> tuple[Tensor, Tensor]:
        queries = F.pad(x, (0, pad), value=value).reshape(-1, c)
        return queries, F.pad(x, (c, pad), value=value).unfold(1, 2 * c, c).reshape(-1, 2 * c)

    q_pos, k_pos = in_blocks(places.positions, unseen)
    q_docs, k_docs = (None, None) if places.documents is None else in_blocks(places.documents, -1)
    seen = see(spec, Places(q_pos, q_docs), Places(k_pos, k_docs)) & (k_pos >= 0)[:, None, :]
    return torch.where(seen, 0.0, -torch.inf).unflatten(0, (-1, n))
