"""`needle`: one value, announced by a marker. `needle-noise` is the same in a haystack of random pieces.

... <needle> VALUE ... <query>        -> VALUE
"""

from typing import ClassVar

import numpy as np

from data.tasks.question import Plain, Questions, Size, TaskDraws, TaskOptions, answered_last, marked
from data.tasks.vocabulary import RecallVocabulary


class Needle(Plain):
    name: ClassVar[str] = "needle"

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        number = draws.deciding(n, 1, len(vocab.values))[..., 0]
        value = np.asarray(vocab.values, dtype=np.int64)[number]
        query = np.broadcast_to(np.array(vocab.query, dtype=np.int64), (*value.shape, len(vocab.query)))
        at = np.full_like(value, len(vocab.needle))
        return Questions(marked(vocab.needle, value), at, query, answered_last(query, value), number)

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        return Size(nearest=query, before=needle + 1)

    def most(self, n_values: int, n_keys: int) -> int | None:
        return None

    def seen(self, options: TaskOptions) -> int:
        return 1


class NeedleNoise(Needle):
    name = "needle-noise"
    noise = True
