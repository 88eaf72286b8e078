"""The tokens that recall tasks are made of: marker, query, values, keys, and the ordinary pieces around them.

Our own tokenizers reserve marker, query and values (`RESERVED`). Any other tokenizer lends rare one-token words for
them. Keys, which only some tasks need, are lent words always: a tokenizer, and with it a published result, does not
change when a task is added. Text that happens to hold a lent word is cleaned by `data.tasks.layout.clean_filler`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

IntArray = NDArray[np.int64]

NEEDLE, QUERY = "<needle>", "<query>"
VALUES = tuple(f"<v{i:02d}>" for i in range(32))
RESERVED = (NEEDLE, QUERY, *VALUES)

_SPECIAL = re.compile(r"^(<.*>|\[.*\])$", re.DOTALL)
_WORD = re.compile(r"^[▁Ġ][a-z]{4,}$")


class TokenizerLike(Protocol):
    """What is asked of a tokenizer, ours or any other."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class RecallVocabulary:
    """Token ids of the needle marker, the query, values and keys (all disjoint), and of `plain` noise (sorted)."""

    needle: tuple[int, ...]
    query: tuple[int, ...]
    values: tuple[int, ...]
    plain: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False, repr=False)
    keys: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = [*self.needle, *self.query, *self.values, *self.keys]
        assert len(ids) == len(set(ids)), "needle, query, values and keys share a token"
        assert not np.isin(self.plain, ids).any(), "noise holds a needle, query, value or key token"

    @cached_property
    def reserved(self) -> IntArray:
        """(n,) sorted ids that no filler may hold."""
        return np.array(sorted((*self.needle, *self.query, *self.values, *self.keys)), dtype=np.int64)


def recall_vocabulary(tokenizer: TokenizerLike, n_values: int, n_keys: int = 0) -> RecallVocabulary:
    """Reserved tokens where the tokenizer has them, else its rarest one-token words; keys are the rarest words left.

    More keys change neither the other tokens nor the first keys. Raises `UserError` when there are too few.
    """
    vocab = tokenizer.get_vocab()
    words = _rare_words(vocab)
    names = list(RESERVED) if _has_reserved(tokenizer, vocab) else words
    if n_values + 2 > len(names):
        raise UserError(
            f"recall.values is {n_values}, but the tokenizer offers {max(0, len(names) - 2)} one-token values; lower it"
        )
    needle, query, *values = (vocab[name] for name in names[: n_values + 2])
    free = [word for word in words if word not in names[: n_values + 2]]
    if n_keys > len(free):
        raise UserError(
            f"recall.keys is {n_keys}, but the tokenizer offers {len(free)} one-token words; lower it, "
            "or raise data.tokenizer.vocab_size"
        )
    keys = tuple(vocab[word] for word in free[:n_keys])
    plain = _plain(vocab, {needle, query, *values, *keys})
    return RecallVocabulary((needle,), (query,), tuple(values), plain, keys)


def _has_reserved(tokenizer: TokenizerLike, vocab: dict[str, int]) -> bool:
    return all(name in vocab and list(tokenizer.encode(name)) == [vocab[name]] for name in RESERVED)


def _rare_words(vocab: dict[str, int]) -> list[str]:
    """Lower-case words, the last by id first: in trained vocabularies later means rarer."""
    words = sorted((piece for piece in vocab if _WORD.match(piece)), key=vocab.__getitem__, reverse=True)
    distinct = {piece[1:]: piece for piece in reversed(words)}
    return sorted(distinct.values(), key=vocab.__getitem__, reverse=True)


def _plain(vocab: dict[str, int], taken: set[int]) -> IntArray:
    """Ordinary pieces: neither special, nor single bytes, nor taken."""
    ids = {i for piece, i in vocab.items() if not _SPECIAL.match(piece)} - taken
    return np.array(sorted(ids), dtype=np.int64)
