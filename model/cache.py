"""Rolling-buffer key/value cache: a ring of W slots per layer, one write per token, the position of each slot known.

Five tokens a b c d e arrive one by one with W = 3. Token i goes to slot i mod 3:

    a        a b      a b c    d b c    d e c
    0        0 1      0 1 2    3 1 2    3 4 2     <- index of the token in each slot

A chunk of tokens attends over [cache | chunk] before it is written: its first queries need keys that its last tokens
overwrite. A single token is written first: the key it overwrites is W tokens old, which no window reaches.

Global tokens have slots of their own in front of the ring: the first tokens of each row's last document. Full layers
have a slot for every token and grow in blocks. Layers of one kind hold the same tokens in the same slots, so `Slots`
keeps positions and documents once for all of them.

Legend: B batch, G kv heads, S slots, T new tokens, D head size.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from model.attention.plan import AttentionPlan
from model.attention.reference import Attend, OneToken
from model.config import WindreachConfig
from model.errors import UserError
from model.packing import NO_DOCUMENT, Packing, RowEnds, count_positions
from model.windows import LayerSpec, cache_slots


class Slots:
    """Which token each slot of one kind of layers holds: positions and document ids (B, S).

    One global token, which has the first slot, and W = 3, after a chunk of five tokens:

        >>> slots = Slots(LayerSpec("sliding", window=3, global_tokens=1))
        >>> slots.begin(Packing(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.long)), in_slots=False)
        >>> slots.write_positions()
        >>> slots.positions.tolist()
        [[0, 3, 4, 2]]
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.ring = spec, spec.ring_slots
        self.global_slots = 0 if self.ring is None else spec.global_tokens
        self.clear()

    def clear(self) -> None:
        self.seen = self.oldest = 0  # number of tokens so far; index of the oldest token that the ring still holds
        self.positions = self.documents = torch.empty(0, 0, dtype=torch.long)

    def begin(self, chunk: Packing, in_slots: bool) -> None:
        """Make room for a chunk (B, T) and choose its slots.

        `in_slots`: the chunk is a single token a row, and attends over the slots themselves. `targets` are slots
        counted through all rows, `kept` the tokens that go there (None: all of them), `order` the slots that hold
        tokens before the chunk, by age.
        """
        assert chunk.documents is not None
        self.chunk = chunk
        self._make_room(chunk.positions)
        self.order = None if in_slots else self._slots_by_age()
        b, t = chunk.positions.shape
        newest = min(t, self.ring or t)
        index = torch.arange(self.seen, self.seen + t, device=self.positions.device)
        slots = self._slots_of(index) + self.first_slots
        # Ring slots that global tokens leave unused hold nothing.
        self.skipped = slots[:, -newest:].flatten() if self.global_slots else None
        kept = (index >= self.seen + t - newest).expand(b, t)
        if self.global_slots:
            is_global = (chunk.positions < self.global_slots) & (chunk.documents >= 0)
            slots = torch.where(is_global, chunk.positions + self.first_slots, slots)
            kept = torch.where(is_global, chunk.documents == chunk.documents.amax(1, keepdim=True), kept)
        self.kept = kept.flatten() if newest < t or (self.global_slots and t > 1) else None
        self.targets = self.select_kept(slots)

    def select_kept(self, x: Tensor) -> Tensor:
        """The part of a chunk's (B, T, …) that is written, flat, in the order of `targets`."""
        flat = x.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def write_positions(self) -> None:
        """Write the chunk's positions and documents into its slots."""
        assert self.chunk.documents is not None
        if self.skipped is not None:
            self.documents.view(-1).index_fill_(0, self.skipped, NO_DOCUMENT)
        self.positions.view(-1).index_copy_(0, self.targets, self.select_kept(self.chunk.positions))
        self.documents.view(-1).index_copy_(0, self.targets, self.select_kept(self.chunk.documents))

    def end(self) -> None:
        """Count the chunk's tokens. They are in the cache now."""
        self.seen += self.chunk.positions.shape[1]
        self.oldest = max(self.oldest, self.seen - (self.ring or self.seen))

    def attend_in_slots(self, dtype: torch.dtype) -> Attend:
        """Write the position of a single token a row; its attention over the keys of all slots."""
        self.write_positions()
        return OneToken.of(self.spec, self.chunk, Packing(self.positions, self.documents), dtype)

    def attend_behind(self, plan: AttentionPlan) -> Attend:
        """Attention of the chunk over [cache, by age | chunk]. Then the chunk's positions are written."""
        assert self.chunk.documents is not None
        queries = self.chunk
        keys = Packing(
            torch.cat((self.positions[:, self.order], queries.positions), 1),
            torch.cat((self.documents[:, self.order], self.chunk.documents), 1),
        )
        if keys.is_one_document():
            queries, keys = Packing(queries.positions), Packing(keys.positions)
        self.write_positions()
        return plan.prepare_cached(queries, keys)

    def _slots_by_age(self) -> Tensor:
        """The slots that hold tokens: those of global tokens, then the others from the oldest on."""
        index = torch.arange(self.oldest, self.seen, device=self.positions.device)
        return torch.cat((torch.arange(self.global_slots, device=index.device), self._slots_of(index)))

    def _slots_of(self, index: Tensor) -> Tensor:
        return index if self.ring is None else self.global_slots + index % self.ring

    def _make_room(self, like: Tensor) -> None:
        """Grow to the slots that the tokens so far and those of `like` (B, T) need."""
        needed = cache_slots(self.spec, self.seen + like.shape[1])
        if self.seen == 0:
            self.positions = like.new_zeros(len(like), needed)
            self.documents = torch.full_like(self.positions, NO_DOCUMENT)
        missing = max(0, needed - self.positions.shape[1])
        if missing:
            self.positions = F.pad(self.positions, (0, missing))
            self.documents = F.pad(self.documents, (0, missing), value=NO_DOCUMENT)
        self.grew = bool(missing) or self.seen == 0
        if self.grew:
            self.first_slots = torch.arange(len(like), device=like.device)[:, None] * needed

    def can_remove(self, tokens: int) -> bool:
        """Whether the W - 1 tokens before the new end are all in the cache."""
        return self.ring is None or self.oldest <= max(0, self.seen - tokens - (self.ring - 1))

    def remove(self, tokens: int, next_positions: Tensor) -> None:
        """Empty the slots of each row's newest tokens. The next token will have position `next_positions` (B,)."""
        index = torch.arange(self.seen - tokens, self.seen, device=self.positions.device)
        self.documents[:, self._slots_of(index)] = NO_DOCUMENT
        removed = self.positions[:, : self.global_slots] >= next_positions[:, None]
        self.documents[:, : self.global_slots].masked_fill_(removed, NO_DOCUMENT)
        self.seen -= tokens

    def select_rows(self, rows: Tensor) -> None:
        self.positions, self.documents = (x.index_select(0, rows) for x in (self.positions, self.documents))


