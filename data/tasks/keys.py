"""`keys`: several keys with a value each, of which one is asked for. It measures capacity.

    ... <needle> KEY2 VALUE2 ... <needle> KEY1 VALUE1 ... <needle> KEY3 VALUE3 ... <query> KEY1        -> VALUE1

The other pairs stand where there is room, between the asked value and the query too: a model can't tell which will be
asked. They are distractors by definition.
"""

from typing import ClassVar

import numpy as np

from data.tasks.question import LEAVE, Plain, Questions, Size, TaskDraws, TaskOptions, answered_last, marked
from data.tasks.vocabulary import RecallVocabulary


class Keys(Plain):
    name: ClassVar[str] = "keys"
    option: ClassVar[str | None] = "pairs"
    alone = True

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        assert n == 1, "a row asks for one of its keys"
        pairs = options.pairs
        key = np.asarray(vocab.keys, dtype=np.int64)[draws.distinct("key", 1, pairs, len(vocab.keys))]
        number = draws.deciding(1, pairs, len(vocab.values))
        value = np.asarray(vocab.values, dtype=np.int64)[number]
        needles = marked(vocab.needle, key, value)
        used = np.arange(1, pairs) < draws.up_to("pairs", 1, pairs)
        elsewhere = np.where(used[..., None], needles[:, 0, 1:], LEAVE)
        query = marked(vocab.query, key[..., 0])
        at = np.full(query.shape[:2], len(vocab.needle) + 1)
        return Questions(
            needles[:, :, 0], at, query, answered_last(query, value[..., 0]), number[..., 0], elsewhere
        )  # fmt: skip

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        """Pairs stand on a grid that the asked one defines: on either side of it a part of a pair may be lost."""
        pair = needle + 2
        return Size(nearest=query + 1, before=pair, least=pair * (options.pairs + 2) + query + 1)

    def most(self, n_values: int, n_keys: int) -> int | None:
        return min(n_keys, n_values - 1)

    def seen(self, options: TaskOptions) -> int:
        return options.pairs
