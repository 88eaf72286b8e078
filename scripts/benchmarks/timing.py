"""Timing of several works side by side, and the rows that the benchmarks write."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from training.planning.memory import PeakBytes

OURS = "ours"
WARM_CALLS, WARM_SECONDS = 5, 2.0
Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of bench.json. Seconds are medians; `ratio` = peer_s / ours_s; `limit` is the least ratio asked for."""

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


def alternate(works: Mapping[str, Work], rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each work, run in turns so that a busy machine hits all alike; and why one could not run."""
    refused = {name: reason for name, work in works.items() if (reason := why_not(work))}
    if OURS in refused:
        raise RuntimeError(f"our own side of the benchmark failed: {refused[OURS]}")
    seconds: dict[str, list[float]] = {name: [] for name in works if name not in refused}
    gc.collect()
    for _ in range(rounds):
        for name, past in seconds.items():
            _synchronize()
            began = time.perf_counter()
            works[name]()
            _synchronize()
            past.append(time.perf_counter() - began)
    return {name: statistics.median(past) for name, past in seconds.items()}, refused


def why_not(work: Work) -> str:
    """Warm up: empty, or the reason it can't run here (a peer may lack a kernel, memory or a compiler).

    Short works run several times: until a process has the memory that it needs, its pages are part of the time.
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
    with PeakBytes() as watched:
        work()
    return watched.peak


def rows_of(
    bench: str,
    case: str,
    works: Mapping[str, Work],
    rounds: int,
    dtype: str,
    limits: Mapping[str, float] | None = None,
    held: Mapping[str, int | None] | None = None,
) -> list[Row]:
    """Time all works of a case and put each peer beside ours."""
    seconds, refused = alternate(works, rounds)
    held, limits, ours = held or {}, limits or {}, seconds[OURS]
    return [
        Row(
            bench=bench,
            case=case,
            peer=peer,
            ours_s=ours,
            peer_s=seconds.get(peer),
            ratio=seconds[peer] / ours if peer in seconds else None,
            limit=limits.get(peer),
            ours_bytes=held.get(OURS),
            peer_bytes=held.get(peer),
            dtype=dtype,
            threads=torch.get_num_threads(),
            note=refused.get(peer, ""),
        )
        for peer in works
        if peer != OURS
    ]
