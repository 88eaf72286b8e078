"""Recall over total length and depth: the needle heat map, with the line on which the needle is R tokens back.

    python -m eval.heat MODEL [--out DIR] [--task needle] [--lengths 64,128,512] [--depths 8] [--n 50] [--text FILE]

Each column is one run of `eval.recall` at one total length. Depth 0 is the farthest place from the query, depth 1 the
place just before it. A coarse picture of a whole, for the eye; horizons are read from `eval.recall`.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from eval import plots
from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from eval.recall import __main__ as recall
from model.errors import UserError, cli

COLUMNS = 6
MARGIN = 16  # tokens of an item beyond its farthest distance, about: needle, query and what precedes


def default_lengths(examined: Examined, longest: int, columns: int = COLUMNS) -> list[int]:
    """Total lengths, in tokens, evenly spaced from 2 W to beyond the reach, so that its line crosses the map.

    A stack of unbounded reach gets those of its sliding twin.
    """
    window = examined.window or 64
    reach = examined.reach if examined.reach is not None else examined.layers * (window - 1)
    last = max(2 * window, min(round(1.2 * reach) + 2 * window, longest))
    return sorted({aligned(round(length)) for length in np.linspace(2 * window, last, columns)})


def aligned(length: int) -> int:
    """The next length, in tokens, that items of `eval.recall` can have."""
    return length - length % -recall.ALIGNED


def distances_of(length: int, depths: int) -> list[int]:
    """Distances of needles at evenly spaced depths of about `length` tokens, nearest first.

    >>> distances_of(64, 3)
    [1, 24, 48]
    """
    return sorted({round(distance) for distance in np.linspace(1, length - MARGIN, depths)})


def measure(
    examined: Examined, haystack: Haystack, order: recall.Order, lengths: Iterable[int], depths: int, console: Console
) -> dict[str, Any]:
    """Everything heat.json holds. `order` names the task, n and the seed; its distances are replaced."""
    cells: list[dict[str, Any]] = []
    for length in track(list(lengths), "heat map", console=console, transient=True, disable=console.quiet):
        distances = distances_of(length, depths)
        found = recall.measure(examined, haystack, replace(order, distances=tuple(distances)))
        entry = found["tasks"][order.tasks[0]]
        kept = ("distance", "n", "correct", "accuracy", "low", "high", "identical_pairs")
        for i, row in enumerate(entry["rows"]):
            place = {"length": entry["total_length"], "farthest": distances[-1], "depth": 1 - i / (len(distances) - 1)}
            cells.append(place | {name: row[name] for name in kept})
    return examined.header() | {
        "seed": order.seed,
        "haystack": haystack.name,
        "task": order.tasks[0],
        "lengths": sorted({cell["length"] for cell in cells}),
        "depths": sorted({cell["depth"] for cell in cells}),
        "cells": cells,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.heat", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where heat.json goes; default: the run folder, or here")
    parser.add_argument("--task", default="needle", help=f"one of {', '.join(recall.TASKS)}")
    parser.add_argument("--lengths", help="comma-separated total lengths in tokens; default: from 2 W to beyond R")
    parser.add_argument("--max-length", type=int, default=4096, help="cut the default lengths here")
    parser.add_argument("--depths", type=int, default=8, help="needles at so many depths of each length")
    parser.add_argument("--n", type=int, default=50, help="items a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to use as haystack")
    parser.add_argument("--data", metavar="CONFIG.yaml", help="take the held-out text of this config")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def chosen_lengths(args: argparse.Namespace, examined: Examined, shortest: int) -> list[int]:
    """Raises UserError for lengths that are no numbers, or leave no room for the depths."""
    if args.lengths is None:
        return default_lengths(examined, min(args.max_length, (examined.max_tokens or 1 << 40) - 64))
    try:
        lengths = sorted({aligned(int(part)) for part in args.lengths.split(",")})
    except ValueError as error:
        raise UserError(f"--lengths {args.lengths!r}: give whole numbers of tokens, such as 64,128,512") from error
    if lengths[0] < shortest:
        raise UserError(f"--lengths {lengths[0]}: with --depths {args.depths} a length is at least {shortest} tokens")
    return lengths


def main() -> None:
    args = parse(sys.argv[1:])
    console = Console()
    if args.task not in recall.TASKS:
        raise UserError(f"--task {args.task!r}: unknown task; known: {', '.join(recall.TASKS)}")
    for name, least in (("depths", 2), ("n", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: give at least {least}")
    examined = load_model(args.model, args.device)
    order = recall.Order(
        model=args.model, device=args.device, text=args.text, data=args.data, tasks=(args.task,), distances=(),
        n=args.n, seed=args.seed, precision=examined.precision,
    )  # fmt: skip
    lengths = chosen_lengths(args, examined, MARGIN + args.depths)
    haystack = open_haystack(examined, args.text, args.data)
    result = measure(examined, haystack, order, lengths, args.depths, console)
    out = examined.out_dir(args.out)
    (out / "heat.json").write_text(json.dumps(result, indent=1))
    plots.save(plots.heat_figure(result), out / "heat.png")
    console.print(f"{len(result['cells'])} cells of n = {args.n} ({args.task})", highlight=False)
    console.print(f"Written: {out / 'heat.json'}, {out / 'heat.png'}")


if __name__ == "__main__":
    sys.exit(cli(main))
