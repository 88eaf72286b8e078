"""Attention under a layer's visibility: one function, several forms (`model.attention.backends`), one oracle.

`reference` is the dense oracle. `blocked` does short windows as batched matrix products (`model.attention.blocks`) and long ones
on a CPU without masks (`model.attention.tiles`); dilated layers are sliding ones over every r-th token. `flex`, `flash` and
`xformers` are kernels of other libraries (`model.attention.flex`, `model.attention.varlen`).

Legend: B batch, T query positions, S key positions, H heads, G kv heads, R = H / G, D head size.
Rows that see no key (padding) give zeros.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.backends import serving
from model.attention.blocks import block_bias, blocked
from model.attention.tiles import causal_after, tiled
from model.attention.varlen import by_pieces, flash, pieces_of, xformers
from model.errors import UserError
from model.places import Places, see, split, stretches
from model.windows import LayerSpec

TILES_FROM = 128  # tokens of window from which tiles may pay; below, blocks are faster
_KERNELS = {"flash": flash, "xformers": xformers}
MASKED_QUERIES = 256  # of a chunk behind a cache at a time, where a mask is needed: it grows with what the cache holds


def tiles_from(dtype: torch.dtype, head_size: int) -> int:
    """Tokens of window from which tiles beat blocks on a CPU, in the precision of the queries.

    Timed at n = 2,048 to 16,384 with head sizes 32, 64 and 128. Tiles take more and smaller products, and the flash
    kernel gains less from bf16 units than plain products do, above all backward.
    """
    if not torch.is_grad_enabled():
        return TILES_FROM
    if dtype != torch.float32:
        return 8 * TILES_FROM
    return TILES_FROM if head_size >= 128 else 2 * TILES_FROM


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The precision in which products with `x` are taken, under autocast or not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def prepare(spec: LayerSpec, places: Places, backend: str, rows: int = 1, tiles: int | None = None) -> Places:
    """The places with what layers of one kind need to know of them, made once, so that each need not make it.

    `rows` is the batch size, `tiles` what `tiles_from` says of the queries; default: no gradients are asked for.
    """
    t, device = places.positions.shape[1], places.positions.device
    backend = serving(backend, device)
    if backend == "flex":
        from model.attention.flex import flex_mask  # here, because it takes a second and a half to import

        return replace(places, made=flex_mask(spec, places))
    if backend in _KERNELS:
        return places if _folds(spec) else replace(places, made=pieces_of(spec, places, rows))
    if spec.global_tokens or spec.kind == "chunked":
        _check_beginning(places)
    in_tiles = _in_tiles(spec, backend, t, device, tiles or TILES_FROM)
    if places.documents is not None and _one_document_at_a_time(spec, backend, t, in_tiles):
        alone = bool((places.documents == places.documents[:1, :1]).all()) and bool(places.documents[0, 0] >= 0)
        if not alone:
            return places
        places = replace(places, documents=None)
    if _in_blocks(spec, backend, t) and not in_tiles:
        return replace(places, made=block_bias(spec, places))
    return places


def _check_beginning(places: Places) -> None:
    """Forms that go by index and not by position need rows that begin at 0."""
    if places.documents is None and bool((places.positions[:, 0] != 0).any()):
        raise UserError("position_ids begin behind 0; chunked layers and global tokens need them from 0 on, or a cache")


def _one_document_at_a_time(spec: LayerSpec, backend: str, t: int, in_tiles: bool) -> bool:
    """Whether the form that does this layer knows no documents: tiles have no mask, global tokens stand first."""
    with_globals = spec.global_tokens > 0 and _in_blocks(spec, backend, t)
    return with_globals or in_tiles


def _in_blocks(spec: LayerSpec, backend: str, t: int) -> bool:
    """Whether T queries are enough for blocks to pay. Dilated layers without global tokens are folded first."""
    folds = _folds(spec) and not spec.global_tokens
    return backend == "blocked" and spec.ring_slots is not None and 2 * spec.ring_slots < t and not folds


def _folds(spec: LayerSpec) -> bool:
    return spec.kind == "dilated" and spec.dilation > 1


def _in_tiles(spec: LayerSpec, backend: str, t: int, device: torch.device, tiles: int) -> bool:
    """Whether the window and T are long enough for tiles to pay, and the flash kernel is there."""
    window = spec.window or 0
    if backend != "blocked" or device.type != "cpu" or t < TILES_FROM:
        return False
    if spec.kind == "chunked":
        return window >= TILES_FROM and spec.global_tokens <= window
    least = tiles if _in_blocks(spec, backend, t) else TILES_FROM
    return spec.kind == "full" or (spec.kind == "sliding" and window >= least)


def attend(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, backend: str, sink_h: Tensor | None
) -> Tensor:
    """Self-attention of a whole sequence (S = T); returns (B, H, T, D) in the dtype of the values."""
    t, device = q_bhtd.shape[2], q_bhtd.device
    backend = serving(backend, device)
    if backend == "flex":
        from model.attention.flex import flex

        return flex(q_bhtd, k_bgsd, v_bgsd, spec, places, sink_h)
    if _folds(spec) and not spec.global_tokens and backend != "reference":
        return _attend_dilated(q_bhtd, k_bgsd, v_bgsd, spec, places, backend, sink_h)
    if backend in _KERNELS:
        return by_pieces(q_bhtd, k_bgsd, v_bgsd, spec, places, _KERNELS[backend])
    in_tiles = _in_tiles(spec, backend, t, device, tiles_from(q_bhtd.dtype, q_bhtd.shape[-1]))
    if places.documents is not None and _one_document_at_a_time(spec, backend, t, in_tiles):
        return _attend_by_document(q_bhtd, k_bgsd, v_bgsd, spec, places, sink_h)
    if in_tiles:
        first = 0 if spec.kind == "full" else spec.global_tokens
        return tiled(q_bhtd, k_bgsd, v_bgsd, spec.window or t, sink_h, spec.kind != "chunked", first)
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
        return attend(whole, k_bgsd, v_bgsd, spec, k, "blocked", sink_h)[:, :, before:]
    if spec.kind == "full" and k.documents is None and sink_h is None and q_bhtd.device.type == "cpu":
        return causal_after(q_bhtd, k_bgsd, v_bgsd)
    parts = zip(q_bhtd.split(MASKED_QUERIES, 2), split(q, MASKED_QUERIES))
    return torch.cat([_attend_masked(part, k_bgsd, v_bgsd, spec, at, k, sink_h) for part, at in parts], 2)


def prepare_after(spec: LayerSpec, q: Places, k: Places, backend: str) -> Places:
    """`prepare` for the keys of a chunk that `attend_after` serves."""
    if not _pads_in_front(spec, backend, q.positions.shape[1]):
        return k
    return replace(k, made=block_bias(spec, k)) if spec.kind == "chunked" else prepare(spec, k, "blocked")


def _pads_in_front(spec: LayerSpec, backend: str, t: int) -> bool:
    """Whether a chunk behind a cache is served as the end of a whole sequence, its queries padded in front."""
    return backend != "reference" and 2 * (spec.ring_slots or t) < t and not spec.global_tokens


def _attend_masked(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, q: Places, k: Places, sink_h: Tensor | None
) -> Tensor:
    """What `attend_between` computes, without its float32 scores where the kernel of PyTorch can do it."""
    if sink_h is not None:
        return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, q, k, sink_h)
    gqa = q_bhtd.shape[1] != k_bgsd.shape[1]
    return F.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, see(spec, q, k)[:, None], enable_gqa=gqa)


def _attend_dilated(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, backend: str, sink_h: Tensor | None
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
    out = attend(fold(q_bhtd), fold(k_bgsd), fold(v_bgsd), sliding, folded, backend, sink_h)
    return out.unflatten(0, (b, r)).movedim(1, 3).flatten(2, 3)[:, :, :t]


@torch.compiler.disable
def _attend_by_document(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, spec: LayerSpec, places: Places, sink_h: Tensor | None
) -> Tensor:
    """Each document is a sequence of its own; those of equal place in several rows run together."""
    assert places.documents is not None
    found = stretches(places.documents.expand(len(q_bhtd), -1))
    if not found:
        return attend_between(q_bhtd, k_bgsd, v_bgsd, spec, places, places, sink_h)
    out = torch.zeros_like(q_bhtd)
    for (first, end), rows in found.items():
        q, k, v = (x[rows, :, first:end] for x in (q_bhtd, k_bgsd, v_bgsd))
        alone = Places(torch.arange(end - first, device=q_bhtd.device)[None])
        out[rows, :, first:end] = attend(q, k, v, spec, alone, "blocked", sink_h)
    return out


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
