"""Rolling-buffer cache: a true ring per layer, O(1) write per token, absolute places kept per slot.

With W = 3 and tokens a b c d e arriving one by one, slot = index mod 3:

    a        a b      a b c    d b c    d e c
    0        0 1      0 1 2    3 1 2    3 4 2     <- index held by each slot

A chunk attends over [cache | chunk] and only then is it written: its early queries still need keys that its late ones
overwrite. A single token is written first: what it overwrites is W old, and out of its sight.

Global tokens stand in slots of their own in front of the ring, and never in the ring: of each row, the first tokens of
its latest document. Full layers have a slot for every token and grow in blocks.

Layers of one kind hold the same tokens in the same slots. Which ones, `Slots` says, once for all of them.

Legend: B batch, G kv heads, S slots, T new tokens, D head size.
"""

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from model.attention.plan import prepare_after
from model.config import WindreachConfig
from model.errors import UserError
from model.places import Places
from model.windows import LayerSpec, cache_slots

if TYPE_CHECKING:
    from model.decode import Step

EMPTY = -2  # document id of a slot that holds nothing: no query has it


class Slots:
    """Which token each slot of one kind of layers holds: positions and document ids (B, S), and how many were seen.

    W = 3 and one global token, which has the slot in front; five tokens of a document came as one chunk:

        >>> slots = Slots(LayerSpec("sliding", window=3, global_tokens=1))
        >>> slots.begin(Places(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.long)))
        >>> slots.commit()
        >>> slots.positions.tolist()
        [[0, 3, 4, 2]]
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.ring = spec, spec.ring_slots
        self.first = 0 if self.ring is None else spec.global_tokens
        self.clear()

    def clear(self) -> None:
        self.seen = self.oldest = 0  # tokens that came; the first of them that the ring still holds
        self.positions = self.documents = torch.empty(0, 0, dtype=torch.long)

    def begin(self, chunk: Places) -> None:
        """Make room for a chunk (B, T) and find where its tokens go: `targets`, slots of all rows counted through."""
        assert chunk.documents is not None
        self.chunk = chunk
        self._make_room(chunk.positions)
        b, t = chunk.positions.shape
        newest = min(t, self.ring or t)
        index = torch.arange(self.seen, self.seen + t, device=self.positions.device)
        slots = self._slots_of(index) + self.rows
        self.passed = slots[:, -newest:].flatten() if self.first else None
        self.kept = None
        kept = (index >= self.seen + t - newest).expand(b, t)
        if self.first:
            first = (chunk.positions < self.first) & (chunk.documents >= 0)
            slots = torch.where(first, chunk.positions + self.rows, slots)
            kept = torch.where(first, chunk.documents == chunk.documents.amax(1, keepdim=True), kept)
        if newest < t or (self.first and t > 1):
            self.kept = kept.flatten()
        self.targets = self.to_write(slots)

    def to_write(self, x: Tensor) -> Tensor:
        """Of a chunk's (B, T, …), flat, what the `targets` will hold."""
        flat = x.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def commit(self) -> None:
        """The chunk is written: say so."""
        assert self.chunk.documents is not None
        positions, documents = self.to_write(self.chunk.positions), self.to_write(self.chunk.documents)
        write_places(self.positions, self.documents, self.passed, self.targets, positions, documents)
        self.advance()

    def advance(self) -> None:
        self.seen += self.chunk.positions.shape[1]
        self.oldest = max(self.oldest, self.seen - (self.ring or self.seen))

    def _slots_of(self, index: Tensor) -> Tensor:
        return index if self.ring is None else self.first + index % self.ring

    def _make_room(self, like: Tensor) -> None:
        needed = cache_slots(self.spec, self.seen + like.shape[1])
        if self.seen == 0:
            self.positions = like.new_zeros(len(like), needed)
            self.documents = torch.full_like(self.positions, EMPTY)
        missing = max(0, needed - self.positions.shape[1])
        if missing:
            self.positions = F.pad(self.positions, (0, missing))
            self.documents = F.pad(self.documents, (0, missing), value=EMPTY)
        if missing or self.seen == 0:
            self.rows = torch.arange(len(like), device=like.device)[:, None] * needed

    def by_age(self) -> Tensor:
        """The slots that were written to: global ones, then the others from the oldest token on."""
        index = torch.arange(self.oldest, self.seen, device=self.positions.device)
        return torch.cat((torch.arange(self.first, device=index.device), self._slots_of(index)))

    def look_back(self, backend: str) -> None:
        """Places of the chunk's queries and of the keys it attends over, [held, by age | chunk], for `backend`."""
        assert self.chunk.documents is not None
        self.held = self.by_age()
        positions = torch.cat((self.positions[:, self.held], self.chunk.positions), 1)
        documents = torch.cat((self.documents[:, self.held], self.chunk.documents), 1)
        self.queries, keys = self.chunk, Places(positions, documents)
        if bool((documents == documents[:1, :1]).all()) and bool(documents[0, 0] >= 0):  # one alone needs no ids
            self.queries, keys = Places(self.chunk.positions), Places(positions)
        self.keys = prepare_after(self.spec, self.queries, keys, backend)

    def can_forget(self, tokens: int) -> bool:
        """Whether the W - 1 tokens before the new end are all still held."""
        return self.ring is None or self.oldest <= max(0, self.seen - tokens - (self.ring - 1))

    def forget(self, tokens: int, next_positions: Tensor) -> None:
        """Give up each row's newest tokens; its next one will have the place `next_positions` (B,)."""
        index = torch.arange(self.seen - tokens, self.seen, device=self.positions.device)
        self.documents[:, self._slots_of(index)] = EMPTY
        gone = self.positions[:, : self.first] >= next_positions[:, None]
        self.documents[:, : self.first].masked_fill_(gone, EMPTY)
        self.seen -= tokens

    def select(self, rows: Tensor) -> None:
        self.positions, self.documents = (x.index_select(0, rows) for x in (self.positions, self.documents))


