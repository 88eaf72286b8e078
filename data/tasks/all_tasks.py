"""The six recall tasks. `TASKS` holds them by name. Evaluation seeds depend on their order: add new ones at the end."""

from collections.abc import Iterable

import numpy as np

from data.tasks.draws import TaskDraws
from data.tasks.question import LEAVE, UNSCORED, Questions, Size, Task, TaskOptions, answered_last, marked
from data.tasks.vocabulary import RecallVocabulary


class Needle(Task):
    """One value after a marker: `... <needle> VALUE ... <query>` is answered by VALUE."""

    name = "needle"

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        number = draws.deciding(n, 1, len(vocab.values))[..., 0]
        value = np.take(vocab.values, number)
        query = np.broadcast_to(np.array(vocab.query, dtype=np.int64), (*value.shape, len(vocab.query)))
        value_at = np.full_like(value, len(vocab.needle))
        return Questions(marked(vocab.needle, value), value_at, query, answered_last(query, value), number)


class NeedleNoise(Needle):
    """The needle task in a haystack of random tokens."""

    name = "needle-noise"
    noise = True


class Keys(Task):
    """Several keys with one value each, of which one is asked for. It measures capacity.

        ... <needle> KEY2 VALUE2 ... <needle> KEY1 VALUE1 ... <needle> KEY3 VALUE3 ... <query> KEY1     -> VALUE1

    The other pairs may also stand between the asked value and its query, so a model can't tell which will be asked.
    """

    name = "keys"
    option = "pairs"
    alone = True

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        pairs = options.pairs
        key = np.take(vocab.keys, draws.distinct("key", 1, pairs, len(vocab.keys)))
        number = draws.deciding(1, pairs, len(vocab.values))
        value = np.take(vocab.values, number)
        needles = marked(vocab.needle, key, value)
        used = np.arange(1, pairs) < draws.up_to("pairs", 1, pairs)
        elsewhere = np.where(used[..., None], needles[:, 0, 1:], LEAVE)
        query = marked(vocab.query, key[..., 0])
        answers = answered_last(query, value[..., 0])
        value_at = np.full(query.shape[:2], len(vocab.needle) + 1)
        return Questions(needles[:, :, 0], value_at, query, answers, number[..., 0], elsewhere)

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        """Pairs stand on a grid aligned to the asked pair, so part of a cell may be lost on either side of it."""
        pair = needle + 2
        return Size(nearest=query + 1, before=pair, least=pair * (options.pairs + 2) + query + 1)


class Induction(Task):
    """A random span is repeated and breaks off after a key; the model must continue it. No marker announces it.

        ... KEY1 VALUE1 KEY2 VALUE2 KEY3 VALUE3 ... KEY1 VALUE1 KEY2                                    -> VALUE2

    All values are equally far from their repetition. So training scores every repeated key, at one distance.
    """

    name = "induction"
    option = "span_pairs"

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        pairs = options.span_pairs
        last = draws.integers("repeated", n, pairs)[..., None]  # index of the last pair whose key is repeated
        turned = (np.arange(pairs) - last) % pairs  # moves the deciding value to that pair
        number = np.take_along_axis(draws.deciding(n, pairs, len(vocab.values)), turned, axis=-1)
        key = np.take(vocab.keys, draws.distinct("key", n, pairs, len(vocab.keys)))
        span = np.stack((key, np.take(vocab.values, number)), axis=-1).reshape(*key.shape[:2], 2 * pairs)
        # Index into the span; its last key is the query's last token.
        index = np.arange(2 * pairs - 1) - 2 * (pairs - 1 - last)
        query = np.where(index >= 0, np.take_along_axis(span, index.clip(min=0), axis=-1), LEAVE)
        following = np.take_along_axis(span, index.clip(min=0) + 1, axis=-1)
        answers = np.where((index >= 0) & (index % 2 == 0), following, UNSCORED)
        carried = np.take_along_axis(number, last, axis=-1)[..., 0]
        return Questions(span, 2 * last[..., 0] + 1, query, answers, carried)

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        tokens = 2 * options.span_pairs
        return Size(nearest=tokens - 1, before=tokens, least=2 * tokens - 1)


