"""Attention under a layer's visibility: the dense oracle, and forms in O(n * W).

`blocked` does short windows as batched matrix products, `model.tiles` long ones on a CPU without masks; dilated
layers are sliding ones over every r-th token. The oracle is left for chunks of a few tokens and for global tokens.

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
from model.tiles import causal_after, tiled
from model.windows import LayerSpec, visible

BACKENDS = ("reference", "blocked")
TILES_FROM = 128  # tokens of window; below, blocks are faster (both timed at n = 4,096 and 16,384)
MASKED_QUERIES = 256  # of a chunk behind a cache at a time, where a mask is needed: it grows with what the cache holds


@dataclass(frozen=True)
class Places:
    """Where tokens stand: positions and, if there is more than one document or padding, document ids.

    `bias` is what `block_bias` makes of them for one kind of layer, so that layers of a kind share it.
    """

    positions: Tensor
    documents: Tensor | None = None
    bias: Tensor | None = None


def choose_backend(name: str) -> str:
    """The backend that runs `name`: `auto` is `blocked`. Raises UserError when it is unknown."""
    if name not in ("auto", *BACKENDS):
        raise UserError(f"model.attention_backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    return "blocked" if name == "auto" else name


def prepare(spec: LayerSpec, places: Places, backend: str) -> Places:
    """The places with what layers of one kind need to know of them, made once."""
    t = places.positions.shape[1]
    if places.documents is not None and _one_document_at_a_time(spec, backend, t, places.positions.device):
        alone = bool((places.documents == places.documents[:1, :1]).all()) and bool(places.documents[0, 0] >= 0)
        if not alone:
            return places
        places = replace(places, documents=None)
    if _in_blocks(spec, backend, t) and not _in_tiles(spec, backend, t, places.positions.device):
        return replace(places, bias=block_bias(spec, places))
    return places


def _one_document_at_a_time(spec: LayerSpec, backend: str, t: int, device: torch.device) -> bool:
    """Whether the form that does this layer knows no documents: tiles have no mask, global tokens stand first."""
    with_globals = spec.global_tokens > 0 and _in_blocks(spec, backend, t)
    return with_globals or _in_tiles(spec, backend, t, device)


def _in_blocks(spec: LayerSpec, backend: str, t: int) -> bool:
    """Whether T queries are enough for blocks to pay. Dilated layers without global tokens are folded first."""
    return backend == "blocked" and spec.ring_slots is not None and 2 * spec.ring_slots < t and not _folds(spec)


def _folds(spec: LayerSpec) -> bool:
    return spec.kind == "dilated" and spec.dilation > 1 and not spec.global_tokens


def _in_tiles(spec: LayerSpec, backend: str, t: int, device: torch.device) -> bool:
    """Whether the window and T are long enough for tiles to pay, and the flash kernel is there."""
    long = spec.kind == "full" or (spec.kind == "sliding" and (spec.window or 0) >= TILES_FROM)
    return backend == "blocked" and device.type == "cpu" and long and t >= TILES_FROM and not spec.global_tokens


def attend(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, backend: str, sink_h: Tensor | None
) -> Tensor:
    """Self-attention of a whole sequence (S = T); returns (B, H, T, D) in the dtype of the values."""
    t, device = q_bhtd.shape[2], q_bhtd.device
    if backend == "blocked" and _folds(spec):
        return _attend_dilated(q_bhtd, k_bgsd, v_bgsd, spec, places, sink_h)
    if places.documents is not None and _one_document_at_a_time(spec, backend, t, device):
        return _attend_by_document(q_bhtd, k_bgsd, v_bgsd, spec, places, sink_h)
    if _in_tiles(spec, backend, t, device):
        return tiled(q_bhtd, k_bgsd, v_bgsd, spec.window or t, sink_h)
    if backend == "blocked" and spec.kind == "full" and places.documents is None and sink_h is None:
        gqa = q_bhtd.shape[1] != k_bgsd.shape[1]
        return F.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, is_causal=True, enable_gqa=gqa)
    if _in_blocks(spec, backend, t):
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
    if backend == "reference":
        return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, q, k, sink_h)
    if _pads_in_front(spec, backend, t):
        whole = F.pad(q_bhtd, (0, 0, before, 0))
        if spec.kind == "chunked":  # its blocks begin where positions say, which the first key held need not be
            return blocked(whole, k_bgsd, v_bgsd, spec, k, sink_h)[:, :, before:]
        return attend(whole, k_bgsd, v_bgsd, spec, k, backend, sink_h)[:, :, before:]
    if spec.kind == "full" and k.documents is None and sink_h is None and q_bhtd.device.type == "cpu":
        return causal_after(q_bhtd, k_bgsd, v_bgsd)
    parts = zip(q_bhtd.split(MASKED_QUERIES, 2), split(q, MASKED_QUERIES))
    return torch.cat([_attend_masked(part, k_bgsd, v_bgsd, spec, at, k, sink_h) for part, at in parts], 2)


def prepare_after(spec: LayerSpec, q: Places, k: Places, backend: str) -> Places:
    """`prepare` for the keys of a chunk that `attend_after` serves."""
    return prepare(spec, k, backend) if _pads_in_front(spec, backend, q.positions.shape[1]) else k


def _pads_in_front(spec: LayerSpec, backend: str, t: int) -> bool:
    """Whether a chunk behind a cache is served as the end of a whole sequence, its queries padded in front."""
    return backend == "blocked" and 2 * (spec.ring_slots or t) < t and not spec.global_tokens


def split(places: Places, size: int) -> list[Places]:
    """Places of `size` tokens at a time."""
    positions = places.positions.split(size, 1)
    documents = [None] * len(positions) if places.documents is None else places.documents.split(size, 1)
    return [Places(*part) for part in zip(positions, documents)]


def _attend_masked(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, q: Places, k: Places, sink_h: Tensor | None
) -> Tensor:
    """What `attend_between` computes, without its float32 scores where the kernel of PyTorch can do it."""
    if sink_h is not None:
        return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, q, k, sink_h)
    gqa = q_bhtd.shape[1] != k_bgsd.shape[1]
    return F.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, see(spec, q, k)[:, None], enable_gqa=gqa)


def _attend_dilated(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None
) -> Tensor:
    """Every r-th token is a sequence of its own, under a sliding window: r times less work than a window of r * W."""
    b, t, r = q_bhtd.shape[0], q_bhtd.shape[2], spec.dilation
    pad = -t % r

    def fold(x: Tensor, value: int = 0) -> Tensor:
        """(B, …, T[, D]) to (B * r, …, T / r[, D])."""
        dim = x.ndim - 2 if x.ndim == 4 else 1
        x = F.pad(x, (0, 0, 0, pad) if x.ndim == 4 else (0, pad), value=value)
        return x.unflatten(dim, (-1, r)).movedim(dim + 1, 1).flatten(0, 1)

    folded = Places(torch.arange((t + pad) // r, device=q_bhtd.device)[None])
    if places.documents is not None:
        positions, documents = (x.expand(b, -1) for x in (places.positions, places.documents))
        folded = Places(fold(positions) // r, fold(documents, -1))
    sliding = replace(spec, kind="sliding", dilation=1)
    out = attend(fold(q_bhtd), fold(k_bgsd), fold(v_bgsd), sliding, folded, "blocked", sink_h)
    return out.unflatten(0, (b, r)).movedim(1, 3).flatten(2, 3)[:, :, :t]


@torch.compiler.disable
def _attend_by_document(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None
) -> Tensor:
    """Each document is a sequence of its own; those of equal place in several rows run together."""
    assert places.documents is not None
    stretches = _stretches(places.documents.expand(len(q_bhtd), -1))
    if not stretches:
        return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, places, places, sink_h)
    out = torch.zeros_like(q_bhtd)
    for (first, end), rows in stretches.items():
        q, k, v = (x[rows, :, first:end] for x in (q_bhtd, k_bgsd, v_bgsd))
        alone = Places(torch.arange(end - first, device=q_bhtd.device)[None])
        out[rows, :, first:end] = attend(q, k, v, spec, alone, "blocked", sink_h)
    return out


def _stretches(documents_bt: Tensor) -> dict[tuple[int, int], list[int]]:
    """Where documents lie: (first, end) to the rows that have one there. Padding belongs to none.

    >>> _stretches(torch.tensor([[0, 0, 1, 1], [-1, -1, 5, 5]]))
    {(0, 2): [0], (2, 4): [0, 1]}
    """
    found: dict[tuple[int, int], list[int]] = {}
    for row, ids in enumerate(documents_bt.tolist()):
        starts = [i for i, x in enumerate(ids) if i == 0 or x != ids[i - 1]]
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if ids[first] >= 0:
                found.setdefault((first, end), []).append(row)
    return found


def restarts(position_ids: Tensor) -> Tensor | None:
    """Ids of the documents that positions (B or 1, T) tell apart by not going on by one; None if they all go on."""
    jumps = position_ids.diff(dim=1) != 1
    return F.pad(jumps.cumsum(1), (1, 0)) if bool(jumps.any()) else None


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

    Global tokens, the first of the row (which is then one document), stand before the keys of every block.

    All blocks are one batched matrix product; keys are not repeated for grouped queries. With W = 3 and C = 4,
    block 1 (queries 4 to 7) multiplies keys 0 to 7, of which the mask leaves 2 to 7.
    """
    b, h, t, d = q_bhtd.shape
    g, c = k_bgsd.shape[1], _block(spec)
    n = -(-t // c)
    bias = block_bias(spec, places) if places.bias is None else places.bias
    first = min(spec.global_tokens, t)
    q = F.pad(q_bhtd.transpose(1, 2), (0, 0, 0, 0, 0, n * c - t))
    q = q.reshape(b, n, c, g, h // g, d).permute(0, 1, 3, 4, 2, 5).contiguous()
    k, v = (_pairs_of_blocks(x, n, c) for x in (k_bgsd, v_bgsd))
    if first:
        k, v = (_behind_globals(x[:, :, :first], pairs) for x, pairs in ((k_bgsd, k), (v_bgsd, v)))
    out = _Blocks.apply(q, k, v, bias, sink_h)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(b, h, n * c, d)[:, :, :t]


def _block(spec: LayerSpec) -> int:
    """C, the queries of a block: no fewer than its window, so that a block and its predecessor hold all keys."""
    assert spec.ring_slots is not None
    return max(16, spec.ring_slots)


def _pairs_of_blocks(x_bgtd: Tensor, n: int, c: int) -> Tensor:
    """Keys or values to (B, N, G, 2C, D): each block behind its predecessor (zeros before the first)."""
    blocks = F.pad(x_bgtd.transpose(1, 2), (0, 0, 0, 0, c, n * c - x_bgtd.shape[2])).unflatten(1, (n + 1, c))
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2).transpose(2, 3).contiguous()


def _behind_globals(first_bgfd: Tensor, pairs: Tensor) -> Tensor:
    """Keys or values (B, N, G, F + 2C, D): the first tokens, then those of each pair of blocks."""
    return torch.cat((first_bgfd[:, None].expand(-1, pairs.shape[1], -1, -1, -1), pairs), dim=3)


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
    """Float (B or 1, N, C, K) to add to scores in blocks: 0 where a query sees a key, else -inf.

    K = 2C, behind the global tokens if there are any. Padding has a position far below 0 as a key: nobody's window
    reaches it.
    """
    t, c = places.positions.shape[1], _block(spec)
    n = -(-t // c)
    pad, unseen = n * c - t, torch.iinfo(torch.int64).min // 2

    def in_blocks(x: Tensor, value: int) -> tuple[Tensor, Tensor]:
        queries = F.pad(x, (0, pad), value=value).reshape(-1, c)
        return queries, F.pad(x, (c, pad), value=value).unfold(1, 2 * c, c).reshape(-1, 2 * c)

    window = replace(spec, global_tokens=0)
    q_pos, k_pos = in_blocks(places.positions, unseen)
    q_docs, k_docs = (None, None) if places.documents is None else in_blocks(places.documents, -1)
    seen = see(window, Places(q_pos, q_docs), Places(k_pos, k_docs)) & (k_pos >= 0)[:, None, :]
    if spec.global_tokens:
        first = places.positions[:, : spec.global_tokens].repeat_interleave(n, 0)[:, None]
        ahead = visible(spec, q_pos[..., None], first) & ~visible(window, q_pos[..., None], first)
        seen = torch.cat((ahead, seen), -1)
    return torch.where(seen, 0.0, -torch.inf).unflatten(0, (-1, n))
