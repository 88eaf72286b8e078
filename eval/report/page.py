"""The report: all tables and pictures of some runs, as one HTML page that fetches nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from eval import plots
from eval.report import sentences, tables
from eval.report.runs import Run
from eval.report.tables import Table


class Picture(NamedTuple):
    """`draw(narrow)` draws the figure for wide screens or for phones; the caption says what to see."""

    draw: Callable[[bool], Figure]
    caption: str

    def svg(self, name: str, narrow: bool) -> Markup:
        """The picture as inline SVG; `name` must be unique on the page."""
        return Markup(plots.svg(self.draw(narrow), f"{name}-{'narrow' if narrow else 'wide'}"))


class Contents(NamedTuple):
    """Tables and pictures, by the names that they have in a tracker."""

    tables: dict[str, Table]
    pictures: dict[str, Picture]


def shared(runs: list[Run]) -> Contents:
    """What shows all runs together."""
    pictures = {}
    if any("recall" in run.results for run in runs):
        pictures["recall"] = recall_picture(runs)
    if losses := [run.results["loss"] for run in runs if "loss" in run.results]:
        caption = (
            "Bits per token on held-out text: by the position of the token; and by context, for the same tokens "
            "predicted from only the last tokens. Where the curve by context is flat, more context no longer helps. "
            "Solid line: W. Dashed line: R."
        )
        pictures["loss"] = Picture(partial(plots.loss_figure, losses), caption)
    metrics = [(run.name, run.metrics) for run in runs]
    if plots.has_curves(metrics):
        pictures["training"] = Picture(partial(plots.training_figure, metrics), "From metrics.jsonl, by step.")
    return Contents(tables.comparison(runs) if len(runs) > 1 else {}, pictures)


def recall_picture(runs: list[Run]) -> Picture:
    """Recall by distance of all runs, and the gradient field below it."""
    recalls = [run.results["recall"] for run in runs if "recall" in run.results]
    caption = (
        "Share of right answers by the distance between value and question, with 95 % intervals. Left of W one layer "
        "sees the value. Up to R it must be passed on from layer to layer. Beyond R nothing can arrive. A diamond "
        "marks H90, the farthest distance that is recalled in at least 90 % of cases, if there is one."
    )
    main = runs[0].results.get("reach")
    fields = [run.results["reach"] for run in runs if "reach" in run.results]
    if main and main["predictions"]:
        caption += (
            " Xiao's bound and the mixture are predictions for an average layer, from the share α of the residual "
            "stream that was measured on this checkpoint."
        )
    if fields:
        caption += " Below, on the same axis: how much the output depends on the token at each distance."
    several = fields if len(fields) > 1 else []
    return Picture(lambda narrow: plots.hero_figure(recalls, main, narrow, several), caption)


def of_one(run: Run) -> Contents:
    """What shows one run alone."""
    pictures = {}
    if relay := run.results.get("relay"):
        from eval.relay import finding  # imports torch

        caption = f"How often the value can be read, after each layer and at each distance behind it. {finding(relay)}"
        pictures["relay_map"] = Picture(partial(plots.relay_figure, relay), caption)
    if heat := run.results.get("heat"):
        caption = f"Recall by total length and depth of the needle (task {heat['task']})."
        caption += " Above the line the needle is more than R tokens back." if heat["reach"] is not None else ""
        pictures["heat_map"] = Picture(partial(plots.heat_figure, heat), caption)
    if reach := run.results.get("reach"):
        caption = "Share of the input gradient's energy at each distance, before and after training."
        caption += " Dashed: Xiao's recurrence, iterated exactly at the measured α." if reach["predictions"] else ""
        pictures["gradient_field"] = Picture(partial(plots.reach_figure, reach), caption)
    return Contents(tables.tables_of(run), pictures)


def page(runs: list[Run]) -> str:
    """The whole report as HTML."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        title=title(runs), runs=runs, shared=shared(runs), contents=[of_one(run) for run in runs], say=sentences
    )


def title(runs: list[Run]) -> str:
    if len(runs) > 3:
        return f"{runs[0].name} and {len(runs) - 1} others"
    return " against ".join(run.name for run in runs)
