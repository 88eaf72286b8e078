"""`instruction`: the row opens with a rule, and much later an argument is to be answered by it. Is it still followed?

    <needle> RULE2 ... <query> ARGUMENT5        -> the value that rule 2 gives to argument 5

Each rule has a value of its own for each argument; which one is learned in training. The argument stands beside the
query, so that a model which has lost the rule is still right in one case out of the number of rules: that is chance.
The rule opens its row, as an instruction opens a prompt: a layer with global tokens or sinks sees it from everywhere.
"""

from typing import ClassVar

import numpy as np

from data.tasks.question import Plain, Questions, Size, TaskDraws, TaskOptions, answered_last, marked
from data.tasks.vocabulary import RecallVocabulary


class Instruction(Plain):
    name: ClassVar[str] = "instruction"
    option: ClassVar[str | None] = "rules"
    at_start = True

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        rules = options.rules
        arguments = min(len(vocab.keys) - rules, len(vocab.values) // rules)
        rule = draws.deciding(n, 1, rules)[..., 0]
        argument = draws.integers("argument", n, arguments)
        keys, values = (np.asarray(ids, dtype=np.int64) for ids in (vocab.keys, vocab.values))
        query = marked(vocab.query, keys[rules + argument])
        answers = answered_last(query, values[rule * arguments + argument])
        at = np.full_like(rule, len(vocab.needle))
        return Questions(marked(vocab.needle, keys[rule]), at, query, answers, rule)

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        return Size(nearest=query + 1, before=needle + 1)

    def most(self, n_values: int, n_keys: int) -> int | None:
        return min(n_keys - 1, n_values)

    def seen(self, options: TaskOptions) -> int:
        return options.rules

    def chance(self, n_values: int, options: TaskOptions) -> float:
        return 1 / options.rules
