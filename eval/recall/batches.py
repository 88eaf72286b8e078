"""Batches of items: what is observed on them, and who runs them: this process, or a pool of one-thread processes.

An answer is right if, among the values of the task, it has the highest logit. Both members of a counterfactual pair run
in the same row of batches of one shape, so that what is equal in theory is equal in every bit.

Legend: B items of a batch, T positions, V vocabulary.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tasks.layout import RecallItem
from eval import stats
from eval.forward import Reader
from eval.haystack import open_haystack
from eval.models import Examined, load_model
from eval.recall.items import TaskItems, open_items
from eval.recall.order import SCREENING, Order

LONG_WORK = 2_000_000  # tokens; for less, starting processes and compiling takes longer than it saves

Outcomes = dict[str, NDArray[np.float64]]  # at one distance, arrays (items,) by name: see `judge`
Runner = Callable[[TaskItems, Sequence[int], range], Iterable[list[Outcomes]]]


def measure_batch(asked: TaskItems, read: Reader, distances: Sequence[int], batch: Sequence[int]) -> list[Outcomes]:
    """The outcomes of the items with the numbers `batch`, one `Outcomes` per distance."""
    outcomes = []
    blind_tokens, blind = torch.empty(0), torch.empty(0)
    for distance in distances:
        items = asked.items(distance, batch)
        at = items[0].query_position
        fields = ("tokens", "counterfactual_tokens", "blind_tokens")
        first, second, without = (torch.tensor([getattr(item, name) for item in items]) for name in fields)
        if not torch.equal(blind_tokens, without):  # needles have the same blind tokens at all distances
            blind_tokens, blind = without, read(without, at)
        outcome = judge(asked, items, read(first, at), read(second, at), blind)
        if asked.distractors:
            items = asked.items(distance, batch, asked.distractors)
            logits = read(torch.tensor([item.tokens for item in items]), items[0].query_position)
            outcome["accuracy_with_distractors"] = _is_right(asked, items, logits).double().numpy()
        outcomes.append(outcome)
    return outcomes


def judge(asked: TaskItems, items: list[RecallItem], first: Tensor, second: Tensor, blind: Tensor) -> Outcomes:
    """The outcomes (B,) of items, from their logits (B, V) with value v, with v', and without a needle."""
    answers = torch.tensor([[item.answer] for item in items])
    other_answers = torch.tensor([item.counterfactual_answer for item in items])
    right = _is_right(asked, items, first)
    bits, blind_bits = (-torch.log_softmax(logits, -1) / math.log(2) for logits in (first, blind))
    outcomes = {
        "accuracy": right,
        "pair_accuracy": right & (_chosen(asked, second) == other_answers),
        "identical_pairs": (first == second).all(-1),
        "free_accuracy": first.argmax(-1) == answers[:, 0],
        "accuracy_without_needle": _is_right(asked, items, blind),
        "nll_bits": bits.gather(1, answers)[:, 0],
        "blind_nll_bits": blind_bits.gather(1, answers)[:, 0],
    }
    return {name: values.double().numpy() for name, values in outcomes.items()}


def _is_right(asked: TaskItems, items: list[RecallItem], logits: Tensor) -> Tensor:
    return _chosen(asked, logits) == torch.tensor([item.answer for item in items])


def _chosen(asked: TaskItems, logits: Tensor) -> Tensor:
    """(B,) the value with the highest logit."""
    values = torch.tensor(asked.vocabulary.values)
    return values[logits[:, values].argmax(-1)]


def summary(parts: Sequence[Outcomes], distance: int, window: int | None) -> dict[str, Any]:
    """The row of recall.json for one distance, from the outcomes of its batches."""
    outcomes = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    mean = {name: float(np.mean(values)) for name, values in outcomes.items()}
    n, correct = len(outcomes["accuracy"]), int(outcomes["accuracy"].sum())
    low, high = stats.wilson(correct, n)
    head = {"distance": distance, "distance_in_windows": distance / window if window else None}
    head |= {"n": n, "correct": correct, "low": low, "high": high}
    return head | {"delta_nll_bits": mean.pop("blind_nll_bits") - mean["nll_bits"]} | mean


@contextmanager
def batch_runner(order: Order, examined: Examined, entries: list[TaskItems]) -> Iterator[Runner]:
    """Yield a function that measures a range of items at some distances: one list of `Outcomes` per batch, in order.

    Small matrix products gain little from several threads, so long work on a CPU goes to a pool of processes.
    """
    total_length, threads = entries[0].total_length, torch.get_num_threads()
    tokens = len(entries) * min(order.n, SCREENING) * (2 * len(order.distances) + 1) * total_length
    long = tokens >= LONG_WORK and examined.ours
    pooled = long and threads > 1 and examined.device.type == "cpu"
    read = Reader(examined, total_length, order.precision, compiled=long and not pooled)

    def batches(indices: range) -> list[range]:
        return [indices[i : i + read.rows] for i in range(0, len(indices), read.rows)]

    if not pooled:
        yield lambda asked, distances, indices: map(partial(measure_batch, asked, read, distances), batches(indices))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, context, _start_worker, (order,)) as pool:
        yield lambda asked, distances, indices: pool.map(partial(_work, asked.name, distances), batches(indices))


_worker: dict[str, tuple[TaskItems, Reader]] = {}  # by name of the entry, in a process of the pool


def _start_worker(order: Order) -> None:
    torch.set_num_threads(1)
    examined = load_model(order.model, order.device)
    entries = open_items(examined, open_haystack(examined, order.text, order.data), order)
    read = Reader(examined, entries[0].total_length, order.precision, compiled=True)
    _worker.update({entry.name: (entry, read) for entry in entries})


def _work(name: str, distances: Sequence[int], batch: range) -> list[Outcomes]:
    return measure_batch(*_worker[name], distances, batch)
