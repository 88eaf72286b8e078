"""Who measures batches of items: this process, or a pool of processes of one thread each."""

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from eval.forward import LONG_WORK, Reader
from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from eval.recall.items import (
    DISTRACTORS,
    Bench,
    Tally,
    entries,
    measure_batch,
    open_benches,
    trained_options,
)

SCREENING = 200  # items a distance; more only where the curve bends


@dataclass(frozen=True)
class Order:
    """What is asked for, in words that another process understands."""

    model: str
    device: str | None
    text: str | None
    data: str | None
    tasks: tuple[str, ...]
    distances: tuple[int, ...]
    n: int
    seed: int
    precision: str
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # option of a task: sizes, each an entry of its own
    controls: tuple[str, ...] = ()

    def benches(self, examined: Examined, haystack: Haystack) -> list[Bench]:
        found = entries(self.tasks, trained_options(examined), dict(self.sizes))
        older = DISTRACTORS if "distractors" in self.controls else 0
        return open_benches(examined, haystack, found, self.distances, self.seed, older)


@dataclass(frozen=True)
class Crew:
    """This process, or a pool, which on a CPU is faster than threads that share every small matrix product."""

    read: Reader
    pool: Executor | None = None

    def measure(
        self, bench: Bench, distances: Sequence[int], batches: list[Sequence[int]]
    ) -> Iterable[dict[int, Tally]]:
        """What `measure_batch` gives for each batch, in order."""
        if self.pool is None:
            return (measure_batch(bench, self.read, distances, batch) for batch in batches)
        return self.pool.map(partial(_work, bench.entry.name, distances), batches)


_benches: dict[str, tuple[Bench, Reader]] = {}  # of a process of the pool


def _start_worker(order: Order) -> None:
    torch.set_num_threads(1)
    examined = load_model(order.model, order.device)
    benches = order.benches(examined, open_haystack(examined, order.text, order.data))
    read = Reader(examined, benches[0].total_length, order.precision, compiled=True)
    _benches.update({bench.entry.name: (bench, read) for bench in benches})


def _work(entry: str, distances: Sequence[int], batch: Sequence[int]) -> dict[int, Tally]:
    return measure_batch(*_benches[entry], distances, batch)


@contextmanager
def assemble(order: Order, examined: Examined, benches: list[Bench]) -> Iterator[Crew]:
    """Processes where the work is long, the device a CPU with several threads to share out, and the model ours."""
    total_length = benches[0].total_length
    tokens = len(benches) * min(order.n, SCREENING) * (2 * len(order.distances) + 1) * total_length
    long, threads = tokens >= LONG_WORK and examined.ours, torch.get_num_threads()
    if not (long and threads > 1 and examined.device.type == "cpu"):
        yield Crew(Reader(examined, total_length, order.precision, compiled=long))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, context, _start_worker, (order,)) as pool:
        yield Crew(Reader(examined, total_length, order.precision, compiled=False), pool)
