"""The tokens that recall tasks are made of: marker, query, values, and the ordinary pieces around them.

Our own tokenizers reserve them (`RESERVED`). Any other tokenizer lends rare one-token words; text that happens to hold
one is cleaned by `data.recall.clean_filler`.
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
    """Token ids of the needle marker, the query and the values (all disjoint), and of `plain` noise (sorted)."""

    needle: tuple[int, ...]
    query: tuple[int, ...]
    values: tuple[int, ...]
    plain: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False, repr=False)

    def __post_init__(self) -> None:
        ids = [*self.needle, *self.query, *self.values]
        assert len(ids) == len(set(ids)), "needle, query and values share a token"
        assert not np.isin(self.plain, ids).any(), "noise holds a needle, query or value token"

    @cached_property
    def reserved(self) -> IntArray:
        """(n,) sorted ids that no filler may hold."""
        return np.array(sorted((*self.needle, *self.query, *self.values)), dtype=np.int64)


def recall_vocabulary(tokenizer: TokenizerLike, n_values: int) -> RecallVocabulary:
    """Reserved tokens where the tokenizer has them, else its rarest one-token words.

    Raises `UserError` when there are fewer than `n_values` of them.
    """
    vocab = tokenizer.get_vocab()
    names = RESERVED if _has_reserved(tokenizer, vocab) else _rare_words(vocab, n_values + 2)
    if n_values + 2 > len(names):
        raise UserError(
            f"recall.values is {n_values}, but the tokenizer offers {max(0, len(names) - 2)} one-token values; lower it"
        )
    needle, query, *values = (vocab[name] for name in names[: n_values + 2])
    plain = _plain(vocab, {needle, query, *values})
    return RecallVocabulary((needle,), (query,), tuple(values), plain)


def _has_reserved(tokenizer: TokenizerLike, vocab: dict[str, int]) -> bool:
    return all(name in vocab and list(tokenizer.encode(name)) == [vocab[name]] for name in RESERVED)


def _rare_words(vocab: dict[str, int], n: int) -> list[str]:
    """The last `n` lower-case words by id: in trained vocabularies later means rarer."""
    words = sorted((piece for piece in vocab if _WORD.match(piece)), key=vocab.__getitem__, reverse=True)
    distinct = {piece[1:]: piece for piece in reversed(words)}
    return sorted(distinct.values(), key=vocab.__getitem__, reverse=True)[:n]


def _plain(vocab: dict[str, int], taken: set[int]) -> IntArray:
    """Ordinary pieces: neither special, nor single bytes, nor taken."""
    ids = {i for piece, i in vocab.items() if not _SPECIAL.match(piece)} - taken
    return np.array(sorted(ids), dtype=np.int64)
