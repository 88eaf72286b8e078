"""Proof by construction that a stack can carry a value over all of R, and not one token more.

    python -m eval.proof CONFIG.yaml [--out DIR]
    python -m eval.proof --layers 32 --window 4096

It builds a tiny model with the layers of CONFIG and weights set by hand (`eval.proof.weights`), and plants a value. The
model is the decoder that is trained, with its attention, cache and export. `proof.json` has the results.
"""

import argparse
import platform
import resource
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from eval.command import at_least, names
from eval.models import out_folder
from model import windows
from model.errors import UserError, cli
from training.run.checkpoint import write_json

if TYPE_CHECKING:
    from model.config import WindreachConfig

PATHS = ("forward", "reference", "cache", "token", "export")


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.proof", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="take the layers of this file")
    parser.add_argument("--layers", type=at_least(1), metavar="K", help="without CONFIG: sliding layers")
    parser.add_argument(
        "--window", type=at_least(1), metavar="W", help="without CONFIG: tokens, the current one included"
    )
    parser.add_argument("--tokens", type=at_least(1), default=0, help="at least so many tokens behind the value")
    parser.add_argument("--paths", type=names(PATHS), default=PATHS, help=f"default: {','.join(PATHS)}")
    parser.add_argument("--backend", default="auto", help="attention of forward, cache and token; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder for proof.json; default: this folder")
    return parser


def geometry(args: argparse.Namespace) -> "WindreachConfig":
    """The config whose layers are wanted. Raises UserError unless there is a file or both numbers."""
    if bool(args.config) == bool(args.layers and args.window):
        raise UserError("give either CONFIG.yaml or both --layers and --window")
    from model.config import WindreachConfig

    if not args.config:
        return WindreachConfig(
            num_hidden_layers=args.layers, sliding_window=args.window, attention_backend=args.backend
        )
    from training.settings.build import model_config
    from training.settings.config_file import load_settings

    settings = load_settings(args.config, [f"model.attention_backend={args.backend}"])
    return model_config(settings, vocab_size=1)


def sentence(result: dict[str, Any]) -> str:
    """What was shown, for the value that is not in a global token."""
    last, far = result["results"][-1], result["reach_of_other_tokens"]
    stack = f"{result['layers']} layers carry a value"
    if not result["holds"]:
        return f"FAILED: what the stack of {result['layers']} layers does is not what its masks allow"
    if far is None:
        return f"{stack} to every one of {last['reachable']:,} later tokens; with a full layer the reach is unbounded"
    share = f"each of the {last['reachable']:,} distances that have a path, up to R = {far:,} tokens"
    return f"{stack} over {share}. At {far + 1:,} and beyond, two values leave the same bits"


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table("path", "value at", "recalled", "farthest", "same bits elsewhere", "seconds")
    for row in result["results"]:
        recalled = f"{row['recalled']:,} of {row['reachable']:,}"
        same = f"{row['identical']:,} of {row['unreachable']:,}"
        table.add_row(row["path"], str(row["value_at"]), recalled, f"{row['farthest']}", same, f"{row['seconds']}")
    console.print(table)
    console.print(f"{sentence(result)}.", highlight=False)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that proof.json holds."""
    config = geometry(args)
    import torch
    import transformers

    from eval.proof.measure import holds, prove
    from eval.proof.weights import relay_model

    specs = config.specs
    results = prove(relay_model(config).to(args.device), specs, args.paths, args.tokens)
    return {
        "layers": len(specs),
        "layer_specs": [vars(spec) for spec in specs],
        "reach": windows.reach(specs),
        "reach_of_other_tokens": windows.reach_of_other_tokens(specs),
        "window_times_layers": windows.window_times_layers(specs),
        "holds": holds(results, specs),
        "results": results,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": platform.python_version()},
    }


def main() -> None:
    args = new_parser().parse_args()
    out, result, console = out_folder(args.out), measure(args), Console(width=None if sys.stdout.isatty() else 120)
    write_json(out / "proof.json", result)
    print_result(result, console)
    console.print(f"Peak memory {result['peak_memory_mib']:,} MiB. Written: {out / 'proof.json'}", highlight=False)
    if not result["holds"]:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(cli(main))
