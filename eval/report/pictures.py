"""The pictures of the report: what is drawn, and the sentence below it that says what to see."""

import io
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from eval import plots, relay
from eval.report.runs import Result, Run


@dataclass(frozen=True)
class Picture:
    """`draw(narrow)` makes the figure for wide screens or for phones; `name` is unique on the page."""

    name: str
    draw: Callable[[bool], Figure]
    caption: str

    @property
    def wide(self) -> Markup:
        return Markup(plots.svg(self.draw(False), f"{self.name}-wide"))

    @property
    def narrow(self) -> Markup:
        return Markup(plots.svg(self.draw(True), f"{self.name}-narrow"))

    def png(self) -> io.BytesIO:
        buffer = io.BytesIO()
        plots.save(self.draw(False), buffer)
        buffer.seek(0)
        return buffer


def hero(runs: list[Run]) -> Picture | None:
    recalls = [run.recall for run in runs if run.recall]
    if not recalls:
        return None
    caption = (
        "Share of right answers by the distance between value and question, with 95 % intervals. Left of W one "
        "layer sees the value; up to R it must be handed on from layer to layer; beyond R nothing can arrive. "
    )
    fields = [run.reach for run in runs if run.reach]
    if runs[0].reach and runs[0].reach["predictions"]:
        caption += (
            "Xiao's bound and the mixture are what an average layer would let through, at the α measured on this "
            "checkpoint. "
        )
    if fields:
        caption += "Below, on the same axis: where the gradient of the output goes."
    several = fields if len(fields) > 1 else []
    main = runs[0].reach
    return Picture("hero", lambda narrow: plots.hero_figure(recalls, main, None, narrow, several), caption)


def field_picture(run: Run, name: str) -> Picture | None:
    found = run.reach
    if found is None:
        return None
    caption = "Energy of the input gradient by distance, before and after training."
    if found["predictions"]:
        caption += " Dashed: the influence that Xiao's recurrence gives when it is iterated exactly, at the measured α."
    return Picture(name, lambda narrow: plots.reach_figure(found, narrow), caption)


def relay_picture(run: Run, name: str) -> Picture | None:
    found = run.relay
    if found is None:
        return None
    caption = f"Where the value can be read, after each layer and so far behind it. {relay.finding(found)}"
    return Picture(name, lambda narrow: plots.relay_figure(found, narrow), caption)


def heat_picture(run: Run, name: str) -> Picture | None:
    found = run.heat
    if found is None:
        return None
    caption = f"Recall by total length and depth of the needle ({found['task']})."
    if found["reach"] is not None:
        caption += " Above the line the needle is more than R tokens back."
    return Picture(name, lambda narrow: plots.heat_figure(found, narrow), caption)


def loss_picture(runs: list[Run]) -> Picture | None:
    losses: list[Result] = [run.loss for run in runs if run.loss]
    if not losses:
        return None
    caption = (
        "Bits a token on held-out text: by position in a row, and the same tokens given only the last c tokens. Where "
        "the second curve is flat, more context no longer helps. Solid line: W; dashed: R."
    )
    return Picture("loss", lambda narrow: plots.loss_figure(losses, narrow), caption)


def training_picture(runs: list[Run]) -> Picture | None:
    metrics = [(run.name, run.metrics) for run in runs if run.metrics]
    if not metrics or plots.training_figure(metrics) is None:
        return None

    def draw(narrow: bool) -> Figure:
        drawn = plots.training_figure(metrics, narrow)
        assert drawn is not None
        return drawn

    return Picture("training", draw, "From metrics.jsonl, by step.")
