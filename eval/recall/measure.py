"""The measurement itself: from an order to what recall.json holds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data.tasks import TASKS
from eval import stats
from eval.forward import Reader, generate_one, last_logits, last_logits_through_ring
from eval.haystack import Haystack
from eval.models import Examined
from eval.reach.gradient import untrained
from eval.recall.distances import near_transition
from eval.recall.items import DISTRACTORS, Bench, Tally, pair_rows, right_of
from eval.recall.workers import SCREENING, Crew, Order, assemble

CONTROLS = ("distractors", "untrained")
CONTROL_DISTANCES, CONTROL_ITEMS = 12, 100  # of the untrained model, which has nothing to show


def measure(examined: Examined, haystack: Haystack, order: Order, console: Console | None = None) -> dict[str, Any]:
    """Everything recall.json holds."""
    console = console or Console(quiet=True)
    benches = order.benches(examined, haystack)
    with assemble(order, examined, benches) as crew:
        results = {
            bench.entry.name: measure_task(
                bench, crew, bench.distances(order.distances), order.n, console, examined.reach
            )
            for bench in benches
        }
    if "untrained" in order.controls:
        twin = replace(examined, model=untrained(examined))
        read = Reader(twin, benches[0].total_length, order.precision, compiled=False)
        for bench in benches:
            results[bench.entry.name]["untrained"] = measure_untrained(bench, read, order)
    facts = {"seed": order.seed, "precision": order.precision, "haystack": haystack.name}
    facts |= {"distractors": DISTRACTORS} if "distractors" in order.controls else {}
    return examined.header() | facts | {"tasks": results}


def measure_task(
    bench: Bench, crew: Crew, distances: list[int], n: int, console: Console, reach: int | None = None
) -> dict[str, Any]:
    """The task's entry in recall.json: screening with up to 200 items, then up to n where the curve bends."""
    tallies: dict[int, Tally] = {}
    window, chance, task = bench.examined.window, bench.chance, TASKS[bench.entry.task]
    screening = list(range(min(n, SCREENING)))

    def rows() -> list[dict[str, Any]]:
        return [tallies[d].row(d, window, bench.entry.size) for d in distances]

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        title = f"{bench.entry.name}, {len(distances)} distances"
        bar = progress.add_task(title, total=len(distances) * len(screening))
        run_batches(bench, crew, distances, screening, tallies, lambda done: progress.advance(bar, done))
        wanted = {d for d in near_transition(rows(), chance, window) if reach is None or d <= reach}
        rest = list(range(len(screening), n))
        progress.update(bar, total=len(distances) * len(screening) + len(wanted) * len(rest))
        if wanted and rest:
            run_batches(bench, crew, sorted(wanted), rest, tallies, lambda done: progress.advance(bar, done))
    head = {"task": bench.entry.task, "chance": chance, "chance_in_context": 1 / task.seen(bench.entry.options)}
    found = rows()
    head |= {"total_length": bench.total_length, "cache_bytes": bench.examined.cache_bytes(bench.total_length)}
    result = head | bench.entry.size | {"rows": found} | horizons(found, reach)
    with torch.compiler.set_stance("force_eager"):
        paths = check_paths(bench, distances)
    return result | {"paths": paths} | beyond_reach(found, reach)


def run_batches(
    bench: Bench,
    crew: Crew,
    distances: Sequence[int],
    indices: Sequence[int],
    tallies: dict[int, Tally],
    advance: Callable[[int], None],
) -> None:
    """Measure the items `indices` at every distance."""
    batches = [indices[start : start + crew.read.rows] for start in range(0, len(indices), crew.read.rows)]
    for batch, found in zip(batches, crew.measure(bench, distances, batches), strict=True):
        for distance, tally in found.items():
            tallies.setdefault(distance, Tally()).add(tally)
            advance(len(batch))


def measure_untrained(bench: Bench, read: Reader, order: Order) -> list[dict[str, Any]]:
    """The same items on the model before its first step: rows at a few distances."""
    distances = bench.distances(order.distances)
    rows = []
    for distance in distances[:: max(1, len(distances) // CONTROL_DISTANCES)]:
        items = bench.items(distance, range(min(order.n, CONTROL_ITEMS)))
        parts = [items[start : start + read.rows] for start in range(0, len(items), read.rows)]
        right = [x for part in parts for x in right_of(bench, part, read(pair_rows(part)[0], part[0].query_position))]
        low, high = stats.wilson(sum(right), len(right))
        counts = {"n": len(right), "correct": sum(right), "accuracy": sum(right) / len(right)}
        rows.append({"distance": distance} | counts | {"low": low, "high": high})
    return rows


def horizons(rows: list[dict[str, Any]], reach: int | None) -> dict[str, Any]:
    """H90, H50 in tokens and U90, U50 as shares of R, with 95 % intervals."""
    distances, correct, n = ([row[key] for row in rows] for key in ("distance", "correct", "n"))
    out: dict[str, Any] = {}
    for name, horizon in (("90", stats.h90(distances, correct, n)), ("50", stats.h50(distances, correct, n))):
        share = horizon.over(reach)
        out |= {
            f"h{name}": horizon.value,
            f"h{name}_interval": [horizon.low, horizon.high],
            f"h{name}_censored": horizon.censored,
            f"u{name}": share and share.value,
            f"u{name}_interval": share and [share.low, share.high],
        }
    return out


def beyond_reach(rows: list[dict[str, Any]], reach: int | None) -> dict[str, Any]:
    """How many pairs lie beyond the reach, and whether all of them gave the same bits."""
    beyond = [row for row in rows if reach is not None and row["distance"] > reach]
    return {
        "pairs_beyond_reach": sum(row["n"] for row in beyond),
        "identical_beyond_reach": all(row["identical_pairs"] == 1.0 for row in beyond) if beyond else None,
    }


def check_paths(bench: Bench, distances: list[int], rows: int = 4) -> dict[str, Any]:
    """The same items in float32 by one full forward pass, through the ring, and generated: do they agree?

    An item ends at its query here: what follows one that stands earlier can't be read from it.
    """
    forced: list[int] = []
    ringed: list[int] = []
    written: list[int] = []
    right: list[int] = []
    difference = 0.0
    for distance in distances[:: max(1, len(distances) // 12)]:
        items = bench.items(distance, range(rows))
        end = items[0].query_position + 1
        first = pair_rows(items)[0][:, :end]
        full = last_logits(bench.examined, first)
        ring = last_logits_through_ring(bench.examined, first, end - 1 - distance)
        difference = max(difference, float((full - ring).abs().max()))
        forced += full.argmax(-1).tolist()
        ringed += ring.argmax(-1).tolist()
        right += [made.answer for made in items]
        if len(written) < 6 * rows:
            written += generate_one(bench.examined, first)
    return {
        "n": len(forced),
        "teacher_forced_accuracy": float(np.mean([a == b for a, b in zip(forced, right, strict=True)])),
        "ring_accuracy": float(np.mean([a == b for a, b in zip(ringed, right, strict=True)])),
        "agree": sum(a == b for a, b in zip(forced, ringed, strict=True)),
        "max_abs_logit_difference": difference,
        "generated_n": len(written),
        "generated_agree": sum(a == b for a, b in zip(written, forced, strict=False)),
        "generated_accuracy": float(np.mean([a == b for a, b in zip(written, right, strict=False)])),
    }
