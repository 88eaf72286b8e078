"""What a recall task is: it draws questions, which `data.tasks.layout` writes over a haystack of filler tokens.

    haystack ... [needle: ... VALUE ...] haystack ... [query]        the answer follows the query's last token

One token of the needle decides the answer. If another token stands in its place, the question has another answer.

Legend: B rows, N questions in a row, L tokens of a needle, M tokens of a query, P needles that stand elsewhere.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.settings import QuestionSettings as TaskOptions
from data.tasks.draws import IntArray, TaskDraws
from data.tasks.vocabulary import RecallVocabulary

UNSCORED = -100  # label of a position without an answer
LEAVE = -1  # in a needle or query: the haystack shows at this position
DEFAULT_OPTIONS = TaskOptions()


@dataclass(frozen=True)
class Questions:
    """N questions for each of B rows."""

    needle: IntArray  # (B, N, L)
    value_at: IntArray  # (B, N) index of the deciding token in the needle
    query: IntArray  # (B, N, M) aligned to the right; the answer follows the last token
    answers: IntArray  # (B, N, M) the token that must follow each token of the query, else `UNSCORED`
    carried: IntArray  # (B, N) number of the deciding token among the values, which the relay head predicts
    elsewhere: IntArray | None = None  # (B, P, L) needles of other keys, placed wherever there is room

    @property
    def query_tokens(self) -> IntArray:
        """(B, N) tokens of each query."""
        return np.count_nonzero(self.query != LEAVE, axis=-1)


@dataclass(frozen=True)
class Size:
    """Tokens that any question of a task needs."""

    nearest: int  # smallest distance that every question can have
    before: int  # needle tokens up to and including the value, at most
    least: int = 0  # tokens in a row, whatever the distance

    def row(self, distance: int) -> int:
        """Tokens in a row that is long enough for any question at `distance`."""
        return max(max(distance, self.nearest) + self.before, self.least)


class Task(ABC):
    """A kind of question. The defaults are those of most tasks."""

    name: ClassVar[str]
    option: ClassVar[str | None] = None  # the field of `TaskOptions` that sets its size
    noise: ClassVar[bool] = False  # whether the haystack is random tokens instead of text
    at_start: ClassVar[bool] = False  # whether the needle opens the row
    alone: ClassVar[bool] = False  # whether a row holds one question, with its query at the end

    @abstractmethod
    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        """Draw `n` questions for each row."""

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        """Tokens that questions need; `needle` and `query` are the lengths of the markers."""
        return Size(nearest=query + (self.option is not None), before=needle + 1)

    def most(self, n_values: int, n_keys: int) -> int | None:
        """Largest `option` that so many values and keys allow; None if the task has no option."""
        return min(n_keys, n_values - 1) if self.option else None

    def seen(self, options: TaskOptions) -> int:
        """Number of candidate answers in the context: naming any of them is right once in `seen` times."""
        return getattr(options, self.option) if self.option else 1

    def chance(self, n_values: int, options: TaskOptions) -> float:
        """Share of right answers without any knowledge of the needle."""
        return 1 / n_values


def marked(marker: tuple[int, ...], *tokens: IntArray) -> IntArray:
    """(..., len(marker) + len(tokens)): the marker, then one token from each array (...)."""
    head = np.broadcast_to(np.array(marker, dtype=np.int64), (*tokens[0].shape, len(marker)))
    return np.concatenate((head, *(t[..., None] for t in tokens)), axis=-1)


def answered_last(query: IntArray, answer: IntArray) -> IntArray:
    """(B, N, M) labels of queries (B, N, M) whose last token alone has an answer, `answer` (B, N)."""
    labels = np.full_like(query, UNSCORED)
    labels[..., -1] = answer
    return labels
