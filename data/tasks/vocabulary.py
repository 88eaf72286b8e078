"""The tokens of recall tasks: marker, query, values, keys, and ordinary tokens for random haystacks.

Our own tokenizers reserve tokens for marker, query and values (`RESERVED`). With any other tokenizer, its rarest
one-token words are used: lower-case words of four letters or more, with the blank before them. Keys are always such
words: so a tokenizer, and results published with it, don't change when a task is added.
`data.tasks.layout.clean_filler` removes all of these tokens from the text around a question.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from data.tasks.draws import IntArray
from model.errors import UserError

NEEDLE, QUERY = "<needle>", "<query>"
VALUES = tuple(f"<v{i:02d}>" for i in range(32))
RESERVED = (NEEDLE, QUERY, *VALUES)

_SPECIAL = re.compile(r"^(<.*>|\[.*\])$", re.DOTALL)
_WORD = re.compile(r"^[▁Ġ][a-z]{4,}$")


class TokenizerLike(Protocol):
    """What recall tasks need of a tokenizer, ours or any other."""

    def encode(self, text: str) -> list[int]: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class RecallVocabulary:
    """Token ids of the needle marker, the query, values and keys (no two alike), and of ordinary tokens (sorted)."""

    needle: tuple[int, ...]
    query: tuple[int, ...]
    values: tuple[int, ...]
    plain: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False, repr=False)
    keys: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert (np.diff(self.reserved) > 0).all(), "needle, query, values and keys share a token"
        assert not np.isin(self.plain, self.reserved).any(), "the ordinary tokens include a reserved one"

    @cached_property
    def reserved(self) -> IntArray:
        """(n,) sorted ids that no filler may contain."""
        return np.array(sorted((*self.needle, *self.query, *self.values, *self.keys)), dtype=np.int64)


def recall_vocabulary(tokenizer: TokenizerLike, n_values: int, n_keys: int = 0) -> RecallVocabulary:
    """The reserved tokens if the tokenizer has them, else its rarest one-token words; the next rarest serve as keys.

    More keys change neither the other tokens nor the first keys. Raises `UserError` when there are too few words.
    """
    vocab = tokenizer.get_vocab()
    distinct = {piece[1:]: piece for piece in sorted(filter(_WORD.match, vocab), key=vocab.__getitem__)}
    # Highest id first: in a trained vocabulary that is the rarest word. ▁word and Ġword are the same word.
    words = sorted(distinct.values(), key=vocab.__getitem__, reverse=True)
    has_reserved = all(name in vocab and list(tokenizer.encode(name)) == [vocab[name]] for name in RESERVED)
    names = list(RESERVED) if has_reserved else words
    if n_values + 2 > len(names):
        few = f"recall.values is {n_values}, but the tokenizer offers {max(0, len(names) - 2)} one-token values"
        kinds = "" if has_reserved else f", for it has {len(words)} tokens such as ▁ship or Ġship and no {VALUES[0]}"
        raise UserError(f"{few}{kinds}; lower it{'' if has_reserved else ', or use another tokenizer'}")
    names = names[: n_values + 2]
    free = [word for word in words if word not in names]
    if n_keys > len(free):
        few = f"recall.keys is {n_keys}, but the tokenizer offers {len(free)} one-token words"
        raise UserError(f"{few}; lower it, or raise data.tokenizer.vocab_size")
    needle, query, *values = (vocab[name] for name in names)
    keys = tuple(vocab[word] for word in free[:n_keys])
    ordinary = {i for piece, i in vocab.items() if not _SPECIAL.match(piece)} - {needle, query, *values, *keys}
    return RecallVocabulary((needle,), (query,), tuple(values), np.array(sorted(ordinary), dtype=np.int64), keys)
