"""How far back a model recalls a planted value, by distance, with intervals and controls.

    python -m eval.recall MODEL [--tasks needle,keys,...] [--distances 1,W,0.9R,R,R+1] [--n 400] [--keys 1,4,16]
                                [--controls distractors,untrained] [--compare RUN ...] [--help]

The distance is the position of the query minus the position of the value, in tokens. All items have the same length,
so that length and distance are not confounded. Each item is a **counterfactual pair**: the same tokens with value v and
with value v'. Beyond the reach R both must give the same bits, and the result says whether they did.

An answer is one token. It is right if it has the highest logit among the values of the task. Each number of `--keys`,
`--hops` or `--span-pairs` is an entry of its own, such as `keys-16`. docs/evaluate.md explains controls and figures.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.tasks import TASKS
from eval.command import at_least, names, new_parser, numbers, prepare, read_result
from eval.models import nominal_reach
from eval.recall.order import CONTROLS, NEEDLES, SIZE_NAMES, Order, default_distances, parse_distances
from eval.results import write_result
from model.errors import UserError, cli
from training.processes.signals import end_process

SIZES = {"pairs": "pairs in the haystack", "hops": "copies to follow", "span_pairs": "pairs in the span"}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser("recall", __doc__)
    add = parser.add_argument
    add("--tasks", type=names(TASKS), help=f"comma-separated, of {', '.join(TASKS)}; default: those of the training")
    task_of = {task.option: task.name for task in TASKS.values()}
    for option, meaning in SIZES.items():
        text = f"{task_of[option]}: {meaning}, comma-separated; default: as trained"
        add(f"--{SIZE_NAMES[option]}", dest=option, type=numbers, metavar="1,4,16", help=text)
    add(
        "--controls", type=names(CONTROLS), default=(), help=f"comma-separated, of {', '.join(CONTROLS)}; default: none"
    )
    add("--n", type=at_least(1), default=400, help="items per distance where recall changes, else 200")
    add("--distances", help="comma-separated, such as 16,W,0.9R,R; default: those of the protocol")
    add("--max-distance", type=at_least(1), default=4096, help="longest default distance; default 4096")
    add("--compare", nargs="*", default=[], metavar="RUN", help="measured runs to draw in grey")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as trained")
    args = parser.parse_args(argv)
    args.sizes = {option: getattr(args, option) for option in SIZES if getattr(args, option)}
    return args


def check_sizes(sizes: dict[str, tuple[int, ...]], tasks: Iterable[str]) -> None:
    """Raise UserError for a size that belongs to a task that is not measured."""
    used = {TASKS[task].option for task in tasks}
    for task in TASKS.values():
        if task.option in sizes and task.option not in used:
            raise UserError(f"--{SIZE_NAMES[task.option]} is for the task {task.name}; add it to --tasks")


def sentences(task: str, entry: dict[str, Any]) -> Iterator[str]:
    """Yield what the measurement of one task and its controls show."""
    paths, share = entry["paths"], "" if entry["u90"] is None else f", {entry['u90']:.0%} of the reach"
    yield f"{task}: recall is at least 90 % with 95 % confidence up to {entry['h90']:,} tokens back (H90{share})."
    more = " or more" if entry["h50_censored"] else ""
    yield f"It falls to 50 % at {entry['h50']:.0f} tokens{more} (H50). Chance is {entry['chance']:.1%}."
    if entry["chance_in_context"] < 1:
        yield f"Naming any of the values in the text would give {entry['chance_in_context']:.0%}."
    if entry["identical_beyond_reach"] is not None:
        verdict = "all gave" if entry["identical_beyond_reach"] else "NOT all gave"
        yield f"Of {entry['pairs_beyond_reach']:,} items beyond R, {verdict} the same logits with another value."
    yield f"The cache gives the answer of a full pass on {paths['agree']} of {paths['n']} items."
    yield f"Generation gives it on {paths['generated_agree']} of {paths['generated_n']}."
    if "accuracy_with_distractors" in entry["rows"][0]:
        older = [row["accuracy_with_distractors"] for row in entry["rows"]]
        yield f"With four older needles, {min(older):.1%} to {max(older):.1%} of the items are right."
    if "untrained" in entry:
        right, n = (sum(row[key] for row in entry["untrained"]) for key in ("correct", "n"))
        yield f"Before training, the model answered {right / n:.1%} of {n:,} items right."


def main() -> None:
    args = parse(sys.argv[1:])
    check_sizes(args.sizes, args.tasks or TASKS)
    if args.distances is not None:
        parse_distances(args.distances, window=1 << 20, reach=1 << 20)  # a mistake is answered before loading the model
    others = [read_result(Path(run) / "recall.json") for run in args.compare]
    examined, out, haystack = prepare(args)

    from eval.recall.measure import measure

    reach = examined.window and nominal_reach(examined.specs, examined.window)
    longest = min(args.max_distance, (examined.max_tokens or 1 << 40) - 64)
    if args.distances is None:
        distances = tuple(default_distances(examined.specs, examined.window, longest))
    else:
        distances = parse_distances(args.distances, examined.window, reach)
    tasks = args.tasks or tuple(task for task in TASKS if task in examined.recall.get("tasks", {})) or NEEDLES
    check_sizes(args.sizes, tasks)
    precision = examined.facts.get("precision", "fp32") if args.precision == "auto" else args.precision
    order = Order(tasks, distances, args.n, args.seed, precision, args.sizes, args.controls)
    result = measure(examined, haystack, order)
    field = read_result(out / "reach.json") if (out / "reach.json").exists() else None
    write_result("recall", result, out, lambda plots: plots.hero_figure([result, *others], field))
    for task, entry in result["tasks"].items():
        print(*sentences(task, entry))
    if any(entry["identical_beyond_reach"] is False for entry in result["tasks"].values()):
        raise SystemExit("pairs beyond the reach differ: the model sees farther than its windows allow")


if __name__ == "__main__":
    end_process(cli(main))
