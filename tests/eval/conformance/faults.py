"""Faults planted in `PlainDecoder`: each replaces one method, and names the modes in which it must be found."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.conformance.modes import MODES
from model.windows import LayerSpec
from tests.eval.conformance.plain import Cache, Call, PlainDecoder, Tokens, window_mask

W = 5
SLIDING, FULL = LayerSpec("sliding", W), LayerSpec("full")
EVERY = frozenset(MODES)
EVALUATION, TRAINING = EVERY - {"train"}, frozenset({"train", "packed"})
THROUGH_CACHE = frozenset({"left-padded", "cached", "chunked", "generate"})
PADDED, PACKED = frozenset({"left-padded"}), frozenset({"packed"})


class Planted(NamedTuple):
    """A fault: `method` of the decoder is replaced by `replacement`.

    name: what the check must call it, or several names, of which one is right in each mode.
    """

    what: str
    name: str
    modes: frozenset[str]
    method: str
    replacement: Callable[..., Any]
    specs: Sequence[LayerSpec] = (SLIDING, SLIDING)

    def decoder(self) -> PlainDecoder:
        return PlainDecoder(self.specs, **{self.method: self.replacement})


def other_window(spec: LayerSpec, when: Callable[[LayerSpec, Call], bool] = lambda *_: True) -> Any:
    """A mask of another layer, where `when` holds."""

    def mask(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
        replaced = asked == self.config.specs[-1] and when(asked, call)
        return window_mask(spec if replaced else asked, q.positions[:, :, None], k.positions[:, None])

    return mask


def of_every_layer(change: Callable[[LayerSpec, PlainDecoder], LayerSpec]) -> Any:
    def mask(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
        return window_mask(change(asked, self), q.positions[:, :, None], k.positions[:, None])

    return mask


def by_columns(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
    return window_mask(asked, q.columns[:, :, None], k.columns[:, None])


def in_blocks(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
    q_pos, k_pos = q.positions[:, :, None], k.positions[:, None]
    return (k_pos <= q_pos) & (k_pos // 4 > q_pos // 4 - 2)


def sees_next(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
    return window_mask(asked, q.positions[:, :, None] + 1, k.positions[:, None])


def upper_left(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
    """The first query of a chunk is aligned with the first key in the cache, not with its own."""
    held = k.positions.shape[1] - call.tokens if call.tokens > 1 else 0
    return window_mask(asked, q.positions[:, :, None] - held, k.positions[:, None])


def ends_at_keys(self: PlainDecoder, asked: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
    """No causal mask within a chunk that follows a cache."""
    seen = window_mask(asked, q.positions[:, :, None], k.positions[:, None])
    return seen | (k.positions[:, None] > q.positions[:, :, None]) if call.past else seen


def all_one_document(self: PlainDecoder, call: Call, q: Tokens, k: Tokens) -> Tensor:
    return PlainDecoder.same_document(self, call, q, k) | call.packed


def first_token_of_next(self: PlainDecoder, call: Call, q: Tokens, k: Tokens) -> Tensor:
    same = PlainDecoder.same_document(self, call, q, k)
    starts = (q.positions == 0)[:, :, None] & (k.columns[:, None] == q.columns[:, :, None] - 1)
    return same | (starts & call.packed)


def padding_seen(self: PlainDecoder, call: Call, q: Tokens, k: Tokens) -> Tensor:
    return PlainDecoder.same_document(self, call, q, k) | call.padded


def padding_seen_in_cache(self: PlainDecoder, call: Call, q: Tokens, k: Tokens) -> Tensor:
    return PlainDecoder.same_document(self, call, q, k) | (call.padded and call.past > 0)


def first_row_for_all(self: PlainDecoder, call: Call, q: Tokens, k: Tokens) -> Tensor:
    return PlainDecoder.same_document(self, call, q, k) & (k.documents[:1] >= 0)[:, None]


def shifted(when: Callable[[Call], bool], by: Callable[[Call], int]) -> Any:
    def rope_positions(self: PlainDecoder, call: Call, tokens: Tokens) -> Tensor:
        return tokens.positions + (by(call) if when(call) else 0)

    return rope_positions


def padding_counted_when_decoding(self: PlainDecoder, call: Call, tokens: Tokens) -> Tensor:
    return tokens.columns if call.padded and call.past else tokens.positions


def stale_positions(self: PlainDecoder, call: Call, tokens: Tokens) -> Tensor:
    """Positions that stop at the window, as if the ring's slot were the position."""
    return tokens.positions.clamp(max=W) if call.past else tokens.positions


