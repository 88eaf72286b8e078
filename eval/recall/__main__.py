"""How far back a model recalls a value, by distance, with intervals and controls.

    python -m eval.recall MODEL [--out DIR] [--tasks needle,keys,...] [--n 400] [--seed 0]
                                [--keys 1,4,16] [--hops 1,2] [--span-pairs 4] [--controls distractors,untrained]
                                [--distances 1,W,0.9R,R,R+1] [--precision auto] [--data CONFIG.yaml] [--text FILE]
                                [--compare RUN ...]

Distance = (position whose logits are read) - (position of the value token). All items have one total length, so
length and distance are not confounded, and nothing but haystack stands between needle and query (the other pairs of
`keys`, by definition, stand where there is room). Each item is a **counterfactual pair**: the same tokens with value v
and with v'. Beyond the reach R both runs must give the same bits, and the report says whether they did.

Both members of a pair run in the same row of batches of one shape. The haystack without a needle is always measured;
`distractors` adds older needles, which the asked one supersedes; `untrained` asks the model before its first step.
Shared haystacks make rows of *different* distances dependent; within a distance the items are independent.

Right means: among the task's values the right one has the highest logit (chance is 1/values; 1/rules for
`instruction`). `free_accuracy` asks more: it must be the highest of the whole vocabulary, as in greedy generation.
Every answer is one token. Each number of `--keys`, `--hops` or `--span-pairs` makes an entry of its own: `keys-16`.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from data.tasks import TASKS
from eval import plots
from eval.haystack import open_haystack
from eval.models import Examined, load_model
from eval.recall.distances import asked_distances, default_distances
from eval.recall.items import ALIGNED, SIZE_NAMES, n_values_of, trained_tasks
from eval.recall.measure import CONTROLS, measure
from eval.recall.table import print_result
from eval.recall.workers import Order
from model.errors import UserError, cli

__all__ = ["ALIGNED", "TASKS", "Order", "measure", "n_values_of", "read_result"]  # what other evaluations use
NEEDLES = ("needle", "needle-noise")  # what a model that was trained on no task is asked
SIZES = {"pairs": "pairs in the haystack", "hops": "copies to follow", "span_pairs": "pairs in the span"}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.recall", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where the results go; default: the run folder, or here")
    parser.add_argument(
        "--tasks", help=f"comma-separated, of {', '.join(TASKS)}; default: those the run was trained on"
    )
    for option, what in SIZES.items():
        task = next(name for name, task in TASKS.items() if task.option == option)
        parser.add_argument(
            f"--{SIZE_NAMES[option]}", dest=option, help=f"{task}: {what}, comma-separated; default: as trained"
        )
    parser.add_argument("--controls", default="", help=f"comma-separated, of {', '.join(CONTROLS)}; default: none")
    parser.add_argument("--n", type=int, default=400, help="items a distance near transitions (elsewhere up to 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distances", help="comma-separated, such as 16,W,0.9R,R; default: the protocol's")
    parser.add_argument("--max-distance", type=int, default=4096, help="cut the protocol's distances here")
    parser.add_argument("--data", metavar="CONFIG.yaml", help="take the held-out text of this config")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to use as haystack")
    parser.add_argument("--compare", nargs="*", default=[], metavar="RUN", help="runs to draw in grey, e.g. the twin")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as trained")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def chosen_distances(args: argparse.Namespace, examined: Examined) -> tuple[int, ...]:
    if args.distances is None:
        return tuple(default_distances(examined, min(args.max_distance, (examined.max_tokens or 1 << 40) - 64)))
    return tuple(asked_distances(args.distances, examined))


def chosen_tasks(args: argparse.Namespace, trained: Iterable[str]) -> tuple[str, ...]:
    if args.tasks is None:
        return tuple(task for task in TASKS if task in trained) or NEEDLES
    tasks = _names(args.tasks)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {args.tasks!r}: unknown task {', '.join(unknown)!r}; known: {', '.join(TASKS)}")
    return tuple(tasks)


def chosen_sizes(args: argparse.Namespace, tasks: Iterable[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The sizes asked for, by option. UserError where they are no numbers, or belong to a task that is not asked."""
    found = []
    used = {TASKS[task].option for task in tasks}
    for option in SIZES:
        if (text := getattr(args, option)) is None:
            continue
        flag = f"--{SIZE_NAMES[option]}"
        if option not in used:
            task = next(name for name, task in TASKS.items() if task.option == option)
            raise UserError(f"{flag} {text!r} is for the task {task}, which is not measured; add it to --tasks")
        try:
            sizes = tuple(sorted({int(part) for part in text.split(",")}))
        except ValueError as error:
            raise UserError(f"{flag} {text!r}: give whole numbers, such as 1,4,16") from error
        if sizes[0] < 1:
            raise UserError(f"{flag} {text!r}: give numbers of at least 1")
        found.append((option, sizes))
    return tuple(found)


def chosen_controls(args: argparse.Namespace) -> tuple[str, ...]:
    controls = _names(args.controls)
    if unknown := [control for control in controls if control not in CONTROLS]:
        raise UserError(
            f"--controls {args.controls!r}: unknown control {', '.join(unknown)!r}; known: {', '.join(CONTROLS)}"
        )
    return tuple(controls)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def main() -> None:
    args = parse(sys.argv[1:])
    console = Console()
    if args.n < 1:
        raise UserError(f"--n {args.n}: give at least 1 item")
    others = [read_result(Path(run) / "recall.json") for run in args.compare]
    examined = load_model(args.model, args.device)
    tasks = chosen_tasks(args, trained_tasks(examined))
    order = Order(
        args.model, args.device, args.text, args.data, tasks, chosen_distances(args, examined), args.n, args.seed,
        examined.precision if args.precision == "auto" else args.precision,
        chosen_sizes(args, tasks), chosen_controls(args),
    )  # fmt: skip
    result = measure(examined, open_haystack(examined, args.text, args.data), order, console)
    out = examined.out_dir(args.out)
    (out / "recall.json").write_text(json.dumps(result, indent=1))
    print_result(result, console)
    reach = read_result(out / "reach.json") if (out / "reach.json").exists() else None
    plots.save(plots.hero_figure([result, *others], reach), out / "recall.png")
    console.print(f"Written: {out / 'recall.json'}, {out / 'recall.png'}")
    if any(entry["identical_beyond_reach"] is False for entry in result["tasks"].values()):
        raise SystemExit("pairs beyond the reach differ: the model sees farther than its windows allow")


def read_result(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such result; run the evaluation on that run first") from error
    except ValueError as error:
        raise UserError(f"{file} is not whole JSON ({error}); run the evaluation again") from error


if __name__ == "__main__":
    sys.exit(cli(main))
