"""`variable-tracking`: a value is given to a variable, which is copied to another, and so on; the last one is asked.

    ... <needle> X VALUE <needle> Y X <needle> Z Y ... <query> Z        -> VALUE

The chain and a rival chain of other variables, with a value of its own, stand interleaved in one block: without a rival
the only value in sight would be the answer. Nothing but haystack stands between the block and its query.
"""

from typing import ClassVar

import numpy as np

from data.tasks.question import LEAVE, Plain, Questions, Size, TaskDraws, TaskOptions, answered_last, marked
from data.tasks.vocabulary import RecallVocabulary

CHAINS = 2


class VariableTracking(Plain):
    name: ClassVar[str] = "variable-tracking"
    option: ClassVar[str | None] = "hops"

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        links = options.hops + 1
        keys = np.asarray(vocab.keys, dtype=np.int64)
        variable = keys[draws.distinct("key", n, CHAINS * links, len(keys))].reshape(-1, n, CHAINS, links)
        number = draws.deciding(n, CHAINS, len(vocab.values))
        value = np.asarray(vocab.values, dtype=np.int64)[number]
        given = np.concatenate((value[..., None], variable[..., :-1]), axis=-1)
        hops = draws.up_to("hops", n, links)[..., None] - 1  # none at times in training: looking up comes first
        used = (np.arange(links) <= hops)[..., None, :, None]
        assignment = np.where(used, marked(vocab.needle, variable, given), LEAVE)

        place = draws.distinct("place", n, CHAINS * links, CHAINS * links).reshape(-1, n, CHAINS, links)
        ordered = np.sort(place, axis=-1).reshape(-1, n, CHAINS * links)  # within a chain the order stays
        block = np.empty((*ordered.shape, assignment.shape[-1]), dtype=np.int64)
        np.put_along_axis(block, ordered[..., None], assignment.reshape(block.shape), axis=2)

        query = marked(vocab.query, np.take_along_axis(variable[:, :, 0], hops, axis=-1)[..., 0])
        at = (ordered[..., 0] + 1) * assignment.shape[-1] - 1
        needle = block.reshape(*ordered.shape[:2], -1)
        return Questions(needle, at, query, answered_last(query, value[..., 0]), number[..., 0])

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        """The chain's first assignment is at best the first of the block, at worst just before its rival is whole."""
        assignment, links = needle + 2, options.hops + 1
        tokens = assignment * CHAINS * links
        return Size(nearest=tokens - assignment + query + 1, before=assignment * (links + 1))

    def most(self, n_values: int, n_keys: int) -> int | None:
        return n_keys // CHAINS - 1 if n_values > CHAINS else 0

    def seen(self, options: TaskOptions) -> int:
        return CHAINS