class VariableTracking(Task):
    """A variable gets a value, a second variable copies the first, and so on; the last variable is asked for.

        ... <needle> X VALUE <needle> Y X <needle> Z Y ... <query> Z                                    -> VALUE

    A rival chain of other variables, with another value, is interleaved in the same block. Without it the only value in
    the context would be the answer. Between the block and its query stands haystack alone.
    """

    name = "variable-tracking"
    option = "hops"
    CHAINS = 2

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        links, chains = options.hops + 1, self.CHAINS
        key = draws.distinct("key", n, chains * links, len(vocab.keys))
        variable = np.take(vocab.keys, key).reshape(-1, n, chains, links)
        number = draws.deciding(n, chains, len(vocab.values))
        value = np.take(vocab.values, number)
        assigned = np.concatenate((value[..., None], variable[..., :-1]), axis=-1)
        hops = draws.up_to("hops", n, links)[..., None] - 1  # sometimes 0 in training: models learn look-up first
        used = (np.arange(links) <= hops)[..., None, :, None]
        assignment = np.where(used, marked(vocab.needle, variable, assigned), LEAVE)
        drawn = draws.distinct("place", n, chains * links, chains * links).reshape(-1, n, chains, links)
        slot = np.sort(drawn, axis=-1).reshape(-1, n, chains * links)  # keeps the order within a chain
        block = np.empty((*slot.shape, assignment.shape[-1]), dtype=np.int64)
        np.put_along_axis(block, slot[..., None], assignment.reshape(block.shape), axis=2)
        query = marked(vocab.query, np.take_along_axis(variable[:, :, 0], hops, axis=-1)[..., 0])
        value_at = (slot[..., 0] + 1) * assignment.shape[-1] - 1
        answers = answered_last(query, value[..., 0])
        return Questions(block.reshape(*slot.shape[:2], -1), value_at, query, answers, number[..., 0])

    def size(self, options: TaskOptions, needle: int = 1, query: int = 1) -> Size:
        """The chain's first assignment may open the block, or stand just before the rival's last one."""
        assignment, links = needle + 2, options.hops + 1
        tokens = assignment * self.CHAINS * links
        return Size(nearest=tokens - assignment + query + 1, before=assignment * (links + 1))

    def most(self, n_values: int, n_keys: int) -> int:
        return n_keys // self.CHAINS - 1 if n_values > self.CHAINS else 0

    def seen(self, options: TaskOptions) -> int:
        return self.CHAINS


class Instruction(Task):
    """The row opens with a rule, and much later an argument must be answered by it. Is the rule still followed?

        <needle> RULE2 ... <query> ARGUMENT5                             -> the value that rule 2 gives to argument 5

    Each rule has its own value for each argument, which the model learns in training. A model that has lost the rule
    still sees the argument, so chance is 1/rules. A layer with global tokens sees the rule from everywhere.
    """

    name = "instruction"
    option = "rules"
    at_start = True

    def ask(self, draws: TaskDraws, n: int, vocab: RecallVocabulary, options: TaskOptions) -> Questions:
        rules = options.rules
        arguments = min(len(vocab.keys) - rules, len(vocab.values) // rules)
        rule = draws.deciding(n, 1, rules)[..., 0]
        argument = draws.integers("argument", n, arguments)
        query = marked(vocab.query, np.take(vocab.keys, rules + argument))
        answers = answered_last(query, np.take(vocab.values, rule * arguments + argument))
        value_at = np.full_like(rule, len(vocab.needle))
        return Questions(marked(vocab.needle, np.take(vocab.keys, rule)), value_at, query, answers, rule)

    def most(self, n_values: int, n_keys: int) -> int:
        return min(n_keys - 1, n_values)

    def chance(self, n_values: int, options: TaskOptions) -> float:
        return 1 / options.rules


_TASKS: tuple[Task, ...] = (Needle(), NeedleNoise(), Keys(), Induction(), VariableTracking(), Instruction())
TASKS = {task.name: task for task in _TASKS}


def need_keys(tasks: Iterable[str]) -> bool:
    """Whether any of these tasks uses the keys of the vocabulary."""
    return any(TASKS[name].option is not None for name in tasks)
