"""What a recall task is: questions in pieces, which `data.tasks.layout` lays over a haystack.

    haystack ... [needle: ... VALUE ...] haystack ... [query]        the answer follows the query's last token

One token of the needle decides the answer; `value_at` says which. Another one in its place, and nothing else changed,
asks for another answer. A needle that stands nearer to the query supersedes one farther back.

Legend: B rows, N questions of a row, L tokens of a needle, M tokens of a query, P needles that stand elsewhere.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from data.tasks.vocabulary import RecallVocabulary

IntArray = NDArray[np.int64]

UNSCORED = -100
LEAVE = -1  # a place of a needle or a query at which the haystack shows


@dataclass(frozen=True)
class TaskOptions:
    """How large questions are. Training draws up to that size, evaluation asks for exactly that."""

    pairs: int = 4  # `keys`: pairs of key and value in a row
    span_pairs: int = 4  # `induction`: pairs in the repeated span
    hops: int = 2  # `variable-tracking`: copies from variable to variable
    rules: int = 4  # `instruction`: rules to choose from


DEFAULT_OPTIONS = TaskOptions()


@dataclass(frozen=True)
class Questions:
    """N questions for each of B rows."""

    needle: IntArray  # (B, N, L)
    value_at: IntArray  # (B, N) place of the deciding token within the needle
    query: IntArray  # (B, N, M) to the right; the answer follows its last token
    answers: IntArray  # (B, N, M) what must follow each token of the query, else `UNSCORED`
    carried: IntArray  # (B, N) number of the deciding token, for the relay head
    elsewhere: IntArray | None = None  # (B, P, L) needles of other keys, which stand where there is room

    @property
    def query_tokens(self) -> IntArray:
        """(B, N)."""
        return np.count_nonzero(self.query != LEAVE, axis=-1)

    @property
    def nearest(self) -> IntArray:
        """(B, N) the shortest distance that each can have: what follows the value, and the query."""
        return self.needle.shape[-1] - 1 - self.value_at + self.query_tokens


@dataclass(frozen=True)
class Size:
    """Tokens that any question of a task needs."""

    nearest: int  # the shortest distance that all of them can have
    before: int  # of a needle up to its value, at most
    least: int = 0  # of a row, whatever the distance

    def row(self, distance: int) -> int:
        """Tokens of a row that surely holds a question at `distance`."""
        return max(max(distance, self.nearest) + self.before, self.least)


class TaskDraws(Protocol):
    """Random numbers for all rows at once: `data.tasks.draws.Draws` in training, `data.tasks.layout.ItemDraws` for single items."""

    def integers(self, name: str, n: int, high: int) -> IntArray: ...

    def distinct(self, name: str, n: int, count: int, high: int) -> IntArray: ...

    def deciding(self, n: int, count: int, high: int) -> IntArray:
        """(B, n, count) distinct numbers on [0, high), the first of which decides the answer."""
        ...

    def up_to(self, name: str, n: int, high: int) -> IntArray:
        """(B, n) sizes on [1, high]; an item of evaluation has the largest."""
        ...


class Task(Protocol):
    """One kind of question."""

    name: ClassVar[str]
    option: ClassVar[str | None]  # the field of `TaskOptions` that it reads
    noise: ClassVar[bool]  # haystack of pieces drawn at random, else of text
    at_start: ClassVar[bool]  # the needle opens the row
    alone: ClassVar[bool]  # one question a row, its query at the end

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        """`n` questions for each row."""
        ...

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        """`needle` and `query` are the tokens of the markers."""
        ...

    def most(self, n_values: int, n_keys: int) -> int | None:
        """The largest `option` that so many values and keys allow; None where it reads none."""
        ...

    def seen(self, options: TaskOptions) -> int:
        """Answers that a context offers: who names any of them is right in 1 of `seen`."""
        ...

    def chance(self, n_values: int, options: TaskOptions) -> float:
        """Share of right answers without any knowledge of the needle."""
        ...


class Plain:
    """What most tasks have in common."""

    option: ClassVar[str | None] = None
    noise: ClassVar[bool] = False
    at_start: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def chance(self, n_values: int, options: TaskOptions) -> float:
        return 1 / n_values


def marked(marker: tuple[int, ...], *tokens: IntArray) -> IntArray:
    """(..., marker + tokens) of the marker and then one token (...) after another."""
    head = np.broadcast_to(np.array(marker, dtype=np.int64), (*tokens[0].shape, len(marker)))
    return np.concatenate((head, *(t[..., None] for t in tokens)), axis=-1)


def answered_last(query: IntArray, answer: IntArray) -> IntArray:
    """(B, N, M) labels of a query whose last token alone is answered, by `answer` (B, N)."""
    labels = np.full_like(query, UNSCORED)
    labels[..., -1] = answer
    return labels