class RingLayer(CacheLayerMixin):
    """Keys and values of one layer side by side, (B, S, 2G, D), so that a token is a single write."""

    is_compileable = False
    keys: Tensor  # (B, G, S, D), a view of `key_values`
    values: Tensor

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.is_sliding = slots.ring is not None
        self.clear()

    def clear(self) -> None:
        self.is_initialized = False
        self._set(torch.empty(0, 0, 0, 0))

    def _set(self, key_values: Tensor) -> None:
        self.key_values = key_values
        self.keys, self.values = key_values.transpose(1, 2).chunk(2, dim=1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.make_room(key_states, 2 * key_states.shape[1], key_states.shape[3])

    def make_room(self, like: Tensor, heads: int, head_dim: int) -> None:
        """Make room for all slots, in the dtype and on the device of `like`. Full layers grow from time to time."""
        b, slots = self.slots.positions.shape
        if not self.is_initialized:
            self._set(like.new_zeros(b, 0, heads, head_dim))
            self.is_initialized = True
        if self.key_values.shape[1] < slots:
            self._set(F.pad(self.key_values, (0, 0, 0, 0, 0, slots - self.key_values.shape[1])))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: keys without positions can't be masked. The decoder calls `extend`."""
        raise UserError("RingCache serves Windreach models only; other models bring their own cache")

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the chunk (B, G, T, D) and return the keys and values (B, G, S, D) that it attends over.

        These are all slots, for a single token, or [cache, by age | chunk] as they were before the chunk was written.
        """
        if self.slots.order is None:
            self._write(keys, values)
            all_keys, all_values = self.key_values.transpose(1, 2).chunk(2, dim=1)
            return all_keys, all_values
        self.lazy_initialization(keys, values)
        old = self.key_values.index_select(1, self.slots.order).transpose(1, 2).chunk(2, dim=1)
        all_keys, all_values = torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2)
        self._write(keys, values)
        return all_keys, all_values

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Of a chunk longer than the ring only the newest tokens are kept."""
        new = self.slots.select_kept(torch.cat((keys, values), 1).transpose(1, 2))
        self.key_values.view(-1, *new.shape[1:]).index_copy_(0, self.slots.targets, new)

    def select_rows(self, rows: Tensor) -> None:
        self._set(self.key_values.index_select(0, rows))

    def get_seq_length(self) -> int:
        return self.slots.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.seen + query_length, 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.key_values.nbytes


class RingCache(Cache):
    """One `RingLayer` per layer, and the count of each row's positions. Pass it as `past_key_values`.

    It belongs to the model that fills it first, until `reset`. Its keys and values were computed with that model's
    weights: discard it once they change.
    """

    def __init__(self, config: WindreachConfig) -> None:
        self.head_shape = 2 * config.num_key_value_heads, config.head_dim
        self.slots = {spec: Slots(spec) for spec in config.specs}
        super().__init__(layers=[RingLayer(self.slots[spec]) for spec in config.specs])
        self._release()

    def _release(self) -> None:
        self.ends: RowEnds | None = None
        self.owner: weakref.ref[nn.Module] | None = None

    def claim(self, model: nn.Module, specs: tuple[LayerSpec, ...]) -> bool:
        """Make this the cache of `model`, and return whether it is new. Raises UserError for another model's cache."""
        if tuple(layer.slots.spec for layer in self.layers) != specs:
            raise UserError("the cache was made for other layers; make it from this model's config: RingCache(config)")
        is_new = self.owner is None
        self.owner = self.owner or weakref.ref(model)
        if self.owner() is not model:
            raise UserError("the cache was filled by another model; use a new one, or reset() it")
        return is_new

    def count(self, documents: Tensor) -> Packing:
        """Positions of new tokens with document ids (B, T), continued from the tokens before them."""
        ends = self.ends or RowEnds.of_empty_rows(documents)
        if len(ends.positions) != len(documents):
            raise UserError(f"the cache holds {len(ends.positions)} rows, but the input has {len(documents)}")
        packing, self.ends = count_positions(documents, ends)
        return packing

    def begin(self, chunk: Packing, like: Tensor | None = None) -> None:
        """Make room for a chunk. With `like`, a tensor of the keys' dtype and device, it attends over the slots."""
        for slots in self.slots.values():
            slots.begin(chunk, in_slots=like is not None)
        if like is not None and any(slots.grew for slots in self.slots.values()):
            for layer in self.layers:
                layer.make_room(like, *self.head_shape)

    def end(self) -> None:
        for slots in self.slots.values():
            slots.end()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the old row beam_idx[i], for beam search."""
        if self.ends is None:
            return
        self.ends = RowEnds(*(x.index_select(0, beam_idx) for x in self.ends))
        for part in (*self.slots.values(), *self.layers):
            part.select_rows(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens of each row, as if they had never come. `tokens_to_remove` is minus their number.

        Raises UserError where keys that a shorter sequence needs are overwritten (any number of tokens can be removed
        before a ring is full, and one afterwards), and where a row would return to an earlier document.
        """
        tokens, seen = -tokens_to_remove, self.get_seq_length()
        if not 0 <= tokens <= seen:
            raise UserError(f"crop({tokens_to_remove}): give minus the tokens to remove, of which there are {seen}")
        if tokens == 0 or self.ends is None:
            return
        if tokens == seen:
            return self.reset()
        if not all(slots.can_remove(tokens) for slots in self.slots.values()):
            raise UserError(
                f"a ring cache can't be cropped by {tokens} tokens: keys that a shorter sequence needs are overwritten"
            )
        if not bool((self.ends.positions > tokens).all()):
            raise UserError(f"the cache can't be cropped by {tokens} tokens: a row's document began after them")
        self.ends = self.ends._replace(positions=self.ends.positions - tokens)
        for slots in self.slots.values():
            slots.remove(tokens, self.ends.positions)

    def reset(self) -> None:
        for part in (*self.slots.values(), *self.layers):
            part.clear()
        self._release()

    @property
    def bytes(self) -> int:
        """Bytes of keys and values in all layers."""
        return sum(layer.bytes for layer in self.layers)
