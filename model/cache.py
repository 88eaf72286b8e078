"""Rolling-buffer key/value cache: a ring of W slots per layer, one write per token, the position of each slot known.

Five tokens a b c d e arrive one by one with W = 3. Token i goes to slot i mod 3:

    a        a b      a b c    d b c    d e c
    0        0 1      0 1 2    3 1 2    3 4 2     <- index of the token in each slot

A chunk of tokens attends over [cache | chunk] before it is written: its first queries need keys that its last tokens
overwrite. A single token is written first: the key it overwrites is W tokens old, which no window reaches. Its index
comes in a tensor, so that the same kernels serve every token and a GPU can replay them.

Global tokens have slots of their own in front of the ring: the first tokens of each row's last document. Full layers
have a slot for every token and grow in blocks. Layers of one kind hold the same tokens in the same slots, so `Slots`
keeps positions and documents once for all of them.

Legend: B batch, G kv heads, S slots, T new tokens, D head size.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from model.attention.plan import AttentionPlan
from model.attention.reference import Attend, attend_one
from model.config import WindreachConfig
from model.errors import UserError
from model.packing import NO_DOCUMENT, Packing, RowEnds, count_positions, may_see
from model.windows import LayerSpec, cache_slots


class Slots:
    """Which token each slot of one kind of layers holds: positions and document ids (B, S).

    One global token, which has the first slot, and W = 3, after a chunk of five tokens:

        >>> slots = Slots(LayerSpec("sliding", window=3, global_tokens=1))
        >>> chunk = Packing(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.long))
        >>> slots.begin(chunk)
        >>> slots.write_positions(chunk)
        >>> slots.positions.tolist()
        [[0, 3, 4, 2]]
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.ring = spec, spec.ring_slots
        self.global_slots = 0 if self.ring is None else spec.global_tokens
        self.clear()

    def clear(self) -> None:
        self.seen = self.oldest = 0  # number of tokens so far; index of the oldest token that the ring still holds
        self.reserved = 0  # number of tokens for which a full layer makes room at once
        self.positions = self.documents = torch.empty(0, 0, dtype=torch.long)

    def begin(self, chunk: Packing) -> None:
        """Make room for a chunk (B, T) and choose its slots. `order`: the slots that hold tokens before it, by age."""
        self.make_room(chunk.positions)
        self.order: Tensor | None = self._slots_by_age()
        new = torch.arange(self.seen, self.seen + chunk.positions.shape[1], device=self.positions.device)
        self._choose_slots(chunk, new)

    def begin_token(self, token: Packing) -> None:
        """Make room for a single token a row (B, 1), which attends over the slots themselves."""
        self.make_room(token.positions)
        self.order = None

    def _choose_slots(self, chunk: Packing, index: Tensor) -> None:
        """Choose slots for a chunk of T tokens, which are the tokens `index` (T,) of each row.

        `targets` are slots counted through all rows, `kept` the tokens that go there (None: all of them).
        """
        assert chunk.documents is not None
        b, t = chunk.positions.shape
        newest = min(t, self.ring or t)
        slots = self._slots_of(index) + self.first_slots
        # Ring slots that global tokens leave unused hold nothing.
        self.skipped = slots[:, -newest:].flatten() if self.global_slots else None
        kept = None if t == 1 else (torch.arange(t, device=index.device) >= t - newest).expand(b, t)
        if self.global_slots:
            is_global = (chunk.positions < self.global_slots) & (chunk.documents >= 0)
            slots = torch.where(is_global, chunk.positions + self.first_slots, slots)
            if kept is not None:
                kept = torch.where(is_global, chunk.documents == chunk.documents.amax(1, keepdim=True), kept)
        self.kept = kept.flatten() if kept is not None and (newest < t or self.global_slots) else None
        self.targets = self.select_kept(slots)

    def select_kept(self, x: Tensor) -> Tensor:
        """The part of a chunk's (B, T, …) that is written, flat, in the order of `targets`."""
        flat = x.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def write_positions(self, chunk: Packing) -> None:
        """Write the chunk's positions and documents into its slots."""
        assert chunk.documents is not None
        if self.skipped is not None:
            self.documents.view(-1).index_fill_(0, self.skipped, NO_DOCUMENT)
        self.positions.view(-1).index_copy_(0, self.targets, self.select_kept(chunk.positions))
        self.documents.view(-1).index_copy_(0, self.targets, self.select_kept(chunk.documents))

    def end(self, tokens: int) -> None:
        """Count the tokens of a chunk. They are in the cache now."""
        self.seen += tokens
        self.oldest = max(self.oldest, self.seen - (self.ring or self.seen))

    def attend_in_slots(self, token: Packing, index: Tensor, dtype: torch.dtype) -> Attend:
        """Write the position of a single token a row, token `index` (1,); its attention over the keys of all slots."""
        self._choose_slots(token, index)
        self.write_positions(token)
        seen = may_see(self.spec, token, Packing(self.positions, self.documents))
        return partial(attend_one, torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None])

    def attend_behind(self, chunk: Packing, plan: AttentionPlan) -> Attend:
        """Attention of the chunk over [cache, by age | chunk]. Then the chunk's positions are written."""
        assert chunk.documents is not None
        queries = chunk
        keys = Packing(
            torch.cat((self.positions[:, self.order], chunk.positions), 1),
            torch.cat((self.documents[:, self.order], chunk.documents), 1),
        )
        if keys.is_one_document():
            queries, keys = Packing(queries.positions), Packing(keys.positions)
        self.write_positions(chunk)
        return plan.prepare_cached(queries, keys)

    def _slots_by_age(self) -> Tensor:
        """The slots that hold tokens: those of global tokens, then the others from the oldest on."""
        index = torch.arange(self.oldest, self.seen, device=self.positions.device)
        return torch.cat((torch.arange(self.global_slots, device=index.device), self._slots_of(index)))

    def _slots_of(self, index: Tensor) -> Tensor:
        return index if self.ring is None else self.global_slots + index % self.ring

    def make_room(self, like: Tensor) -> None:
        """Grow to the slots that the tokens so far and those of `like` (B, T) need, or the reserved ones."""
        needed = cache_slots(self.spec, max(self.seen + like.shape[1], self.reserved))
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


