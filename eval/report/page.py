"""The report: all tables and pictures of some runs, as one HTML page that fetches nothing.

The sentences around them, the headline figures and the captions of the pictures are in `templates/report.html`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from eval import plots
from eval.report import tables
from eval.report.runs import Result, Run
from model.config import WindreachConfig
from model.hub import load_config

EXPLORER = Path(__file__).parents[2] / "docs" / "explore.html"
LONGEST_EXPLORED = 1 << 20  # tokens; docs/explore.html draws no longer sequence

Drawing = Callable[[bool], Figure]  # draws for wide screens (False) or for phones (True)
Contents = tuple[dict[str, tables.Table], Mapping[str, Drawing]]  # by the names that they have in a tracker


def shared(runs: list[Run]) -> Contents:
    """The tables and pictures that show all runs together."""
    pictures: dict[str, Drawing] = {}
    if recalls := [run.results["recall"] for run in runs if "recall" in run.results]:
        pictures["recall"] = partial(plots.hero_figure, recalls, runs[0].results.get("reach"))
    if losses := [run.results["loss"] for run in runs if "loss" in run.results]:
        pictures["loss"] = partial(plots.loss_figure, losses)
    if panels := plots.training_panels([(run.name, run.metrics) for run in runs]):
        pictures["training"] = partial(plots.training_figure, panels)
    return tables.comparison(runs) if len(runs) > 1 else {}, pictures


def of_one(run: Run) -> Contents:
    """The tables and pictures that show one run alone."""
    draw = {
        "relay_map": ("relay", plots.relay_figure),
        "heat_map": ("heat", plots.heat_figure),
        "gradient_field": ("reach", plots.reach_figure),
    }
    pictures = {name: partial(f, run.results[key]) for name, (key, f) in draw.items() if key in run.results}
    return tables.tables_of(run), pictures


def page(runs: list[Run]) -> str:
    """The whole report as HTML."""
    from eval.receipt.findings import finding as receipt_finding
    from eval.relay import finding as relay_finding  # imports torch
    from training.planning.dry_run import duration

    return template("report.html").render(
        title=title(runs), runs=runs, shared=shared(runs), contents=[of_one(run) for run in runs],
        svg=plots.svg, tokens=tokens, duration=duration, identity=identity, relay_finding=relay_finding,
        receipt_finding=receipt_finding,
        explorer=EXPLORER.read_text(encoding="utf-8"), stack=stack_of(runs[0]),
    )  # fmt: skip


def template(name: str) -> Template:
    """A page of `templates/`. It escapes all text, and a name without a value is an error."""
    loader = PackageLoader("eval.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def stack_of(run: Run) -> str:
    """The model of a run in the form of `explorer_settings`; empty for a folder of results without the model."""
    folder = run.folder / "hf"
    return explorer_settings(load_config(folder)) if (folder / "config.json").exists() else ""


def explorer_settings(config: WindreachConfig) -> str:
    """The settings of docs/explore.html, as they stand behind the # of its address, for the stack of `config`.

    >>> explorer_settings(WindreachConfig(num_hidden_layers=3, layers=[{"window": 8}, {"window": 8}, {"kind": "full"}]))
    'layers=3&pattern=sliding:2:8:1:0,full:1::1:0&length=64&heads=32&kv=8&head=128&bytes=2&hidden=4096&ffn=14336&vocab=32000'
    """
    layers = [(spec.kind, spec.window or "", spec.dilation, spec.global_tokens) for spec in config.specs]
    period = next(n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)])
    kinds = [(layer, len(list(equal))) for layer, equal in groupby(layers[:period])]
    pattern = ",".join(f"{kind}:{count}:{window}:{gap}:{first}" for (kind, window, gap, first), count in kinds)
    length = 1 + max(first for *_, first in layers) + int(1.15 * sum(spec.ring_slots or 0 for spec in config.specs))
    return (
        f"layers={len(layers)}&pattern={pattern}&length={min(max(64, length), LONGEST_EXPLORED)}"
        f"&heads={config.num_attention_heads}&kv={config.num_key_value_heads}&head={config.head_dim}&bytes=2"
        f"&hidden={config.hidden_size}&ffn={config.intermediate_size}&vocab={config.vocab_size}"
    )


def title(runs: list[Run]) -> str:
    if len(runs) > 3:
        return f"{runs[0].name} and {len(runs) - 1} others"
    return " against ".join(run.name for run in runs)


def tokens(count: float, window: int | None = None) -> str:
    """
    >>> tokens(480, 16), tokens(1)
    ('480 tokens (30.0 W)', '1 token')
    """
    share = f" ({count / window:.1f} W)" if window else ""
    return f"{count:,.0f} {'token' if count == 1 else 'tokens'}{share}"


def identity(recall: Result) -> tuple[str, bool | None]:
    """A sentence on the pairs beyond R, and whether all of them were identical (None: no such pairs)."""
    reach = recall["reach"]
    if reach is None:
        return "The reach of this stack is unbounded, so there is no distance at which pairs must be identical.", None
    rows = [row for entry in recall["tasks"].values() for row in entry["rows"] if row["distance"] > reach]
    if not rows:
        return f"No distance beyond R = {reach:,} was measured.", None
    pairs, same = sum(row["n"] for row in rows), sum(round(row["identical_pairs"] * row["n"]) for row in rows)
    where = ", ".join(f"{distance:,}" for distance in sorted({row["distance"] for row in rows}))
    if same < pairs:
        return (
            f"Beyond R = {reach:,} tokens only {same:,} of {pairs:,} pairs are bit-identical (distances {where}). "
            "The model sees farther than its windows allow. This is a fault.",
            False,
        )
    best = max(row["pair_accuracy"] for row in rows)
    return (
        f"Beyond R = {reach:,} tokens all {pairs:,} counterfactual pairs are bit-identical (distances {where}). The "
        f"logits after value v and after value v′ are equal in every bit: nothing of the value arrives. Both "
        f"answers of a pair are right in {best:.0%} of cases.",
        True,
    )
