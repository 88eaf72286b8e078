"""How far a model can see: theory, the exact cliff, and where the gradient really goes.

    python -m eval.reach MODEL [--out DIR] [--plot]

1. **Theory**, from the layer descriptions alone: reach R, receptive field R + 1, W x k.
2. **Cliff test** (`eval.reach.cliff`), exact: change tokens that can't reach the query and compare its logits bit by bit,
   through every backend and every way of feeding the model.
3. **Gradient field** (`eval.reach.gradient`): how the energy of d(output)/d(input embedding) is spread over distance,
   before and after training.
4. **Alpha** (`eval.reach.alpha`), the share of the residual stream that stays put at each layer, and what others predict
   from it.

`--plot` adds the pictures: `mask.png`, `layers.png`, `cone.png` (`eval.reach.masks`) and `reach.png`, the field.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval import plots
from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from eval.reach import masks as mask_plots
from eval.reach.alpha import predictions, residual_shares
from eval.reach.cliff import cliff, cliff_holds
from eval.reach.gradient import gradient_field
from model import windows
from model.errors import cli


def field_length(examined: Examined, max_tokens: int) -> int:
    """Tokens of a text for the gradient field: the whole reach and two windows more, if that is affordable."""
    window = examined.window or 64
    wanted = examined.reach + 2 * window if examined.reach is not None else window * examined.layers
    return min(wanted, max_tokens, examined.max_tokens or max_tokens)


def measure(
    examined: Examined, haystack: Haystack, seed: int = 0, texts: int = 16, max_tokens: int = 8192
) -> dict[str, Any]:
    """Everything `reach.json` holds."""
    sample = haystack.rows(texts, field_length(examined, max_tokens), seed)
    alphas = residual_shares(examined, sample)
    rows, note = cliff(examined, seed, max_tokens)
    return examined.header() | {
        "seed": seed,
        "receptive_field": None if examined.reach is None else examined.reach + 1,
        "reach_of_other_tokens": windows.reach_of_other_tokens(examined.specs),
        "layer_kinds": [f"{spec.kind}:{spec.window}" if spec.window else spec.kind for spec in examined.specs],
        "layer_specs": [vars(spec) for spec in examined.specs],
        "cliff": rows,
        "cliff_note": note,
        "cliff_holds": cliff_holds(rows) if rows else None,
        "gradient": gradient_field(examined, sample, seed),
        "alpha": {
            "residual_share": float(np.mean(alphas)) if alphas else None,
            "attention_share": 1 - float(np.mean(alphas)) if alphas else None,
            "residual_share_by_layer": alphas,
        },
        "predictions": predictions(examined, alphas),
        "haystack": haystack.name,
    }


# ---------------------------------------------------------------------------------------------- on the terminal


def print_result(result: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{result['model']}[/]: {result['layers']} layers{_reach_in_words(result)}")
    _print_cliff(result, console)
    _print_gradient(result, console)
    alpha, said = result["alpha"]["residual_share"], result["predictions"]
    if alpha is not None and said:
        console.print(
            f"alpha = {alpha:.3f} (measured): bound of Xiao {said['xiao_bound']:.0f} tokens, "
            f"exact mixture: mean {said['mixture_mean']:.0f}, horizon {said['mixture_horizon']} tokens"
        )


def _reach_in_words(result: dict[str, Any]) -> str:
    far, others = result["reach"], result["reach_of_other_tokens"]
    if far is not None:
        return (
            f", W = {result['window']:,}; reach R = {far:,} tokens back, receptive field "
            f"{result['receptive_field']:,}, W·k = {result['window_times_layers']:,}"
        )
    if others is not None:
        return f"; the reach is unbounded for global tokens and {others:,} tokens back for all others"
    return "; the reach is unbounded"


def _print_cliff(result: dict[str, Any], console: Console) -> None:
    if result["cliff_note"]:
        console.print(f"Cliff test: {result['cliff_note']}")
    if not result["cliff"]:
        return
    table = Table(title="Cliff test: is the output bit-identical when tokens change?", title_justify="left")
    for name in ("path", "without a path to the query", "with one"):
        table.add_column(name)
    for path in dict.fromkeys(row["path"] for row in result["cliff"]):
        rows = [row for row in result["cliff"] if row["path"] == path]
        if "unavailable" in rows[0]:
            table.add_row(path, f"[dim]not available: {escape(rows[0]['unavailable'])}[/]", "")
            continue
        beyond = [row["equal"] for row in rows if row["expected"]]
        within = [row["distance"] for row in rows if not row["expected"] and not row["equal"]]
        verdict = "[green]identical[/]" if all(beyond) else "[red]DIFFERS[/]"
        table.add_row(path, f"{verdict} ({sum(beyond)} of {len(beyond)})", f"seen to {max(within)}" if within else "")
    console.print(table)


def _print_gradient(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Gradient field: distance that holds so much of the energy", title_justify="left")
    for name in ("", "50 %", "90 %", "99 %"):
        table.add_column(name, justify="right")
    for moment in ("before", "after"):
        cells = [
            f"{row['distance']}" + (f" ({row['in_windows']:.1f} W)" if row["in_windows"] is not None else "")
            for row in result["gradient"][moment]["quantiles"]
        ]
        table.add_row(f"{moment} training", *cells)
    console.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.reach", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where reach.json goes; default: the run folder, or here")
    parser.add_argument("--plot", action="store_true", help="also write mask.png, layers.png, cone.png, reach.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=16, help="held-out texts for the gradient field")
    parser.add_argument("--max-tokens", type=int, default=8192, help="longest sequence to run")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to read instead of the run's held-out text")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    console = Console()
    examined = load_model(args.model, args.device)
    result = measure(examined, open_haystack(examined, args.text), args.seed, args.texts, args.max_tokens)
    out = examined.out_dir(args.out)
    (out / "reach.json").write_text(json.dumps(result, indent=1))
    print_result(result, console)
    if args.plot:
        mask_plots.write(examined.specs, out)
        plots.save(plots.reach_figure(result), out / "reach.png")
    console.print(f"Written: {out / 'reach.json'}")
    if result["cliff_holds"] is False:
        raise SystemExit("a token beyond the reach changed the output: the attention path that differs is at fault")


if __name__ == "__main__":
    sys.exit(cli(main))