def can_record(x: Tensor) -> bool:
    """Whether a step on `x` can be recorded. Under autocast it can't: converted weights are freed behind each step."""
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


class Recording:
    """The kernels of a function of tensors, as a CUDA graph. They read and write the same memory at each replay.

    A step of a deep model is hundreds of kernels, and to launch them takes longer than to run them. A graph launches
    all of them at once. What the function uses apart from its arguments must stay where it is, until `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recording":
        """A copied cache has other memory."""
        return Recording()

    def forget(self) -> None:
        self.is_warm = False
        self.recorded: tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor] | None = None  # with its inputs and output

    def replay(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """What `function` returns for `inputs`, which have the same shapes at each call; valid until the next call.

        The first call runs the function as it is: what is compiled or loaded at first can't be recorded.
        """
        if not self.is_warm:
            self.is_warm = True
            return function(*inputs)
        self.recorded = self.recorded or _record(function, inputs)
        graph, fixed, output = self.recorded
        for old, new in zip(fixed, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return output


def _record(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
    """The graph, and the memory that it reads and writes. Nothing is computed meanwhile."""
    fixed, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(fixed[0].device), capture_error_mode="thread_local"):
        output = function(*fixed)  # other threads may use the GPU meanwhile
    return graph, fixed, output


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are recorded: each stream has workspaces of its own."""
    return torch.cuda.Stream(device)


class RingCache(Cache):
    """One `RingLayer` per layer, and the count of each row's positions. Pass it as `past_key_values`.

    It belongs to the model that fills it first, until `reset`. Its keys and values were computed with that model's
    weights: discard it once they change.
    """

    def __init__(self, config: WindreachConfig) -> None:
        self.head_shape = 2 * config.num_key_value_heads, config.head_dim
        self.slots = {spec: Slots(spec) for spec in config.specs}
        super().__init__(layers=[RingLayer(self.slots[spec]) for spec in config.specs])
        self.recording = Recording()
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

    def reserve(self, tokens: int) -> None:
        """Full layers make room for `tokens` tokens a row in all with the next token, and need not grow until then."""
        for slots in self.slots.values():
            slots.reserved = tokens

    def begin(self, chunk: Packing) -> None:
        """Make room for a chunk (B, T) and choose its slots."""
        for slots in self.slots.values():
            slots.begin(chunk)
        self._forget_moved_slots(chunk)

    def begin_token(self, token: Packing, like: Tensor) -> None:
        """Make room for a single token a row. `like` has the dtype and the device of the keys."""
        for slots in self.slots.values():
            slots.begin_token(token)
        if self._forget_moved_slots(token):
            for layer in self.layers:
                layer.make_room(like, *self.head_shape)
        self.index.fill_(self.get_seq_length())  # passed by the host without waiting for the device

    def _forget_moved_slots(self, chunk: Packing) -> bool:
        """Whether slots are elsewhere in memory since they grew. Then what was recorded is void."""
        grew = any(slots.grew for slots in self.slots.values())
        if grew:
            self.index = chunk.positions.new_empty(1)
            self.recording.forget()
        return grew

    def end(self, tokens: int) -> None:
        for slots in self.slots.values():
            slots.end(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the old row beam_idx[i], for beam search."""
        if self.ends is None:
            return
        self.ends = RowEnds(*(x.index_select(0, beam_idx) for x in self.ends))
        for part in (*self.slots.values(), *self.layers):
            part.select_rows(beam_idx)
        self.recording.forget()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as is `batch_select_indices`: the number of rows stays as it is until `reset`."""
        raise UserError("a ring cache keeps its number of rows; repeat the rows of the input, and use a new cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        self.batch_repeat_interleave(len(indices))

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
        self.recording.forget()
        self._release()

    @property
    def bytes(self) -> int:
        """Bytes of keys and values in all layers."""
        return sum(layer.bytes for layer in self.layers)
