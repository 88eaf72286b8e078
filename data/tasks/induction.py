"""`induction`: a random span is repeated and breaks off; the model must continue it.

    ... KEY1 VALUE1 KEY2 VALUE2 KEY3 VALUE3 ... KEY1 VALUE1 KEY2        -> VALUE2

No marker announces it. Every value of a repeated span is as far from the place where it is asked again as every other:
one distance, so all of the repeated keys are scored in training, and evaluation reads the last one.
"""

from typing import ClassVar

import numpy as np

from data.tasks.question import LEAVE, UNSCORED, IntArray, Plain, Questions, Size, TaskDraws, TaskOptions
from data.tasks.vocabulary import RecallVocabulary


class Induction(Plain):
    name: ClassVar[str] = "induction"
    option: ClassVar[str | None] = "span_pairs"

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        pairs = options.span_pairs
        last = draws.integers("repeated", n, pairs)[..., None]  # number of the last pair that is begun again
        turned = (np.arange(pairs) - last) % pairs  # the deciding value goes to that pair
        number = np.take_along_axis(draws.deciding(n, pairs, len(vocab.values)), turned, axis=-1)
        key = np.asarray(vocab.keys, dtype=np.int64)[draws.distinct("key", n, pairs, len(vocab.keys))]
        value = np.asarray(vocab.values, dtype=np.int64)[number]
        span = np.stack((key, value), axis=-1).reshape(*key.shape[:2], 2 * pairs)
        query, answers = _begun_again(span, 2 * last + 1)
        carried = np.take_along_axis(number, last, axis=-1)[..., 0]
        return Questions(span, 2 * last[..., 0] + 1, query, answers, carried)

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        tokens = 2 * options.span_pairs
        return Size(nearest=tokens - 1, before=tokens, least=2 * tokens - 1)

    def most(self, n_values: int, n_keys: int) -> int | None:
        return min(n_keys, n_values - 1)

    def seen(self, options: TaskOptions) -> int:
        return options.span_pairs


def _begun_again(span: IntArray, tokens: IntArray) -> tuple[IntArray, IntArray]:
    """(B, N, L - 1) twice: the first `tokens` (B, N, 1) of the span (B, N, L), to the right; the value after each key.

    >>> query, answers = _begun_again(np.array([[[1, 10, 2, 20, 3, 30]]]), np.array([[[3]]]))
    >>> query.tolist(), answers.tolist()
    ([[[-1, -1, 1, 10, 2]]], [[[-100, -100, 10, -100, 20]]])
    """
    place = np.arange(span.shape[-1] - 1) - (span.shape[-1] - 1 - tokens)
    query = np.where(place >= 0, np.take_along_axis(span, place.clip(min=0), axis=-1), LEAVE)
    following = np.take_along_axis(span, place.clip(min=0) + 1, axis=-1)
    return query, np.where((place >= 0) & (place % 2 == 0), following, UNSCORED)