def write_places(
    held_positions: Tensor, held_documents: Tensor, passed: Tensor | None, targets: Tensor, positions: Tensor,
    documents: Tensor,
) -> None:  # fmt: skip
    """Put positions and document ids (N,) into slots (B, S). One that a global token passed over holds nothing."""
    if passed is not None:
        held_documents.view(-1).index_fill_(0, passed, EMPTY)
    held_positions.view(-1).index_copy_(0, targets, positions)
    held_documents.view(-1).index_copy_(0, targets, documents)


class RingLayer(CacheLayerMixin):
    """Keys and values of one layer side by side, (B, S, 2G, D), so that a token is a single write."""

    is_compileable = False
    keys: Tensor  # (B, G, S, D), a view of `held`
    values: Tensor

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.is_sliding = slots.ring is not None
        self.clear()

    def clear(self) -> None:
        self.is_initialized = False
        self._hold(torch.empty(0, 0, 0, 0))

    def _hold(self, held: Tensor) -> None:
        self.held = held
        self.keys, self.values = held.transpose(1, 2).chunk(2, dim=1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.make_room(key_states, 2 * key_states.shape[1], key_states.shape[3])

    def make_room(self, like: Tensor, heads: int, head_dim: int) -> None:
        """Room for all slots, of the dtype and device of `like`; they grow from time to time in a full layer."""
        b, slots = self.slots.positions.shape
        if not self.is_initialized:
            self._hold(like.new_zeros(b, 0, heads, head_dim))
            self.is_initialized = True
        if self.held.shape[1] < slots:
            self._hold(F.pad(self.held, (0, 0, 0, 0, 0, slots - self.held.shape[1])))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not the way in: keys without places can't be masked. The decoder calls `view` and `write`."""
        raise UserError("RingCache serves Windreach models only; other models bring their own cache")

    def view(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[held, by age | chunk]: keys and values (B, G, S + T, D), before anything is written."""
        self.lazy_initialization(keys, values)
        held = self.held.index_select(1, self.slots.held).transpose(1, 2).chunk(2, dim=1)
        return torch.cat((held[0], keys), 2), torch.cat((held[1], values), 2)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put the chunk (B, G, T, D) into its slots; of one longer than the ring only the newest tokens stay."""
        new = self.slots.to_write(torch.cat((keys, values), 1).transpose(1, 2))
        self.held.view(-1, *new.shape[1:]).index_copy_(0, self.slots.targets, new)

    def select(self, rows: Tensor) -> None:
        self._hold(self.held.index_select(0, rows))

    def get_seq_length(self) -> int:
        return self.slots.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.seen + query_length, 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held."""
        return self.held.nbytes


class Tail(NamedTuple):
    """Where each row's count stands, all (B,): its next position, its latest document's id, and that one's number."""

    positions: Tensor
    documents: Tensor
    numbers: Tensor

    @classmethod
    def none(cls, documents: Tensor) -> "Tail":
        """Before the first token of rows like `documents` (B, T)."""
        zeros = torch.zeros_like(documents[:, 0])
        return cls(zeros, torch.full_like(zeros, EMPTY), zeros)

    def one_more(self, documents: Tensor) -> "tuple[Places, Tail]":
        """Places of one more token a row, of `documents` (B, 1), and the tail behind it."""
        given = documents[:, 0]
        real = given >= 0
        starts = real & (given != self.documents)
        positions, numbers = self.positions.masked_fill(starts, 0), self.numbers + starts
        places = Places(positions[:, None], torch.where(real, numbers, -1)[:, None])
        return places, Tail(positions + 1, torch.where(real, given, self.documents), numbers)


class RingCache(Cache):
    """One `RingLayer` per layer; pass it as `past_key_values`. `tail` continues each row's count.

    It belongs to the model that fills it first, until `reset`. What it holds was computed with that model's weights:
    a cache is no longer of use once they have changed.
    """

    def __init__(self, config: WindreachConfig) -> None:
        self.slots = {spec: Slots(spec) for spec in config.specs}
        super().__init__(layers=[RingLayer(self.slots[spec]) for spec in config.specs])
        self._forget_owner()

    def _forget_owner(self) -> None:
        self.tail: Tail | None = None
        self.step: Step | None = None
        self.owner: weakref.ref[nn.Module] | None = None

    def serve(self, model: nn.Module, specs: tuple[LayerSpec, ...]) -> None:
        """Become the cache of `model`. Raises UserError when it is another's."""
        if tuple(layer.slots.spec for layer in self.layers) != specs:
            raise UserError("the cache was made for other layers; make it from this model's config: RingCache(config)")
        if self.owner is None:
            self.owner = weakref.ref(model)
        elif self.owner() is not model:
            raise UserError("the cache was filled by another model; use a new one, or reset() it")

    def tail_for(self, documents: Tensor) -> Tail:
        """Where the rows of `documents` (B, T) go on."""
        tail = self.tail or Tail.none(documents)
        if len(tail.positions) != len(documents):
            raise UserError(f"the cache holds {len(tail.positions)} rows, but the input has {len(documents)}")
        return tail

    def begin(self, chunk: Places) -> None:
        for slots in self.slots.values():
            slots.begin(chunk)

    def commit(self) -> None:
        for slots in self.slots.values():
            slots.commit()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams: row i becomes the old row beam_idx[i]."""
        if self.tail is None:
            return
        self.tail = Tail(*(x.index_select(0, beam_idx) for x in self.tail))
        for slots in self.slots.values():
            slots.select(beam_idx)
        for layer in self.layers:
            layer.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens of each row, as if they had not come.

        Raises UserError where what a shorter sequence needs is overwritten (a ring can go back by one token, or
        anywhere while it has not turned), and where a document would have to be taken up again.
        """
        tokens = -tokens_to_remove
        seen = self.get_seq_length()
        if not 0 <= tokens <= seen:
            raise UserError(f"crop({tokens_to_remove}): give minus the tokens to remove, of which there are {seen}")
        if tokens == 0 or self.tail is None:
            return
        if tokens == seen:
            return self.reset()
        if not all(slots.can_forget(tokens) for slots in self.slots.values()):
            raise UserError(
                f"a ring cache can't be cropped by {tokens} tokens: those that a shorter sequence needs are overwritten"
            )
        if not bool((self.tail.positions > tokens).all()):
            raise UserError(f"the cache can't be cropped by {tokens} tokens: a row's document began after them")
        self.tail = self.tail._replace(positions=self.tail.positions - tokens)
        for slots in self.slots.values():
            slots.forget(tokens, self.tail.positions)

    def reset(self) -> None:
        for part in (*self.slots.values(), *self.layers):
            part.clear()
        self._forget_owner()

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)
