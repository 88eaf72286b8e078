"""The measurement: from an order to what recall.json holds.

Legend: B items of a batch, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tasks.layout import RecallItem
from eval import stats
from eval.command import progress
from eval.forward import batch_rows, last_logits, logits_at
from eval.haystack import Haystack
from eval.models import Examined
from eval.reach.gradient import untrained
from eval.recall.order import DISTRACTORS, SCREENING, Order, TaskItems, open_items
from model.cache import RingCache
from model.flops import cache_bytes

LONG_WORK = 2_000_000  # tokens; for less, compiling takes longer than it saves
CONTROL_ITEMS = 100  # for the untrained model, whose recall is chance everywhere

Outcomes = dict[str, NDArray[np.float64]]  # at one distance, arrays (items,) by name: see `judge`


def measure(examined: Examined, haystack: Haystack, order: Order) -> dict[str, Any]:
    """Everything that recall.json holds. Raises UserError if the order does not fit the model or the text."""
    entries = open_items(examined, haystack, order)
    tokens = len(entries) * min(order.n, SCREENING) * (2 * len(order.distances) + 1) * entries[0].total_length
    if examined.ours and tokens >= LONG_WORK:
        examined.model.compile_layers()
    results = {asked.name: measure_task(asked, examined, order) for asked in entries}
    if "untrained" in order.controls:
        initial, few = replace(examined, model=untrained(examined)), replace(order, n=min(order.n, CONTROL_ITEMS))
        for asked in (replace(entry, distances=thinned(entry.distances), distractors=0) for entry in entries):
            results[asked.name]["untrained"] = measure_task(asked, initial, few)["rows"]
    facts = {"seed": order.seed, "precision": order.precision, "haystack": haystack.name}
    facts |= {"distractors": DISTRACTORS} if "distractors" in order.controls else {}
    return examined.header() | facts | {"tasks": results}


def measure_task(asked: TaskItems, examined: Examined, order: Order) -> dict[str, Any]:
    """The entry of recall.json: SCREENING items at every distance, then up to `n` where recall changes."""
    distances, reach = asked.distances, examined.reach
    chance = asked.task.chance(len(asked.vocabulary.values), asked.options)
    outcomes: dict[int, list[Outcomes]] = {d: [] for d in distances}

    def measured(indices: range, at: Sequence[int]) -> list[dict[str, Any]]:
        with progress(f"{asked.name}, {len(indices)} items at {len(at)} distances", len(indices)) as advance:
            for batch in run_batches(asked, examined, order.precision, at, indices):
                for distance, outcome in zip(at, batch, strict=True):
                    outcomes[distance].append(outcome)
                advance(len(batch[0]["accuracy"]))
        return [summary(outcomes[d], d, examined.window) | asked.size for d in distances]

    rows = measured(range(min(order.n, SCREENING)), distances)
    farthest = math.inf if reach is None else reach
    closer = [d for d in near_transition(rows, chance, examined.window) if d <= farthest]
    if closer and order.n > SCREENING:
        rows = measured(range(SCREENING, order.n), closer)
    beyond = [row for row in rows if row["distance"] > farthest]
    return {
        "task": asked.task.name,
        "chance": chance,
        "chance_in_context": 1 / asked.task.seen(asked.options),
        "total_length": asked.total_length,
        "cache_bytes": cache_bytes(examined.model.config, length=asked.total_length) if examined.ours else None,
        **asked.size,
        "rows": rows,
        **horizons(rows, reach),
        "paths": check_paths(asked, examined),
        "pairs_beyond_reach": sum(row["n"] for row in beyond),
        "identical_beyond_reach": all(row["identical_pairs"] == 1.0 for row in beyond) if beyond else None,
    }


def run_batches(
    asked: TaskItems, examined: Examined, precision: str, distances: Sequence[int], indices: range
) -> Iterator[list[Outcomes]]:
    """Yield the outcomes of each batch of items, one `Outcomes` per distance."""
    rows = min(128, batch_rows(examined, asked.total_length))
    batches = [indices[start : start + rows] for start in range(0, len(indices), rows)]
    read = partial(logits_at, examined, rows=rows, precision=precision)
    outcomes_of = partial(measure_batch, asked, read, distances)
    threads = torch.get_num_threads()  # each runs a batch of its own: small matrix products gain little from more
    alone = examined.layout is None  # processes that share rows must compute them in the same order
    workers = threads if examined.ours and examined.device.type == "cpu" and alone else 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        yield from pool.map(outcomes_of, batches[:1])  # alone: it compiles the layers, which threads can't do at once
        yield from pool.map(outcomes_of, batches[1:])
    torch.set_num_threads(threads)  # the workers' own setting is also this thread's


def measure_batch(
    asked: TaskItems, read: Callable[[Tensor, int], Tensor], distances: Sequence[int], batch: Sequence[int]
) -> list[Outcomes]:
    """The outcomes of the items with the numbers `batch`, one `Outcomes` per distance."""
    outcomes = []
    blind_tokens, blind = torch.empty(0), torch.empty(0)
    for distance in distances:
        items = [asked.item(i, distance) for i in batch]
        at = items[0].query_position
        fields = ("tokens", "counterfactual_tokens", "blind_tokens")
        first, second, without = (torch.tensor([getattr(item, name) for item in items]) for name in fields)
        if not torch.equal(blind_tokens, without):  # needles have the same blind tokens at all distances
            blind_tokens, blind = without, read(without, at)
        outcome = judge(asked, items, read(first, at), read(second, at), blind)
        if asked.distractors:
            items = [asked.item(i, distance, asked.distractors) for i in batch]
            chosen = _chosen(asked, read(torch.tensor([item.tokens for item in items]), items[0].query_position))
            outcome["accuracy_with_distractors"] = (chosen.numpy() == [item.answer for item in items]).astype(float)
        outcomes.append(outcome)
    return outcomes


def judge(asked: TaskItems, items: list[RecallItem], first: Tensor, second: Tensor, blind: Tensor) -> Outcomes:
    """The outcomes (B,) of items, from their logits (B, V) with value v, with v', and without a needle."""
    answers, other_answers = torch.tensor([(item.answer, item.counterfactual_answer) for item in items]).T
    right = _chosen(asked, first) == answers
    bits, blind_bits = (-torch.log_softmax(logits, -1) / math.log(2) for logits in (first, blind))
    outcomes = {
        "accuracy": right,
        "pair_accuracy": right & (_chosen(asked, second) == other_answers),
        "identical_pairs": (first == second).all(-1),
        "free_accuracy": first.argmax(-1) == answers,
        "accuracy_without_needle": _chosen(asked, blind) == answers,
        "nll_bits": bits[range(len(items)), answers],
        "blind_nll_bits": blind_bits[range(len(items)), answers],
    }
    return {name: values.double().numpy() for name, values in outcomes.items()}


