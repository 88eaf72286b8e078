"""Recall by total length and depth of the needle: the heat map, with the line on which the needle is R tokens back.

    python -m eval.heat MODEL [--out DIR] [--task needle] [--lengths 64,128,512] [--depths 8] [--n 50] [--text FILE]

Each column is a run of `eval.recall` at one total length. Depth 0 is the position farthest from the query, depth 1 the
position just before it. The map is a coarse overview; for horizons use `eval.recall`.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.tasks import TASKS
from eval.command import at_least, new_parser, numbers, prepare
from eval.haystack import Haystack
from eval.models import Examined, nominal_reach
from eval.recall.order import Order, aligned
from eval.results import write_result
from model.errors import cli

COLUMNS = 6
MARGIN = 16  # tokens of an item besides its farthest distance, roughly: needle, query and what precedes


def default_lengths(examined: Examined) -> list[int]:
    """COLUMNS total lengths in tokens, evenly spaced from 2 W to beyond the reach, so that its line crosses the map."""
    window, longest = examined.window or 64, min(4096, (examined.max_tokens or 1 << 40) - 64)
    last = min(round(1.2 * nominal_reach(examined.specs, window)) + 2 * window, longest)
    return [round(length) for length in np.linspace(2 * window, max(2 * window, last), COLUMNS)]


def distances_of(length: int, depths: int) -> list[int]:
    """Distances of needles at evenly spaced depths of about `length` tokens, nearest first.

    >>> distances_of(64, 3)
    [1, 24, 48]
    """
    return sorted({round(distance) for distance in np.linspace(1, length - MARGIN, depths)})


def measure(
    examined: Examined, haystack: Haystack, order: Order, lengths: Sequence[int], depths: int
) -> dict[str, Any]:
    """Everything that heat.json holds. `order` gives the task, n and the seed; its distances are replaced."""
    from eval.recall.measure import measure as measure_recall

    cells: list[dict[str, Any]] = []
    for length in lengths:
        distances = distances_of(length, depths)
        (entry,) = measure_recall(examined, haystack, replace(order, distances=tuple(distances)))["tasks"].values()
        for i, row in enumerate(entry["rows"]):
            place = {"length": entry["total_length"], "farthest": distances[-1], "depth": 1 - i / (len(distances) - 1)}
            kept = ("distance", "n", "correct", "accuracy", "low", "high", "identical_pairs")
            cells.append(place | {name: row[name] for name in kept})
    return examined.header() | {
        "seed": order.seed,
        "haystack": haystack.name,
        "task": order.tasks[0],
        "lengths": sorted({cell["length"] for cell in cells}),
        "depths": sorted({cell["depth"] for cell in cells}),
        "cells": cells,
    }


def main() -> None:
    parser = new_parser("heat", __doc__)
    parser.add_argument("--task", choices=TASKS, default="needle", help="default %(default)s")
    parser.add_argument("--lengths", type=numbers, help="comma-separated, in tokens; default: from 2 W to beyond R")
    parser.add_argument("--depths", type=at_least(2), default=8, help="needle positions per length; default 8")
    parser.add_argument("--n", type=at_least(1), default=50, help="items per cell; default 50")
    args = parser.parse_args()
    if args.lengths and aligned(args.lengths[0]) < MARGIN + args.depths:
        parser.error(f"--lengths: with --depths {args.depths} a length is at least {MARGIN + args.depths} tokens")
    examined, out, haystack = prepare(args)
    lengths = sorted({aligned(n) for n in args.lengths or default_lengths(examined)})
    order = Order((args.task,), (), args.n, args.seed, examined.facts.get("precision", "fp32"))
    result = measure(examined, haystack, order, lengths, args.depths)
    write_result("heat", result, out, lambda plots: plots.heat_figure(result))


if __name__ == "__main__":
    sys.exit(cli(main))