def keeps(count: int, when: Callable[[Call], bool] = lambda _: True) -> Any:
    def kept(self: PlainDecoder, spec: LayerSpec, call: Call, tokens: Tokens) -> Tensor:
        right = PlainDecoder.kept(self, spec, call, tokens)
        return right[-count:] if when(call) else right

    return kept


def evicts_newest(self: PlainDecoder, spec: LayerSpec, call: Call, tokens: Tokens) -> Tensor:
    columns = tokens.columns[0]
    return torch.arange(len(columns)) if len(columns) <= W else torch.cat((torch.arange(W - 2), torch.tensor([-1])))


def forgets_global(self: PlainDecoder, spec: LayerSpec, call: Call, tokens: Tokens) -> Tensor:
    columns = tokens.columns[0]
    return (columns > columns[-1] + 1 - W).nonzero().flatten()


def no_sinks(when: Callable[[Call], bool] = lambda _: True) -> Any:
    return lambda self, call, sinks: None if when(call) else sinks


def unmasked_decoding(self: PlainDecoder, spec: LayerSpec, call: Call, cache: Cache, layer: int, new: Any) -> Any:
    """The keys that a decoded token sees are told to be as near as its own."""
    k, v, tokens = PlainDecoder.extend(self, FULL, call, cache, layer, new)
    kept = slice(-W, None)
    cache.keys[layer] = (k[:, :, kept], v[:, :, kept], tokens.only(kept))
    if call.past and call.tokens == 1:
        return k, v, Tokens(new[2].positions.expand_as(tokens.positions), tokens.documents, tokens.columns)
    return k, v, tokens


def rotated_again(self: PlainDecoder, spec: LayerSpec, call: Call, cache: Cache, layer: int, new: Any) -> Any:
    """Old keys are turned by one position more at each call."""
    k, v, tokens = PlainDecoder.extend(self, spec, call, cache, layer, new)
    kept_k, kept_v, kept_tokens = cache.keys[layer]  # type: ignore[misc]
    cache.keys[layer] = (kept_k.roll(1, -1), kept_v, kept_tokens)
    return k, v, tokens


def values_of_other_heads(self: PlainDecoder, spec: LayerSpec, call: Call, cache: Cache, layer: int, new: Any) -> Any:
    k, v, tokens = PlainDecoder.extend(self, spec, call, cache, layer, new)
    return k, v.flip(1) if call.past else v, tokens


def restarts(self: PlainDecoder, ids: Tensor, fed: Tensor) -> Tensor:
    """`generate` counts every step from 1 instead of from the prompt's end."""
    steps = ids.shape[1] - fed.shape[1]
    return (torch.arange(fed.shape[1]) + steps // 2).expand_as(fed)


def token_shift(self: PlainDecoder, input_ids: Tensor) -> Tensor:
    """Each token is mixed with its predecessor before the first layer."""
    embedded = self.embedding(input_ids)
    return embedded + 0.5 * torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]


