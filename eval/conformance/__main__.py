"""Is the window that was asked for the window that runs, in every mode and attention implementation?

    python -m eval.conformance MODEL [--attention sdpa,eager] [--modes train,packed] [--window W] [--out DIR]
    python -m eval.conformance --config FOLDER

MODEL is a run folder, a checkpoint or any Hugging Face causal language model. `--config` builds a small model with
random weights instead, from a folder with config.json or from the name of a model type. That takes seconds. The command
writes conformance.json. The exit code is 1 if there is a fault.
"""

import sys
from argparse import ArgumentParser, Namespace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.command import at_least, names
from model.errors import UserError, cli
from training.run.checkpoint import write_json

MODES = ("train", "eval", "packed", "left-padded", "cached", "chunked", "generate")
ATTENTION = ("eager", "sdpa", "flex_attention")


def runs_of_windows(windows: list[str]) -> str:
    """Windows of layers, bottom layer first, with equal neighbours counted.

    >>> runs_of_windows(["8", "8", "8", "full"])
    '3 × 8, full'
    """
    counted = [(window, len(list(same))) for window, same in groupby(windows)]
    return ", ".join(f"{count} × {window}" if count > 1 else window for window, count in counted)


def print_report(report: dict[str, Any], console: Console) -> None:
    asked = runs_of_windows(report["asked"])
    console.print(f"[bold]{report['model']}[/]: windows asked for {asked}; sequences of {report['tokens']} tokens")
    table = Table("attention", "mode", "windows measured", "largest error", "verdict")
    for row in report["rows"]:
        table.add_row(row["attention"], row["mode"], *_cells(row, report["asked"]))
    console.print(table)
    for row in report["rows"]:
        for fault in row["faults"]:
            console.print(f"{row['attention']}, {row['mode']}: {sentence(fault)}", style="red", highlight=False)


def _cells(row: dict[str, Any], asked: list[str]) -> tuple[str, str, str]:
    if "refused" in row:
        return "", "", f"refused: {row['refused']}"
    worst = max(row["ways"], key=lambda way: (way["measured"] != asked, bool(way["faults"])), default=None)
    windows = runs_of_windows(worst["measured"]) if worst else ""
    errors = [max(way["largest_layer_error"], way["logits_error"] or 0.0) for way in row["ways"]]
    verdict = ", ".join(dict.fromkeys(fault["name"] for fault in row["faults"])) or "as asked"
    verdict += f"; partly refused: {row['refusals'][0]}" if row.get("refusals") else ""
    return windows, f"{max(errors):.0e}" if errors else "", verdict


def sentence(fault: dict[str, Any]) -> str:
    """A fault in words: what, where, and an example.

    >>> sentence({"sentence": "padding is attended", "layers": [0, 1], "label": "", "query": 4, "key": 0})
    'padding is attended (layers 0, 1; for example query 4 and key 0)'
    """
    example = "" if fault["query"] is None else f"for example column {fault['query']}"
    if fault["key"] is not None:
        example = f"for example query {fault['query']} and key {fault['key']}"
    layers = f"layers {', '.join(map(str, fault['layers']))}" if fault["layers"] else ""
    where = "; ".join(part for part in (fault["label"], layers, example) if part)
    return f"{fault['sentence']} ({where})" if where else fault["sentence"]


def parse() -> Namespace:
    parser = ArgumentParser(prog="python -m eval.conformance", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="run folder, checkpoint, or Hugging Face causal model"
    )
    parser.add_argument("--config", metavar="FOLDER", help="build a small random model from this config.json instead")
    parser.add_argument("--attention", type=lambda text: tuple(text.split(",")), metavar="NAMES",
                        help=f"implementations; default: {','.join(ATTENTION)}, for a run its own")  # fmt: skip
    parser.add_argument("--modes", type=names(MODES), default=MODES, help=f"default: {','.join(MODES)}")
    parser.add_argument("--window", type=at_least(1), metavar="W", help="load MODEL with this window; its code is the "
                        "same, and short windows are measured sooner")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", default=".", help="folder for conformance.json; default: this one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text; default %(default)s")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if (args.model is None) == (args.config is None):
        raise UserError("give either MODEL or --config FOLDER")
    out = Path(args.out)
    if not out.is_dir():
        raise UserError(f"--out {args.out!r}: no such folder; create it first")
    from eval.conformance.build import build, load
    from eval.conformance.check import check
    from model.decoder import WindreachForCausalLM

    model = load(args.model, args.window) if args.model else build(args.config)
    attention = args.attention or (() if isinstance(model, WindreachForCausalLM) else ATTENTION)
    report = check(model, attention, args.modes, seed=args.seed)
    print_report(report, Console(width=None if sys.stdout.isatty() else 120))
    write_json(out / "conformance.json", report)
    print(f"Written: {out / 'conformance.json'}")
    return int(any(row["faults"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(cli(main))
