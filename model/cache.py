"""Rolling-buffer cache: a true ring per layer, O(1) write per token, absolute places kept per slot.

With W = 3 and tokens a b c d e arriving one by one, slot = index mod 3:

    a        a b      a b c    d b c    d e c
    0        0 1      0 1 2    3 1 2    3 4 2     <- index held by each slot

A query attends over [ring | its own chunk] and only then is the chunk written: the early queries of a chunk still
need keys that its late ones overwrite. Full layers grow by doubling; global tokens keep slots of their own.

Legend: B batch, G kv heads, S slots, T new tokens, D head size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from model.config import WindreachConfig
from model.errors import UserError
from model.places import Places
from model.windows import LayerSpec

EMPTY = -2  # document id of a slot that nothing was written to: no query has it


class RingLayer(CacheLayerMixin):
    """Keys and values (B, G, S, D) of one layer, with positions and document ids (B, S) per slot."""

    is_compileable = False

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.is_sliding = spec.ring_slots is not None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, g, t, d = key_states.shape
        slots = self.spec.ring_slots
        slots = max(64, t) if slots is None else slots + self.spec.global_tokens
        self.keys = key_states.new_zeros(b, g, slots, d)
        self.values = value_states.new_zeros(b, g, slots, d)
        self.positions = torch.zeros(b, slots, dtype=torch.long, device=key_states.device)
        self.documents = torch.full((b, slots), EMPTY, dtype=torch.long, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not the way in: keys without places can't be masked. The decoder calls `view` and `write`."""
        raise UserError("RingCache serves Windreach models only; other models bring their own cache")

    def view(self, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor, Places]:
        """[ring | chunk]: keys and values (B, G, S + T, D) and their places, before anything is written.

        For a single token the ring stays in the order of its slots; for a chunk it is put in order of age.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if keys.shape[1] != self.keys.shape[1] or keys.shape[3] != self.keys.shape[3]:
            raise UserError("the cache was filled by another model (its heads have other shapes); use a new one")
        assert places.documents is not None
        held = (self.keys, self.values, self.positions, self.documents)
        new = (keys, values, places.positions, places.documents)
        seen_keys, seen_values, positions, documents = (
            torch.cat((self._held(x, x.ndim // 2, keys.shape[2] > 1), y), x.ndim // 2)
            for x, y in zip(held, new, strict=True)
        )
        return seen_keys, seen_values, Places(positions, documents)

    def _held(self, x: Tensor, dim: int, by_age: bool) -> Tensor:
        """The slots that were written, of `x` with its slots along `dim`."""
        slots = x.shape[dim]
        if by_age and self.is_sliding and self.seen > slots:
            return x.roll(-(self.seen % slots), dim)
        return x.narrow(dim, 0, min(self.seen, slots))

    def write(self, keys: Tensor, values: Tensor, places: Places) -> None:
        """Put the chunk into its slots; of a chunk longer than the ring only the newest tokens stay."""
        t = keys.shape[2]
        index = torch.arange(self.seen, self.seen + t, device=keys.device)
        ring = self.spec.ring_slots
        if ring is not None:
            keep = slice(max(0, t - ring), t)
            self._put(index[keep] % ring, keys[:, :, keep], values[:, :, keep], places, keep)
            self._put_globals(keys, values, places)
        else:
            self._grow(self.seen + t)
            self._put(index, keys, values, places, slice(0, t))
        self.seen += t

    def _put(self, slots: Tensor, keys: Tensor, values: Tensor, places: Places, keep: slice) -> None:
        assert places.documents is not None
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = values
        self.positions[:, slots] = places.positions[:, keep]
        self.documents[:, slots] = places.documents[:, keep]

    def _put_globals(self, keys: Tensor, values: Tensor, places: Places) -> None:
        """The first tokens of a row's document, beside the ring, once they leave it they are still there."""
        if not self.spec.global_tokens:
            return
        raise UserError("the ring cache does not hold global tokens yet; generate with use_cache=False")

    def _grow(self, needed: int) -> None:
        have = self.keys.shape[2]
        if needed <= have:
            return
        more = max(needed, 2 * have) - have
        self.keys, self.values = (torch.cat((x, x.new_zeros(*x.shape[:2], more, x.shape[3])), 2) for x in self._kv())
        self.positions = torch.cat((self.positions, self.positions.new_zeros(self.positions.shape[0], more)), 1)
        self.documents = torch.cat((self.documents, self.documents.new_full((self.documents.shape[0], more), EMPTY)), 1)

    def _kv(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams: row i becomes the old row beam_idx[i]."""
        if self.is_initialized:
            self.keys, self.values = (x.index_select(0, beam_idx) for x in self._kv())
            self.positions, self.documents = (x.index_select(0, beam_idx) for x in (self.positions, self.documents))

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(x.numel() * x.element_size() for x in self._kv()) if self.is_initialized else 0


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


class RingCache(Cache):
    """One `RingLayer` per layer; pass it as `past_key_values`. `tail` continues each row's count."""

    def __init__(self, config: WindreachConfig) -> None:
        super().__init__(layers=[RingLayer(spec) for spec in config.specs])
        self.tail: Tail | None = None

    def tail_for(self, documents: Tensor) -> Tail:
        """Where the rows of `documents` (B, T) go on."""
        tail = self.tail or Tail.none(documents)
        if len(tail.positions) != len(documents):
            raise UserError(f"the cache holds {len(tail.positions)} rows, but the input has {len(documents)}")
        return tail

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.tail is not None:
            self.tail = Tail(*(x.index_select(0, beam_idx) for x in self.tail))

    def crop(self, tokens_to_remove: int) -> None:
        """A ring has overwritten what a shorter sequence would need: refused."""
        raise UserError("a ring cache can't be cropped: the tokens that a shorter sequence needs are overwritten")

    def reset(self) -> None:
        super().reset()
        self.tail = None

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)
