"""Times our function and its peers side by side, and turns the medians into the rows of bench.json.

A benchmark gives `compare` a dictionary of functions without arguments: "ours", and each peer by its name. After a
warm-up they run in turns in one process, so that other load on the machine slows all of them alike.
"""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training.planning.memory import PeakBytes
from training.settings.schema import Settings

OURS, ALONE = "ours", "–"
WARM_CALLS, WARM_SECONDS = 5, 2.0
Work = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """What the benchmarks of one call share. `precision` is "fp32" or "bf16"."""

    settings: Settings
    device: torch.device
    precision: str
    rounds: int


@dataclass(frozen=True)
class Row:
    """One row of bench.json. Seconds are medians; `ratio` is peer_s / ours_s; `limit` is the least ratio aimed at."""

    bench: str
    case: str
    peer: str
    ours_s: float
    peer_s: float | None
    ratio: float | None
    limit: float | None
    ours_bytes: int | None
    peer_bytes: int | None
    dtype: str
    threads: int
    note: str = ""


def compare(
    bench: str,
    case: str,
    works: Mapping[str, Work],
    rounds: int,
    dtype: str,
    limits: Mapping[str, float] | None = None,
    bytes_of: Callable[[Any], int | None] = lambda work: None,
) -> list[Row]:
    """Time the functions of one case; returns a row for each peer, or one row if ours runs alone.

    `limits` holds the least ratio aimed at, by peer. `bytes_of` is called with each function that could run.
    """
    seconds, failures = alternate(works, rounds)
    sizes = {name: bytes_of(works[name]) for name in seconds}
    notes, ours = {ALONE: "alone"} | failures, seconds[OURS]

    def row(peer: str) -> Row:
        theirs, limit = seconds.get(peer), (limits or {}).get(peer)
        ratio = None if theirs is None else theirs / ours
        size, note, threads = sizes.get(peer), notes.get(peer, ""), torch.get_num_threads()
        return Row(bench, case, peer, ours, theirs, ratio, limit, sizes[OURS], size, dtype, threads, note)

    return [row(peer) for peer in works if peer != OURS] or [row(ALONE)]


def alternate(works: Mapping[str, Work], rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each function, run in turns; and for each that can't run here, the reason."""
    failures = {name: reason for name, work in works.items() if (reason := why_not(work))}
    if OURS in failures:
        raise RuntimeError(f"our own side of the benchmark failed: {failures[OURS]}")
    seconds: dict[str, list[float]] = {name: [] for name in works if name not in failures}
    gc.collect()
    for _ in range(rounds):
        for name, times in seconds.items():
            _synchronize()
            began = time.perf_counter()
            works[name]()
            _synchronize()
            times.append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}, failures


def why_not(work: Work) -> str:
    """Warm up; returns the reason why `work` can't run here (no kernel, memory or compiler), or "".

    Short functions run several times: the first calls of a process also pay for new pages of memory.
    """
    began = time.perf_counter()
    try:
        for _ in range(WARM_CALLS):
            work()
            if time.perf_counter() - began > WARM_SECONDS:
                break
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError, MemoryError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return ""


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Work) -> int:
    """The most bytes of new tensors that are alive at once during a call of `work`."""
    with PeakBytes() as watched:
        work()
    return watched.peak


def check_scores(size: int, limit: int) -> None:
    """Raises MemoryError, which leaves a peer out, where its dense scores need more than `limit` bytes."""
    if size > limit:
        raise MemoryError(f"its dense scores need {size / 2**30:.1f} GiB, more than this benchmark allows")


def curves(rows: list[Row], axis: str, quantity: str) -> dict[str, dict[int, float]]:
    """{"ours" or peer: {n or W: value}} from the n=… and W=… of the cases.

    `axis` is "n" or "W"; the other of the two is fixed at its most frequent value. `quantity` is "s" or "bytes".
    """
    cases = [(dict(re.findall(r"(\w)=(\d+)", row.case)), row) for row in rows]
    other = "W" if axis == "n" else "n"
    fixed = statistics.mode(sizes.get(other) for sizes, _ in cases)
    values: dict[str, dict[int, float]] = {}
    for sizes, row in cases:
        for name, value in (OURS, getattr(row, f"ours_{quantity}")), (row.peer, getattr(row, f"peer_{quantity}")):
            if axis in sizes and sizes.get(other) == fixed and value:
                values.setdefault(name, {})[int(sizes[axis])] = value
    return {name: dict(sorted(points.items())) for name, points in values.items()}


def exponents(rows: list[Row], what: str) -> Iterator[str]:
    """Lines with the slopes of log seconds and log bytes against log n and log W: 1 is linear, 0 constant."""
    for axis in ("n", "W"):
        for measured, quantity in (("time", "s"), ("peak bytes", "bytes")):
            for name, points in curves(rows, axis, quantity).items():
                if len(points) >= 3:
                    slope = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]
                    yield f"  {name}, {what}: {measured} ~ {axis}^{slope:.2f}"
