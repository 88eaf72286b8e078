"""Attention under a layer's visibility: the dense oracle and the blocked form in O(n * W).

Legend: B batch, T query positions, S key positions, H heads, G kv heads, R = H / G, D head size,
        N blocks, C queries a block, K keys a block.
`positions` count from the start of the document; `documents` are ids, -1 for padding. Both are (B or 1, T).
Rows that see no key (padding) give zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from model.windows import LayerSpec, visible

BACKENDS = ("reference", "blocked")


@dataclass(frozen=True)
class Places:
    """Where tokens stand: positions and, if there is more than one document or padding, document ids."""

    positions: Tensor
    documents: Tensor | None = None


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


def attend(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, backend: str, sink_h: Tensor | None
) -> Tensor:
    """Self-attention of a whole sequence (S = T); returns (B, H, T, D) in the dtype of the values."""
    if backend == "blocked":
        if spec.kind == "full" and places.documents is None and sink_h is None:
            gqa = q_bhtd.shape[1] != k_bgsd.shape[1]
            return F.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, is_causal=True, enable_gqa=gqa)
        if spec.ring_slots is not None and 2 * spec.ring_slots < q_bhtd.shape[2]:
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
    if backend == "blocked" and spec.ring_slots is not None and 2 * spec.ring_slots < t:
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
    """Blocks of C queries, each against the K = C + span keys that any of them may see: O(T * W) time and memory.

    All blocks are one batched matrix product; keys are not repeated for grouped queries. With W = 3 and C = 4,
    block 1 (queries 4 to 7) multiplies keys 0 to 7, of which the mask leaves 2 to 7.
    """
    b, h, t, d = q_bhtd.shape
    g = k_bgsd.shape[1]
    assert spec.ring_slots is not None
    c = max(16, spec.ring_slots)
    n = -(-t // c)
    pad = n * c - t
    q = F.pad(q_bhtd, (0, 0, 0, pad)).reshape(b, g, h // g, n, c, d).transpose(2, 3).reshape(b, g, n, h // g * c, d)
    k, v = (_pairs_of_blocks(F.pad(x, (0, 0, 0, pad)), n, c) for x in (k_bgsd, v_bgsd))
    scores = (q @ k.transpose(-1, -2)).float().reshape(b, g, n, h // g, c, 2 * c) * d**-0.5
    seen = _see_in_blocks(spec, places, n, c, pad)[:, None, :, None]
    sinks = None if sink_h is None else sink_h.float().reshape(1, g, 1, h // g, 1, 1)
    weights = _softmax(scores, seen, sinks).to(v.dtype).reshape(b, g, n, h // g * c, 2 * c)
    out = (weights @ v).reshape(b, g, n, h // g, c, d).transpose(2, 3).reshape(b, h, n * c, d)
    return out[:, :, :t]


def _pairs_of_blocks(x: Tensor, n: int, c: int) -> Tensor:
    """(B, G, N*C, D) to (B, G, N, 2C, D): each block behind its predecessor (zeros before the first)."""
    blocks = x.unflatten(2, (n, c))
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :, :n]
    return torch.cat((before, blocks), dim=3)


def _see_in_blocks(spec: LayerSpec, places: Places, n: int, c: int, pad: int) -> Tensor:
    """Bool (B or 1, N, C, 2C). Padding has position -1 as a key, far below 0: nobody's window reaches it."""
    rows = places.positions.shape[0]
    unseen = torch.iinfo(torch.int64).min // 2
    q_pos = F.pad(places.positions, (0, pad), value=0).reshape(rows * n, c)
    k_pos = F.pad(places.positions, (c, pad), value=unseen).unfold(1, 2 * c, c).reshape(rows * n, 2 * c)
    q_docs = k_docs = None
    if places.documents is not None:
        docs_rows = places.documents.shape[0]
        q_docs = F.pad(places.documents, (0, pad), value=-1).reshape(docs_rows * n, c)
        k_docs = F.pad(places.documents, (c, pad), value=-1).unfold(1, 2 * c, c).reshape(docs_rows * n, 2 * c)
    seen = see(spec, Places(q_pos, q_docs), Places(k_pos, k_docs)) & (k_pos >= 0)[:, None, :]
    return seen.unflatten(0, (rows, n))
