"""The items of a task as batches of counterfactual pairs, and what was seen on them.

Both members of a pair run in the same row of batches of one shape. A task's values are the answers it can have: right
means that among them the right one has the highest logit. Legend: B rows, T positions, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tasks import TASKS, need_keys
from data.tasks.layout import RecallItem, clean_filler, item, needle_tokens, task_size
from data.tasks.question import TaskOptions
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from eval import stats
from eval.forward import Reader
from eval.haystack import Haystack
from eval.models import Examined
from model.errors import UserError

IntArray = NDArray[np.int64]
ALIGNED = 32  # tokens: of such a length the blocks of attention need no padding, which is a third faster
DISTRACTORS = 4  # older needles of an item of that control
SIZE_NAMES = {"pairs": "keys", "span_pairs": "span-pairs", "hops": "hops", "rules": "rules"}  # as the command line says


@dataclass(frozen=True)
class Entry:
    """One entry of recall.json: a task at one size of its questions."""

    name: str
    task: str
    options: TaskOptions

    @property
    def size(self) -> dict[str, int]:
        """What the task's rows say about the size, e.g. {"keys": 4}; empty for needles."""
        option = TASKS[self.task].option
        return {SIZE_NAMES[option].replace("-", "_"): getattr(self.options, option)} if option else {}


