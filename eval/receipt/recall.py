"""Recall of a planted value by distance, for models that were never trained to recall: the same items for each state.

    pair        ... <word> KEY VALUE ... <other word> KEY                                         -> VALUE
    question    ... The secret word is VALUE ... What is the secret word? The secret word is      -> VALUE

Value, key and words are rare one-token words. All text between the needle and its query is held-out text. The needle
stands behind LEAD tokens, and the query d tokens behind the value. So the items of all distances share their beginning:
each row is read once up to its longest distance, and the queries of the nearer distances branch off on the way. That
makes a receipt affordable on a CPU. A longer distance is a longer item, unlike in `eval.recall`.

Legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tasks import TASKS
from data.tasks.draws import IntArray
from data.tasks.layout import RecallItem, clean_filler, item, task_size
from data.tasks.question import Task, TaskOptions
from data.tasks.vocabulary import RecallVocabulary, TokenizerLike, recall_vocabulary
from eval import stats
from eval.forward import batch_rows
from eval.haystack import Haystack
from eval.models import Examined
from eval.recall.order import VALUES
from model.cache import RingCache
from model.errors import UserError

LEAD = 32  # tokens before the needle: more than a model has global tokens
KEYS = 8
FIRST, STEP = 40, 40  # items per distance at first, and in each later round
SURE = 0.1, 0.9  # a distance gets no more items once its interval lies below or above
STATEMENT, QUESTION = " The secret word is", "\nWhat is the secret word? The secret word is"

Right = dict[int, NDArray[np.bool_]]  # for each distance, whether each item (n,) was answered right


class Phrases(RecallVocabulary):
    """Markers of common words. They may share tokens, and the text around them keeps these tokens."""

    def __post_init__(self) -> None:
        """No marker is reserved, so there is nothing to check."""

    @cached_property
    def reserved(self) -> IntArray:
        return np.array(sorted(self.values), dtype=np.int64)


@dataclass(frozen=True)
class Probe:
    """The items of one task on one text."""

    name: str
    task: Task
    vocabulary: RecallVocabulary
    haystack: Haystack
    seed: int
    distances: tuple[int, ...]
    options: TaskOptions = field(default_factory=lambda: TaskOptions(pairs=1))

    @property
    def chance(self) -> float:
        return self.task.chance(len(self.vocabulary.values), self.options)

    def item(self, i: int, distance: int) -> RecallItem:
        """Item `i`. Items of one number have the same tokens at all distances, up to the query."""
        before = task_size(self.task.name, self.vocabulary, self.options).before
        length = LEAD + before + self.distances[-1]
        filler = clean_filler(self.haystack.filler(i, length, self.seed), self.vocabulary)
        rng = np.random.default_rng([self.seed, list(TASKS).index(self.task.name), i])
        total = LEAD + before + distance
        return item(self.task.name, rng, filler, self.vocabulary, total, distance, self.options)


def open_probes(tokenizer: TokenizerLike, haystack: Haystack, distances: Sequence[int], seed: int) -> list[Probe]:
    """The tasks that fit the distances. UserError if none does, or if the tokenizer has too few one-token words."""
    words = recall_vocabulary(tokenizer, VALUES, KEYS)
    statement, question = (tuple(tokenizer.encode(text)) for text in (STATEMENT, QUESTION))
    phrases = Phrases(statement, question, words.values, words.plain)
    tasks = ("pair", "keys", words), ("question", "needle", phrases)
    probes = [Probe(name, TASKS[task], v, haystack, seed, tuple(sorted(distances))) for name, task, v in tasks]
    longest, least = max(distances), min(map(nearest, probes))
    if longest < least:
        raise UserError(f"the longest distance is {longest}, and a question needs {least} tokens; give a longer one")
    return [probe for probe in probes if nearest(probe) <= longest]


def nearest(probe: Probe) -> int:
    """The shortest distance at which the query fits behind the value."""
    return task_size(probe.task.name, probe.vocabulary, probe.options).nearest


@torch.inference_mode()
def answers(examined: Examined, probe: Probe, distances: Sequence[int], items: Sequence[int]) -> Iterator[Tensor]:
    """Yield for each distance, shortest first, the logits (B, V) behind the query of each item."""
    model, cache, read = examined.model, RingCache(examined.model.config), 0
    for distance in distances:
        batch = [probe.item(i, distance) for i in items]
        tokens = torch.tensor([one.tokens for one in batch], device=examined.device)
        query = len(batch[0].tokens) - query_tokens(probe)
        model(input_ids=tokens[:, read:query], past_key_values=cache, use_cache=True, logits_to_keep=1)
        branch, read = deepcopy(cache), query
        yield model(input_ids=tokens[:, query:], past_key_values=branch, use_cache=True, logits_to_keep=1).logits[:, -1]


def query_tokens(probe: Probe) -> int:
    return len(probe.vocabulary.query) + (probe.task.option is not None)


def measure(examined: Examined, probe: Probe, most: int, advance: Callable[[int], None]) -> Right:
    """Items in rounds until each distance is decided, or has `most` items; calls `advance` with the tokens read."""
    distances = [d for d in probe.distances if d >= nearest(probe)]
    right: Right = {d: np.empty(0, dtype=bool) for d in distances}
    done, open_distances = 0, distances
    while done < most and open_distances:
        numbers = range(done, min(most, done + (FIRST if done == 0 else STEP)))
        for distance, outcome in _round(examined, probe, open_distances, numbers, advance).items():
            right[distance] = np.concatenate([right[distance], outcome])
        done = numbers.stop
        open_distances = [d for d in open_distances if not decided(right[d])]
    return right


def decided(right: NDArray[np.bool_]) -> bool:
    """Whether the 95 % interval lies wholly below or wholly above the bounds of `SURE`."""
    low, high = stats.wilson(int(right.sum()), len(right))
    return high < SURE[0] or low > SURE[1]


def _round(
    examined: Examined, probe: Probe, distances: Sequence[int], numbers: range, advance: Callable[[int], None]
) -> Right:
    values = torch.tensor(probe.vocabulary.values)
    length = len(probe.item(0, distances[-1]).tokens)
    rows = min(len(numbers), batch_rows(examined, length))
    outcomes: dict[int, list[bool]] = {d: [] for d in distances}
    for start in range(numbers.start, numbers.stop, rows):
        items = range(start, min(start + rows, numbers.stop))
        correct = torch.tensor([probe.item(i, distances[0]).answer for i in items])
        for distance, logits in zip(distances, answers(examined, probe, distances, items), strict=True):
            chosen = values[logits.float().cpu()[:, values].argmax(-1)]
            outcomes[distance] += (chosen == correct).tolist()
        advance(len(items) * length)
    return {distance: np.array(outcome) for distance, outcome in outcomes.items()}


def row_of(right: NDArray[np.bool_]) -> dict[str, Any]:
    """n, correct, accuracy and the 95 % Wilson interval."""
    n, correct = len(right), int(right.sum())
    low, high = stats.wilson(correct, n)
    return {"n": n, "correct": correct, "accuracy": correct / n, "low": low, "high": high}


def paired(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> list[float]:
    """[difference, low, high] of two shares of right answers on the same items, in 95 % of cases.

    The interval is that of Agresti and Min (2005): Wald's, with half an item more in each cell of the 2 x 2 table.

    >>> [round(x, 3) for x in paired(np.ones(50, dtype=bool), np.zeros(50, dtype=bool))]
    [-1.0, -1.0, -0.897]
    """
    n = min(len(before), len(after))
    lost, gained = int((before[:n] & ~after[:n]).sum()), int((~before[:n] & after[:n]).sum())
    middle, total = (gained - lost) / (n + 2), n + 2
    margin = 1.96 * ((gained + lost + 1 - (gained - lost) ** 2 / total) ** 0.5) / total
    return [(gained - lost) / n, max(-1.0, middle - margin), min(1.0, middle + margin)]