def _chosen(asked: TaskItems, logits: Tensor) -> Tensor:
    """(B,) the value of the task with the highest logit."""
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


def near_transition(rows: list[dict[str, Any]], chance: float, window: int | None) -> list[int]:
    """The distances that get more items: recall between floor and ceiling, about W, and about the 90 % crossing."""
    holds = [row["low"] >= 0.9 for row in rows]
    return [
        row["distance"]
        for i, row in enumerate(rows)
        if (row["high"] > chance + 0.1 and row["low"] < 0.95)
        or len(set(holds[max(0, i - 1) : i + 2])) == 2
        or (window and abs(row["distance"] - window) <= 1)
    ]


def thinned(distances: list[int]) -> list[int]:
    """About twelve of the distances."""
    return distances[:: max(1, len(distances) // 12)]


def horizons(rows: list[dict[str, Any]], reach: int | None) -> dict[str, Any]:
    """H90 and H50 in tokens, and U90 and U50 as shares of R, with 95 % intervals."""
    distances, correct, n = ([row[key] for row in rows] for key in ("distance", "correct", "n"))
    fields: dict[str, Any] = {}
    for name, horizon in (("90", stats.h90), ("50", stats.h50)):
        value, low, high, censored = horizon(distances, correct, n)
        fields |= {f"h{name}": value, f"h{name}_interval": [low, high], f"h{name}_censored": censored}
        fields[f"u{name}"] = value / reach if reach else None
        fields[f"u{name}_interval"] = [low / reach, high / reach] if reach else None
    return fields


@torch.inference_mode()
def check_paths(asked: TaskItems, examined: Examined, n: int = 4) -> dict[str, Any]:
    """Whether a full forward pass, the pass through the cache, and generation give the same answers, in float32.

    `n` items at about twelve distances end at their query. For other models the full pass stands in for our cache.
    Layers run uncompiled: each of these shapes occurs once.
    """
    with examined.model.uncompiled_layers() if examined.ours else nullcontext():
        return _check_paths(asked, examined, n)


def _check_paths(asked: TaskItems, examined: Examined, n: int) -> dict[str, Any]:
    model = examined.model
    answers: list[int] = []
    logits: list[tuple[Tensor, Tensor]] = []  # of the full pass, of the pass through the cache
    generated: list[Tensor] = []
    for distance in thinned(asked.distances):
        items = [asked.item(i, distance) for i in range(n)]
        end = items[0].query_position + 1
        tokens = torch.tensor([item.tokens[:end] for item in items])
        ids = tokens.to(examined.device)
        answers.extend(item.answer for item in items)
        full = cached = last_logits(examined, tokens)
        if examined.ours:
            cache = RingCache(model.config)
            for part in ids.tensor_split([end - 1 - distance], dim=1):  # up to the value, and the rest
                cached = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        logits.append((full, cached.float().cpu()))
        if len(generated) < 6:
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "pad_token_id": 0}
            generated.append(model.generate(input_ids=ids, do_sample=False, **options)[:, end].cpu())
    full_bv, ring_bv = map(torch.cat, zip(*logits, strict=True))
    right, written = torch.tensor(answers), torch.cat(generated)
    forced, ringed = full_bv.argmax(-1), ring_bv.argmax(-1)
    return {
        "n": len(right),
        "teacher_forced_accuracy": (forced == right).double().mean().item(),
        "ring_accuracy": (ringed == right).double().mean().item(),
        "agree": int((forced == ringed).sum()),
        "max_abs_logit_difference": float((full_bv - ring_bv).abs().max()),
        "generated_n": len(written),
        "generated_agree": int((written == forced[: len(written)]).sum()),
        "generated_accuracy": (written == right[: len(written)]).double().mean().item(),
    }
