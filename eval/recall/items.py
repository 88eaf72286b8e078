"""The items of one task at one size: which tokens a model is asked, at every distance.

An item is a counterfactual pair: the same tokens with value v and with another value v'. All items have one length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.tasks import TASKS, need_keys
from data.tasks.layout import RecallItem, clean_filler, item, needle_tokens, task_size
from data.tasks.question import Task, TaskOptions
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from eval.haystack import Haystack
from eval.models import Examined
from eval.recall.order import ALIGNED, SIZE_NAMES, Order, aligned
from model.errors import UserError

DISTRACTORS = 4  # older needles in an item of that control
VALUES = KEYS = 32  # for a model that was trained on no task


@dataclass(frozen=True)
class TaskItems:
    """The items of one task at one size: one entry of recall.json."""

    name: str  # of the entry: the task, with the size where several are measured, such as `keys-16`
    task: Task
    options: TaskOptions
    vocabulary: RecallVocabulary
    haystack: Haystack
    seed: int
    distractors: int = 0
    total_length: int = 0  # tokens of every item; `open_items` sets it

    @property
    def size(self) -> dict[str, int]:
        """The size of the questions as it stands in recall.json, such as {"keys": 4}; empty for needles."""
        option = self.task.option
        return {SIZE_NAMES[option].replace("-", "_"): getattr(self.options, option)} if option else {}

    @property
    def chance(self) -> float:
        """Share of right answers without any knowledge of the needle."""
        return self.task.chance(len(self.vocabulary.values), self.options)

    def possible(self, distances: Sequence[int]) -> list[int]:
        """The distances that the task can have. Raises UserError if none is left."""
        nearest = task_size(self.task.name, self.vocabulary, self.options).nearest
        if not (possible := [d for d in distances if d >= nearest]):
            raise UserError(f"--distances: the shortest distance of {self.name} is {nearest}; add a longer one")
        return possible

    def margin(self, farthest: int) -> int:
        """Tokens of an item besides its farthest distance."""
        length = task_size(self.task.name, self.vocabulary, self.options).row(farthest)
        older = self.distractors * needle_tokens(self.task.name, self.vocabulary, self.options)
        return length - farthest + older + len(self.vocabulary.query) + 7

    def items(self, distance: int, indices: Sequence[int], distractors: int = 0) -> list[RecallItem]:
        """Item `i` is a pure function of (seed, task, i, distance), and its haystack of (seed, task, i) alone."""
        number = list(TASKS).index(self.task.name)
        rngs = (np.random.default_rng([self.seed, number, i, distance]) for i in indices)
        return [
            item(
                self.task.name, rng, self._filler(i), self.vocabulary, self.total_length, distance, self.options,
                distractors,
            )
            for i, rng in zip(indices, rngs, strict=True)
        ]  # fmt: skip

    def _filler(self, i: int) -> NDArray[np.int64]:
        """(total_length,) haystack of item `i`, without the tokens that needles and queries are made of."""
        if self.task.noise:
            return np.random.default_rng([self.seed, 11, i]).choice(self.vocabulary.plain, self.total_length)
        return clean_filler(self.haystack.filler(i, self.total_length, self.seed), self.vocabulary)


def open_items(examined: Examined, haystack: Haystack, order: Order) -> list[TaskItems]:
    """The items of each entry that was ordered: a task at the size it was trained on, or at each of the sizes.

    Raises UserError if the model can't read that many tokens, or a size does not fit the vocabulary.
    """
    trained = TaskOptions(**examined.recall.get("questions", {}))
    older = DISTRACTORS if "distractors" in order.controls else 0
    entries = []
    for task in (TASKS[name] for name in order.tasks):
        options_by_name = {task.name: trained}
        if task.option in order.sizes:
            options_by_name = {
                f"{task.name}-{n}": trained.model_copy(update={task.option: n}) for n in order.sizes[task.option]
            }
        for name, options in options_by_name.items():
            vocabulary = _vocabulary(examined, task, options)
            distractors = 0 if task.alone else older
            entries.append(TaskItems(name, task, options, vocabulary, haystack, order.seed, distractors))
    farthest = max(order.distances)
    margin = max(entry.margin(farthest) for entry in entries)
    total_length = aligned(farthest + margin)
    if examined.max_tokens and total_length > examined.max_tokens:
        raise UserError(
            f"--distances {farthest}: items would be {total_length:,} tokens long and this model reads "
            f"{examined.max_tokens:,}; give distances up to {examined.max_tokens // ALIGNED * ALIGNED - margin:,}"
        )
    return [replace(entry, total_length=total_length) for entry in entries]


def n_values_of(examined: Examined) -> int:
    """The number of values that the run was trained with."""
    return int(examined.recall.get("values", VALUES))


def _vocabulary(examined: Examined, task: Task, options: TaskOptions) -> RecallVocabulary:
    """The tokens of the task. Raises UserError if its questions need more of them.

    If any task of the run uses keys, they stay out of the haystack of every task, as in training.
    """
    n_values, n_keys = n_values_of(examined), int(examined.recall.get("keys", KEYS))
    most = task.most(n_values, n_keys)
    if task.option is not None and most is not None and getattr(options, task.option) > most:
        raise UserError(
            f"--{SIZE_NAMES[task.option]} {getattr(options, task.option)}: {task.name} allows at most {most} "
            f"with {n_values} values and {n_keys} keys; lower it"
        )
    uses_keys = need_keys([task.name, *examined.recall.get("tasks", {})])
    return recall_vocabulary(examined.tokenizer, n_values, n_keys if uses_keys else 0)