def entries(tasks: Iterable[str], trained: TaskOptions, sizes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """The tasks at the sizes they were trained on, or at each of `sizes` (option: sizes), which their names then tell.

    >>> [entry.name for entry in entries(["needle", "keys"], TaskOptions(), {"pairs": (1, 16)})]
    ['needle', 'keys-1', 'keys-16']
    """
    found = []
    for task in tasks:
        option = TASKS[task].option
        if option is None or option not in sizes:
            found.append(Entry(task, task, trained))
        else:
            found += [Entry(f"{task}-{n}", task, replace(trained, **{option: n})) for n in sizes[option]]
    return found


def trained_tasks(examined: Examined) -> dict[str, float]:
    return dict(examined.settings.get("recall", {}).get("tasks", {}))


def trained_options(examined: Examined) -> TaskOptions:
    return TaskOptions(**examined.settings.get("recall", {}).get("questions", {}))


def n_values_of(examined: Examined) -> int:
    return int(examined.settings.get("recall", {}).get("values", 32))


def n_keys_of(examined: Examined) -> int:
    return int(examined.settings.get("recall", {}).get("keys", 32))


@dataclass
class Tally:
    """What was seen at one distance, item by item, in the order of the items."""

    correct: list[bool] = field(default_factory=list)
    pair: list[bool] = field(default_factory=list)
    free: list[bool] = field(default_factory=list)
    identical: list[bool] = field(default_factory=list)
    nll_bits: list[float] = field(default_factory=list)
    blind_correct: list[bool] = field(default_factory=list)
    blind_nll_bits: list[float] = field(default_factory=list)
    distracted: list[bool] = field(default_factory=list)  # with distractors; empty without that control

    def add(self, other: "Tally") -> None:
        for each in fields(self):
            getattr(self, each.name).extend(getattr(other, each.name))

    def row(self, distance: int, window: int | None, size: dict[str, int]) -> dict[str, Any]:
        n, correct = len(self.correct), sum(self.correct)
        low, high = stats.wilson(correct, n)
        row = {
            "distance": distance,
            "distance_in_windows": distance / window if window else None,
            "n": n,
            "correct": correct,
            "accuracy": correct / n,
            "low": low,
            "high": high,
            "pair_accuracy": sum(self.pair) / n,
            "identical_pairs": sum(self.identical) / n,
            "free_accuracy": sum(self.free) / n,
            "delta_nll_bits": float(np.mean(self.blind_nll_bits) - np.mean(self.nll_bits)),
            "nll_bits": float(np.mean(self.nll_bits)),
            "accuracy_without_needle": sum(self.blind_correct) / n,
        }
        if self.distracted:
            row["accuracy_with_distractors"] = sum(self.distracted) / n
        return row | size


@dataclass(frozen=True)
class Bench:
    """One entry on one model: everything that stays the same over the distances."""

    examined: Examined
    haystack: Haystack
    vocabulary: RecallVocabulary
    entry: Entry
    total_length: int
    seed: int
    distractors: int = 0

    @property
    def chance(self) -> float:
        return TASKS[self.entry.task].chance(len(self.vocabulary.values), self.entry.options)

    def distances(self, wanted: Iterable[int]) -> list[int]:
        """Those that the task can have. UserError when none is left."""
        nearest = task_size(self.entry.task, self.vocabulary, self.entry.options).nearest
        if not (kept := [d for d in wanted if d >= nearest]):
            raise UserError(f"--distances: the nearest that {self.entry.name} can have is {nearest}; add a longer one")
        return kept

    def items(self, distance: int, indices: Sequence[int], distractors: int = 0) -> list[RecallItem]:
        """Item `i` is a pure function of (seed, task, i, distance); its haystack of (seed, task, i) alone."""
        task, number = self.entry.task, list(TASKS).index(self.entry.task)
        made = []
        for i in indices:
            rng = np.random.default_rng([self.seed, number, i, distance])
            made.append(
                item(
                    task, rng, self.filler(i), self.vocabulary, self.total_length, distance, self.entry.options,
                    distractors,
                )
            )  # fmt: skip
        return made

    def filler(self, i: int) -> IntArray:
        """(T,) haystack of item `i`, without the tokens that needles and queries are made of."""
        if TASKS[self.entry.task].noise:
            return np.random.default_rng([self.seed, 11, i]).choice(self.vocabulary.plain, self.total_length)
        return clean_filler(self.haystack.filler(i, self.total_length, self.seed), self.vocabulary)


def open_benches(
    examined: Examined,
    haystack: Haystack,
    found: Sequence[Entry],
    distances: Sequence[int],
    seed: int,
    distractors: int = 0,
) -> list[Bench]:
    """A bench per entry; all items have one length. UserError where the model can't read so far."""
    vocabularies = [_vocabulary(examined, entry) for entry in found]
    farthest = max(distances)
    margin = max(_margin(*each, farthest, distractors) for each in zip(found, vocabularies, strict=True))
    total_length = farthest + margin
    total_length += -total_length % ALIGNED
    if examined.max_tokens and total_length > examined.max_tokens:
        raise UserError(
            f"--distances {farthest}: items would be {total_length:,} tokens long and this model reads "
            f"{examined.max_tokens:,}; give distances up to {examined.max_tokens // ALIGNED * ALIGNED - margin:,}"
        )
    return [
        Bench(examined, haystack, words, entry, total_length, seed, 0 if TASKS[entry.task].alone else distractors)
        for entry, words in zip(found, vocabularies, strict=True)
    ]


def _vocabulary(examined: Examined, entry: Entry) -> RecallVocabulary:
    """Keys stay out of the haystack of all tasks of a run that was trained on them, and of tasks that use them.

    UserError where the question is larger than the vocabulary.
    """
    n_values, n_keys = n_values_of(examined), n_keys_of(examined)
    task = TASKS[entry.task]
    most = task.most(n_values, n_keys)
    if task.option is not None and most is not None and getattr(entry.options, task.option) > most:
        raise UserError(
            f"--{SIZE_NAMES[task.option]} {getattr(entry.options, task.option)}: {entry.task} allows at most {most} "
            f"with {n_values} values and {n_keys} keys; lower it"
        )
    keyed = need_keys([entry.task, *trained_tasks(examined)])
    return recall_vocabulary(examined.tokenizer, n_values, n_keys if keyed else 0)


def _margin(entry: Entry, vocabulary: RecallVocabulary, farthest: int, distractors: int) -> int:
    """Tokens of an item besides its farthest distance."""
    older = 0 if TASKS[entry.task].alone else distractors * needle_tokens(entry.task, vocabulary, entry.options)
    row = task_size(entry.task, vocabulary, entry.options).row(farthest)
    return row - farthest + older + len(vocabulary.query) + 7


# ------------------------------------------------------------------------------------------------- what is seen


def measure_batch(bench: Bench, read: Reader, distances: Sequence[int], batch: Sequence[int]) -> dict[int, Tally]:
    """The items of one batch at every distance."""
    tallies: dict[int, Tally] = {}
    blind_rows = blind = None
    for distance in distances:
        items = bench.items(distance, batch)
        at = items[0].query_position
        first, second, without = pair_rows(items)
        if blind_rows is None or not torch.equal(blind_rows, without):  # that of a needle is the same at all distances
            blind_rows, blind = without, read(without, at)
        assert blind is not None
        tally = tallies[distance] = Tally()
        judge(bench, items, read(first, at), read(second, at), blind, tally)
        if bench.distractors:
            items = bench.items(distance, batch, bench.distractors)
            tally.distracted += right_of(bench, items, read(pair_rows(items)[0], items[0].query_position))
    return tallies


def pair_rows(items: list[RecallItem]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) three times: with the value, with its counterfactual (one token differs), and without the needle."""
    parts = zip(*((made.tokens, made.counterfactual_tokens, made.blind_tokens) for made in items), strict=True)
    first, second, blind = (torch.tensor(part) for part in parts)
    return first, second, blind


def right_of(bench: Bench, items: list[RecallItem], logits: Tensor) -> list[bool]:
    """Whether among the values each item's answer has the highest of its logits (B, V)."""
    values = torch.tensor(bench.vocabulary.values)
    chosen = values[logits[:, values].argmax(-1)].tolist()
    return [token == made.answer for token, made in zip(chosen, items, strict=True)]


def judge(bench: Bench, items: list[RecallItem], first: Tensor, second: Tensor, blind: Tensor, tally: Tally) -> None:
    """Add the items' outcomes: logits (B, V) with value v, with v', and without a needle."""
    values = torch.tensor(bench.vocabulary.values)
    counter = values[second[:, values].argmax(-1)].tolist()
    bits, blind_bits = (-torch.log_softmax(x, -1) / math.log(2) for x in (first, blind))
    tally.correct += (right := right_of(bench, items, first))
    tally.blind_correct += right_of(bench, items, blind)
    for r, made in enumerate(items):
        tally.pair.append(right[r] and counter[r] == made.counterfactual_answer)
        tally.free.append(int(first[r].argmax()) == made.answer)
        tally.identical.append(bool(torch.equal(first[r], second[r])))
        tally.nll_bits.append(float(bits[r, made.answer]))
        tally.blind_nll_bits.append(float(blind_bits[r, made.answer]))
