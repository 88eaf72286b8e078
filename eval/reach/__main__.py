"""How far a model can see: theory, the exact cliff, and where the gradient goes.

    python -m eval.reach MODEL [--out DIR] [--plot]

1. **Theory**: reach R, receptive field R + 1 and W·k, from the descriptions of the layers.
2. **Cliff test** (`eval.reach.cliff`): a token that can't reach the query must not change one bit of its logits.
3. **Gradient field** (`eval.reach.gradient`): how the energy of the input gradient is spread over distance.
4. **Alpha** (`eval.reach.theory`): the share of the residual stream that a layer leaves as it is, and predictions.

`--plot` adds pictures: `mask.png`, `layers.png`, `cone.png` (`eval.reach.masks`) and `reach.png`, the gradient field.
"""

import numpy as np
from rich.console import Console

from eval.command import at_least, new_parser, prepare
from eval.haystack import Haystack
from eval.models import Examined, nominal_reach
from eval.report.runs import Result
from eval.report.tables import reach_tables
from model import windows
from model.errors import cli
from training.processes.signals import end_process
from training.run.checkpoint import write_json


def field_length(examined: Examined, max_tokens: int) -> int:
    """Tokens of a text for the gradient field: the reach and two windows more, at most `max_tokens`."""
    window = examined.window or 64
    return min(nominal_reach(examined.specs, window) + 2 * window, max_tokens, examined.max_tokens or max_tokens)


def measure(examined: Examined, haystack: Haystack, seed: int = 0, texts: int = 16, max_tokens: int = 8192) -> Result:
    """Everything that reach.json holds."""
    from eval.reach.cliff import cliff, cliff_holds
    from eval.reach.gradient import gradient_field
    from eval.reach.theory import predictions, residual_shares

    sample = haystack.rows(texts, field_length(examined, max_tokens), seed)
    alphas = residual_shares(examined, sample)
    alpha = float(np.mean(alphas)) if alphas else None
    field, (rows, note) = gradient_field(examined, sample, seed), cliff(examined, seed, max_tokens)
    return examined.header() | {
        "seed": seed,
        "receptive_field": None if examined.reach is None else examined.reach + 1,
        "reach_of_other_tokens": windows.reach_of_other_tokens(examined.specs),
        "layer_specs": [vars(spec) for spec in examined.specs],
        "cliff": rows,
        "cliff_note": note,
        "cliff_holds": cliff_holds(rows) if rows else None,
        "gradient": field,
        "alpha": {"residual_share": alpha, "residual_share_by_layer": alphas},
        "predictions": predictions(examined, alphas),
        "haystack": haystack.name,
    }


def print_result(result: Result, console: Console) -> None:
    far, others = result["reach"], result["reach_of_other_tokens"]
    words = "; the reach is unbounded"
    if far is not None:
        words = (
            f", W = {result['window']:,}; reach R = {far:,} tokens back, receptive field "
            f"{result['receptive_field']:,}, W·k = {result['window_times_layers']:,}"
        )
    elif others is not None:
        words += f" for global tokens and {others:,} tokens back for all others"
    console.print(f"{result['model']}: {result['layers']} layers{words}", markup=False)
    if result["cliff_note"]:
        console.print(f"Cliff test: {result['cliff_note']}")
    for table in reach_tables(result).values():
        table.print(console)


def main() -> None:
    parser = new_parser("reach", __doc__)
    parser.add_argument("--plot", action="store_true", help="also write mask.png, layers.png, cone.png, reach.png")
    parser.add_argument("--texts", type=at_least(1), default=16, help="texts for the gradient; default %(default)s")
    parser.add_argument("--max-tokens", type=at_least(8), default=8192, help="longest sequence; default %(default)s")
    args = parser.parse_args()
    console = Console()
    examined, out, haystack = prepare(args)
    result = measure(examined, haystack, args.seed, args.texts, args.max_tokens)
    write_json(out / "reach.json", result)
    print_result(result, console)
    if args.plot:
        from eval import plots
        from eval.reach import masks

        masks.write(examined.specs, out)
        plots.save(plots.reach_figure(result), out / "reach.png")
    print(f"Written: {out / 'reach.json'}")
    if result["cliff_holds"] is False:
        raise SystemExit("a token beyond the reach changed the output: the attention path that differs is at fault")


if __name__ == "__main__":
    end_process(cli(main))
