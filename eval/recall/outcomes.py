"""What is observed on the items: batches of items go in, and a row of recall.json comes out.

An answer is right if, among the values of the task, it has the highest logit.

Legend: B items of a batch, T positions, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tasks.layout import RecallItem
from eval import stats
from eval.forward import Reader
from eval.recall.items import TaskItems

Outcomes = dict[str, NDArray[np.float64]]  # at one distance, arrays (items,) by name: see `judge`


def measure_batch(asked: TaskItems, read: Reader, distances: Sequence[int], batch: Sequence[int]) -> list[Outcomes]:
    """The outcomes of the items with the numbers `batch`, one `Outcomes` per distance."""
    outcomes = []
    blind_tokens, blind = torch.empty(0), torch.empty(0)
    for distance in distances:
        items = asked.items(distance, batch)
        at = items[0].query_position
        first, second, without = (
            torch.tensor([getattr(item, name) for item in items])
            for name in ("tokens", "counterfactual_tokens", "blind_tokens")
        )
        if not torch.equal(blind_tokens, without):  # needles share it at all distances
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
    right = _is_right(asked, items, first)
    other_answers = torch.tensor([item.counterfactual_answer for item in items])
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
    """(B,) bool."""
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


def near_transition(rows: Sequence[dict[str, Any]], chance: float, window: int | None) -> list[int]:
    """The distances that deserve more items: recall between floor and ceiling, about W, and about the 90 % crossing."""
    distances = []
    holds = [row["low"] >= 0.9 for row in rows]
    for i, row in enumerate(rows):
        between = row["high"] > chance + 0.1 and row["low"] < 0.95
        crossing = any(holds[i] != neighbour for neighbour in holds[max(0, i - 1) : i + 2])
        if between or crossing or (window and abs(row["distance"] - window) <= 1):
            distances.append(row["distance"])
    return distances
