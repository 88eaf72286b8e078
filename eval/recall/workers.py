"""Who measures the batches: this process, or on a CPU a pool of processes with one thread each.

Small matrix products gain little from several threads, so a pool is faster where the work is long.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch

from eval.forward import Reader
from eval.haystack import open_haystack
from eval.models import Examined, load_model
from eval.recall.items import TaskItems, open_items
from eval.recall.order import SCREENING, Order
from eval.recall.outcomes import Outcomes, measure_batch

LONG_WORK = 2_000_000  # tokens; for less, starting processes and compiling takes longer than it saves

Runner = Callable[[TaskItems, Sequence[int], range], Iterable[list[Outcomes]]]


@contextmanager
def batch_runner(order: Order, examined: Examined, entries: list[TaskItems]) -> Iterator[Runner]:
    """Yield a function that measures a range of items at some distances: one list of `Outcomes` per batch, in order."""
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
