"""What a recall measurement asks for: tasks, distances and items.

An item is a counterfactual pair: the same tokens with value v and with another value v'. All items have one length.
This module does not import torch, so that a mistake on the command line is answered at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.tasks import TASKS, need_keys
from data.tasks.distance import in_tokens
from data.tasks.layout import RecallItem, clean_filler, item, needle_tokens, task_size
from data.tasks.question import Task, TaskOptions
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from eval.haystack import Haystack
from eval.models import Examined, nominal_reach
from model import windows
from model.errors import UserError
from model.windows import LayerSpec

CONTROLS = ("distractors", "untrained")
DISTRACTORS = 4  # older needles in an item of that control
NEEDLES = ("needle", "needle-noise")  # the tasks for a model that was trained on none
VALUES = KEYS = 32  # for such a model
SIZE_NAMES = {"pairs": "keys", "span_pairs": "span-pairs", "hops": "hops", "rules": "rules"}  # on the command line
ALIGNED = 32  # tokens: attention runs a third faster on lengths that are a multiple of it
SCREENING = 200  # items per distance at first; more follow only where recall changes


@dataclass(frozen=True)
class Order:
    """What is to be measured."""

    tasks: tuple[str, ...]
    distances: tuple[int, ...]  # tokens
    n: int  # items per distance
    seed: int
    precision: str  # `fp32` or `bf16`
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by field of `TaskOptions`; each is an entry
    controls: tuple[str, ...] = ()


def aligned(length: int) -> int:
    """The smallest possible length of items, in tokens, that is at least `length`: a multiple of ALIGNED."""
    return length + -length % ALIGNED


def default_distances(specs: Sequence[LayerSpec], window: int | None, longest: int) -> list[int]:
    """1, W/2, W-1, W, W+1, 1.5W, 2W, then about six per doubling, R-1, R, R+1, W k, W k + W, as far as `longest`.

    A stack of unbounded reach counts as one with this window in every layer. Without any window, two per doubling.

    >>> default_distances([LayerSpec("sliding", 4)] * 4, 4, 4096)
    [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 20]
    """
    if window is None:
        return [d for d in (1, *(round(8 * 2 ** (i / 2)) for i in range(40))) if d <= longest]
    reach, total = nominal_reach(specs, window), len(specs) * window
    if windows.reach(specs) is not None:
        total = windows.window_times_layers(specs) or total
    near = {1, window // 2, window - 1, window, window + 1, 3 * window // 2, 2 * window}
    doublings = math.log2(max(reach, 2 * window) / (2 * window))
    far = {round(2 * window * 2 ** (i / 6)) for i in range(int(6 * doublings) + 1)}
    edge = {reach - 1, reach, reach + 1, total, total + window}
    return sorted(d for d in near | {d for d in far if d < reach - 1} | edge if 1 <= d <= longest)


def parse_distances(text: str, window: int | None, reach: int | None) -> tuple[int, ...]:
    """The distances of a list such as `1,W,.9R,R-1,R,R+1`. Raises UserError with the word that is no distance."""
    try:
        distances = sorted({in_tokens(word, window, reach) for word in text.split(",")})
    except ValueError as error:
        raise UserError(
            f"--distances {text!r}: {error}; give tokens, or shares of W and R, such as 1,16,W,0.9R,R-1,R,R+1"
        ) from error
    if distances[0] < 1:
        raise UserError(f"--distances {text!r}: a distance is at least 1 token")
    return tuple(distances)


@dataclass(frozen=True)
class TaskItems:
    """The items of one task at one size: one entry of recall.json."""

    name: str  # of the entry: the task, with the size where several are measured, such as `keys-16`
    task: Task
    options: TaskOptions
    vocabulary: RecallVocabulary
    haystack: Haystack
    seed: int
    distances: list[int]  # those that the task can have
    distractors: int = 0
    total_length: int = 0  # tokens of every item; `open_items` sets it

    @property
    def size(self) -> dict[str, int]:
        """The size of the questions as it stands in recall.json, such as {"keys": 4}; empty for needles."""
        option = self.task.option
        return {SIZE_NAMES[option].replace("-", "_"): getattr(self.options, option)} if option else {}

    def item(self, i: int, distance: int, distractors: int = 0) -> RecallItem:
        """Item `i`, a pure function of (seed, task, i, distance), on a clean haystack of (seed, task, i) alone."""
        if self.task.noise:
            filler = np.random.default_rng([self.seed, 11, i]).choice(self.vocabulary.plain, self.total_length)
        else:
            filler = clean_filler(self.haystack.filler(i, self.total_length, self.seed), self.vocabulary)
        rng = np.random.default_rng([self.seed, list(TASKS).index(self.task.name), i, distance])
        words, length = self.vocabulary, self.total_length
        return item(self.task.name, rng, filler, words, length, distance, self.options, distractors)


def open_items(examined: Examined, haystack: Haystack, order: Order) -> list[TaskItems]:
    """The items of each entry ordered, a task at its trained size or each of the sizes; UserError if one can't be."""
    trained = TaskOptions(**examined.recall.get("questions", {}))
    n_values, n_keys = examined.recall.get("values", VALUES), examined.recall.get("keys", KEYS)
    entries, farthest, margin = [], max(order.distances), 0
    for task in (TASKS[name] for name in order.tasks):
        option = task.option or ""
        sizes = order.sizes.get(option, ())
        options_by_name = {f"{task.name}-{n}": trained.model_copy(update={option: n}) for n in sizes}
        older = DISTRACTORS if "distractors" in order.controls and not task.alone else 0
        for name, options in (options_by_name or {task.name: trained}).items():
            most = task.most(n_values, n_keys)
            if task.option is not None and most is not None and getattr(options, task.option) > most:
                raise UserError(
                    f"--{SIZE_NAMES[task.option]} {getattr(options, task.option)}: {task.name} allows at most {most} "
                    f"with {n_values} values and {n_keys} keys; lower it"
                )
            # If any task of the run uses keys, they stay out of the haystack of every task, as in training.
            uses_keys = need_keys([task.name, *examined.recall.get("tasks", {})])
            vocabulary = recall_vocabulary(examined.tokenizer, n_values, n_keys if uses_keys else 0)
            size = task_size(task.name, vocabulary, options)
            distances = [d for d in order.distances if d >= size.nearest]
            if not distances:
                raise UserError(f"--distances: the shortest distance of {name} is {size.nearest}; add a longer one")
            needles = older * needle_tokens(task.name, vocabulary, options)
            margin = max(margin, size.row(farthest) - farthest + needles + len(vocabulary.query) + 7)
            entries.append(TaskItems(name, task, options, vocabulary, haystack, order.seed, distances, older))
    total_length = aligned(farthest + margin)
    if examined.max_tokens and total_length > examined.max_tokens:
        raise UserError(
            f"--distances {farthest}: items would be {total_length:,} tokens long and this model reads "
            f"{examined.max_tokens:,}; give distances up to {examined.max_tokens // ALIGNED * ALIGNED - margin:,}"
        )
    return [replace(entry, total_length=total_length) for entry in entries]