def larger_scale(self: PlainDecoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    return PlainDecoder.attend(self, q * (1.1 if self.training else 1.0), k, v, mask, sinks)


GLOBAL = (LayerSpec("sliding", W, global_tokens=2),) * 2
SINKS = (LayerSpec("sliding", W, sink=True),) * 2
CHUNKED = (LayerSpec("chunked", W), LayerSpec("chunked", W))
HYBRID = (SLIDING, FULL)
TOO_FAR = "window ignored, window too large"  # which of them depends on what the cache has kept

PLANTED = [
    Planted("W + 1", "W + 1 keys", EVERY, "mask", other_window(LayerSpec("sliding", W + 1))),
    Planted("W - 1", "W − 1 keys", EVERY, "mask", other_window(LayerSpec("sliding", W - 1))),
    Planted("a window half as large", "window too small", EVERY, "mask", other_window(LayerSpec("sliding", W // 2))),
    Planted("a window half as large again", TOO_FAR, EVERY, "mask", other_window(LayerSpec("sliding", W + 4))),
    Planted("a window rounded up to blocks of 4", TOO_FAR, EVERY, "mask", in_blocks),
    Planted("ignored", TOO_FAR, EVERY, "mask", other_window(FULL)),
    Planted("ignored in eval", TOO_FAR, EVALUATION, "mask", other_window(FULL, lambda s, c: not c.training)),
    Planted("ignored in training", TOO_FAR, TRAINING, "mask", other_window(FULL, lambda s, c: c.training)),
    Planted("ignored when packed", TOO_FAR, PACKED, "mask", other_window(FULL, lambda s, c: c.packed)),
    Planted("ignored when left-padded", TOO_FAR, PADDED, "mask", other_window(FULL, lambda s, c: c.padded)),
    Planted("ignored in a prefill longer than W", TOO_FAR, THROUGH_CACHE, "mask",
            other_window(FULL, lambda s, c: c.cached and not c.past and c.tokens > W)),
    Planted("one key too many in the cache, and no mask when one token is decoded", "W + 1 keys",
            THROUGH_CACHE - {"chunked"}, "extend", unmasked_decoding),
    Planted("W - 1 in a chunk after a cache", "W − 1 keys", frozenset({"chunked"}), "mask",
            other_window(LayerSpec("sliding", W - 1), lambda s, c: c.past > 0 and c.tokens > 1)),
    Planted("keys masked with a cache of exactly W", "window too small", THROUGH_CACHE - PADDED, "mask",
            other_window(LayerSpec("sliding", 1), lambda s, c: c.past == W)),
    Planted("global tokens dropped", "global tokens dropped", EVERY, "mask", other_window(SLIDING), GLOBAL),
    Planted("global tokens evicted", "global tokens dropped", THROUGH_CACHE, "kept", forgets_global, GLOBAL),
    Planted("sinks dropped", "sinks dropped", EVERY, "sinks", no_sinks(), SINKS),
    Planted("sinks dropped in training", "sinks dropped", TRAINING, "sinks", no_sinks(lambda c: c.training), SINKS),
    Planted("sinks dropped with a cache", "sinks dropped", THROUGH_CACHE, "sinks",
            no_sinks(lambda c: c.past > 0), SINKS),
    Planted("a full layer for a sliding one", TOO_FAR, EVERY, "mask",
            of_every_layer(lambda asked, model: FULL), HYBRID),
    Planted("a sliding layer for a full one", "window not asked for", EVERY, "mask",
            of_every_layer(lambda asked, model: SLIDING), HYBRID),
    Planted("all layers have the last one's window", "window too small", EVERY, "mask",
            of_every_layer(lambda asked, model: model.config.specs[-1]), (SLIDING, LayerSpec("sliding", 3))),
    Planted("a sliding layer for a chunked one", "wrong chunks", EVERY, "mask", other_window(SLIDING), CHUNKED),
    Planted("chunks counted from the start of the row", "wrong chunks", PACKED | PADDED, "mask", by_columns, CHUNKED),
    Planted("dilation ignored", "dilation ignored", EVERY, "mask",
            other_window(LayerSpec("sliding", 8)), (LayerSpec("dilated", 4, dilation=2),) * 2),
    Planted("documents see each other", "documents leak", PACKED, "same_document", all_one_document),
    Planted("a document sees the token before it", "documents leak", PACKED, "same_document", first_token_of_next),
    Planted("padding seen", "padding seen", PADDED, "same_document", padding_seen),
    Planted("padding seen with a cache", "padding seen", PADDED, "same_document", padding_seen_in_cache),
    Planted("the first row's padding for all rows", "keys lost", PADDED, "same_document", first_row_for_all),
    Planted("the next token is seen", "not causal", EVERY, "mask", sees_next),
    Planted("a chunk's mask in the wrong corner", "mask misaligned", frozenset({"chunked"}), "mask", upper_left),
    Planted("no causal mask within a chunk", "not causal", frozenset({"chunked"}), "mask", ends_at_keys),
    Planted("the cache keeps one key too few", "W − 1 keys", THROUGH_CACHE, "kept", keeps(W - 2)),
    Planted("the cache drops the newest key", "keys lost", THROUGH_CACHE, "kept", evicts_newest),
    Planted("cache position off by one", "values differ", THROUGH_CACHE, "rope_positions",
            shifted(lambda c: c.past > 0, lambda c: 1)),
    Planted("RoPE of a chunk starts at 0", "values differ", frozenset({"chunked"}), "rope_positions",
            shifted(lambda c: c.past > 0 and c.tokens > 1, lambda c: -c.past)),
    Planted("positions stop at the window", "values differ", THROUGH_CACHE, "rope_positions", stale_positions),
    Planted("padding counted when decoding", "values differ", PADDED, "rope_positions", padding_counted_when_decoding),
    Planted("cached keys rotated again", "values differ", THROUGH_CACHE, "extend", rotated_again),
    Planted("values of other heads from the cache", "values differ", THROUGH_CACHE, "extend", values_of_other_heads),
    Planted("generate counts positions wrong", "keys lost", frozenset({"generate"}), "next_positions", restarts),
    Planted("another scale in training", "values differ", TRAINING, "attend", larger_scale),
    Planted("tokens mixed before the first layer", "stack sees too far", EVERY, "embed", token_shift),
]  # fmt: skip
