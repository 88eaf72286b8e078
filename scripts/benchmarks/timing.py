"""Times our function and its peers side by side, and turns the medians into the rows of bench.json.

A benchmark gives `compare` a dictionary of functions without arguments: "ours", and each peer by its name. After a
warm-up they run in turns in one process, so that other load on the machine slows all of them alike.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from model.errors import UserError
from scripts.generate import check_device
from training.planning.memory import PeakBytes
from training.processes import allocator, precision
from training.settings.schema import Settings

OURS, ALONE = "ours", "–"
WARM_CALLS, WARM_SECONDS = 5, 2.0  # the first calls of a process also pay for new pages of memory
Work = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """What the benchmarks of one call share. `precision` is "fp32" or "bf16"."""

    settings: Settings
    device: torch.device
    precision: str
    rounds: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def peak_bytes(self, work: Work) -> int:
        return peak_bytes(work, self.device.type)


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
    bench: str, case: str, works: Mapping[str, Work], rounds: int, dtype: str,
    limits: Mapping[str, float] | None = None, bytes_of: Callable[[Any], int | None] = lambda work: None,
    unwatched: str = "",
) -> list[Row]:  # fmt: skip
    """Time the functions of one case in turns; returns a row for each peer, or one row if ours runs alone.

    `limits` holds the least ratio aimed at, by peer. `bytes_of` is called with each function that could run, except
    that of `unwatched`. The note of a row says why its peer can't run here. Raises RuntimeError if ours can't.
    """
    notes = {name: why_not(work) for name, work in works.items()}
    if notes[OURS]:
        raise RuntimeError(f"our own side of the benchmark failed: {notes[OURS]}")
    seconds: dict[str, list[float]] = {name: [] for name, note in notes.items() if not note}
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    for name in [*seconds] * rounds:
        synchronize()
        began = time.perf_counter()
        works[name]()
        synchronize()
        seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    sizes = {name: bytes_of(works[name]) for name in seconds if name != unwatched}
    ours, limits, threads = medians[OURS], limits or {}, torch.get_num_threads()
    rows = []
    for peer in [name for name in works if name != OURS] or [ALONE]:
        ratio = medians[peer] / ours if peer in medians else None
        measured = (ours, medians.get(peer), ratio, limits.get(peer), sizes[OURS], sizes.get(peer))
        rows.append(Row(bench, case, peer, *measured, dtype, threads, notes.get(peer, "alone")))
    return rows


def why_not(work: Work) -> str:
    """Warm up; returns the reason why `work` can't run here (no kernel, memory or compiler), or ""."""
    began = time.perf_counter()
    try:
        for _ in range(WARM_CALLS):
            work()
            if time.perf_counter() - began > WARM_SECONDS:
                break
    except (UserError, RuntimeError, ValueError, TypeError, ImportError, MemoryError) as error:
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """The kind of an error and the first line of its message.

    >>> reason(RuntimeError("no kernel"))
    'RuntimeError: no kernel'
    """
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def peak_bytes(work: Work, device_type: str = "cpu") -> int:
    """The most bytes of new tensors that are alive at once during a call of `work`.

    A GPU's allocator counts them, and the scratch memory of kernels too.
    """
    if device_type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as watched:
        work()
    return watched.peak


def set_up(device: str | None, threads: int | None = None) -> torch.device:
    """Prepare this process as `train.py` does, and return the device: by default a GPU if there is one.

    `torch.compile` makes code for each shape. By default it would stop compiling after 8 of them.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device(chosen.type)
    allocator.keep_freed_memory()
    precision.set_up_threads(threads, local_processes=1)
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 128
    logging.disable_progress_bar()
    return chosen
