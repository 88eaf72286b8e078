"""The measurement: from an order to what recall.json holds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from eval import stats
from eval.command import progress
from eval.forward import Reader, generate_one, last_logits, last_logits_through_ring
from eval.haystack import Haystack
from eval.models import Examined
from eval.reach.gradient import untrained
from eval.recall.batches import Outcomes, Runner, batch_runner, measure_batch, summary
from eval.recall.items import DISTRACTORS, TaskItems, open_items
from eval.recall.order import SCREENING, Order
from model.flops import cache_bytes

CONTROL_DISTANCES, CONTROL_ITEMS = 12, 100  # for the untrained model, whose recall is chance everywhere


def measure(examined: Examined, haystack: Haystack, order: Order, console: Console | None = None) -> dict[str, Any]:
    """Everything that recall.json holds. Raises UserError if the order does not fit the model or the text."""
    entries = open_items(examined, haystack, order)
    with batch_runner(order, examined, entries) as run:
        results = {
            asked.name: measure_task(asked, examined, run, order, console or Console(quiet=True)) for asked in entries
        }
    if "untrained" in order.controls:
        initial = replace(examined, model=untrained(examined))
        read = Reader(initial, entries[0].total_length, order.precision, compiled=False)
        for asked in entries:
            results[asked.name]["untrained"] = measure_untrained(asked, read, order)
    facts = {"seed": order.seed, "precision": order.precision, "haystack": haystack.name}
    facts |= {"distractors": DISTRACTORS} if "distractors" in order.controls else {}
    return examined.header() | facts | {"tasks": results}


def measure_task(asked: TaskItems, examined: Examined, run: Runner, order: Order, console: Console) -> dict[str, Any]:
    """The entry of recall.json: SCREENING items at every distance, then up to `n` where recall changes."""
    distances, reach = asked.possible(order.distances), examined.reach
    outcomes: dict[int, list[Outcomes]] = {d: [] for d in distances}

    def measured(indices: range, at: Sequence[int]) -> list[dict[str, Any]]:
        title = f"{asked.name}, {len(indices)} items at {len(at)} distances"
        with progress(console, title, len(indices)) as advance:
            for batch in run(asked, at, indices):
                for distance, outcome in zip(at, batch, strict=True):
                    outcomes[distance].append(outcome)
                advance(len(batch[0]["accuracy"]))
        return [summary(outcomes[d], d, examined.window) | asked.size for d in distances]

    rows = measured(range(min(order.n, SCREENING)), distances)
    changing = near_transition(rows, asked.chance, examined.window)
    closer = [d for d in changing if reach is None or d <= reach]
    if closer and order.n > SCREENING:
        rows = measured(range(SCREENING, order.n), closer)
    beyond = [row for row in rows if reach is not None and row["distance"] > reach]
    return {
        "task": asked.task.name,
        "chance": asked.chance,
        "chance_in_context": 1 / asked.task.seen(asked.options),
        "total_length": asked.total_length,
        "cache_bytes": cache_bytes(examined.model.config, length=asked.total_length) if examined.ours else None,
        **asked.size,
        "rows": rows,
        **horizons(rows, reach),
        "paths": check_paths(asked, examined, distances),
        "pairs_beyond_reach": sum(row["n"] for row in beyond),
        "identical_beyond_reach": all(row["identical_pairs"] == 1.0 for row in beyond) if beyond else None,
    }


def near_transition(rows: list[dict[str, Any]], chance: float, window: int | None) -> list[int]:
    """The distances that deserve more items: recall between floor and ceiling, about W, and about the 90 % crossing."""
    distances = []
    holds = [row["low"] >= 0.9 for row in rows]
    for i, row in enumerate(rows):
        between = row["high"] > chance + 0.1 and row["low"] < 0.95
        crossing = any(holds[i] != neighbour for neighbour in holds[max(0, i - 1) : i + 2])
        if between or crossing or (window and abs(row["distance"] - window) <= 1):
            distances.append(row["distance"])
    return distances


def measure_untrained(asked: TaskItems, read: Reader, order: Order) -> list[dict[str, Any]]:
    """Rows at a few distances for the model before its first training step, on the same items."""
    distances = asked.possible(order.distances)
    distances = distances[:: max(1, len(distances) // CONTROL_DISTANCES)]
    indices = range(min(order.n, CONTROL_ITEMS))
    batches = [
        measure_batch(replace(asked, distractors=0), read, distances, indices[start : start + read.rows])
        for start in range(0, len(indices), read.rows)
    ]
    rows = [summary(parts, d, None) for d, parts in zip(distances, zip(*batches, strict=True), strict=True)]
    return [{key: row[key] for key in ("distance", "n", "correct", "accuracy", "low", "high")} for row in rows]


def horizons(rows: list[dict[str, Any]], reach: int | None) -> dict[str, Any]:
    """H90 and H50 in tokens, and U90 and U50 as shares of R, with 95 % intervals."""
    distances, correct, n = ([row[key] for row in rows] for key in ("distance", "correct", "n"))
    fields: dict[str, Any] = {}
    for name, horizon in (("90", stats.h90(distances, correct, n)), ("50", stats.h50(distances, correct, n))):
        fields |= {
            f"h{name}": horizon.value,
            f"h{name}_interval": [horizon.low, horizon.high],
            f"h{name}_censored": horizon.censored,
            f"u{name}": horizon.value / reach if reach else None,
            f"u{name}_interval": [horizon.low / reach, horizon.high / reach] if reach else None,
        }
    return fields


@torch.compiler.set_stance("force_eager")
def check_paths(asked: TaskItems, examined: Examined, distances: Sequence[int], n: int = 4) -> dict[str, Any]:
    """Whether a full forward pass, the pass through the cache, and generation give the same answers, in float32.

    `n` items are run at about twelve distances. They end at their query, which is what generation continues.
    """
    answers: list[int] = []
    generated: list[int] = []
    full, ring = [], []
    for distance in distances[:: max(1, len(distances) // 12)]:
        items = asked.items(distance, range(n))
        end = items[0].query_position + 1
        tokens = torch.tensor([item.tokens[:end] for item in items])
        answers += [item.answer for item in items]
        full.append(last_logits(examined, tokens))
        ring.append(last_logits_through_ring(examined, tokens, end - 1 - distance))
        if len(generated) < 6 * n:
            generated += generate_one(examined, tokens)
    full_bv, ring_bv, right, written = torch.cat(full), torch.cat(ring), torch.tensor(answers), torch.tensor(generated)
    forced, ringed = full_bv.argmax(-1), ring_bv.argmax(-1)

    def share(chosen: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((chosen == wanted).double().mean())

    return {
        "n": len(right),
        "teacher_forced_accuracy": share(forced, right),
        "ring_accuracy": share(ringed, right),
        "agree": int((forced == ringed).sum()),
        "max_abs_logit_difference": float((full_bv - ring_bv).abs().max()),
        "generated_n": len(written),
        "generated_agree": int((written == forced[: len(written)]).sum()),
        "generated_accuracy": share(written, right[: len(written)]),
    }
