"""Curves: recall and the gradient by distance, losses by position and context, and training by step."""

from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GREY, GRID, INK, MUTED, distance_unit, figure, landmark, marks, styled

LOWEST = 1e-12  # the smallest share of the gradient energy that a picture shows
PANELS = (  # title, kind of line in metrics.jsonl, its columns and the label of each
    ("Training loss, nats", "train", {"loss_text": "text", "loss_answer": "answers", "loss_relay": "relay head"}),
    ("Held-out text, bits per byte", "validation", {"bits_per_byte": "held-out"}),
    ("Distance recalled in 90 % of cases, tokens", "probe", {"horizon": "recall"}),
    ("Longest distance in training, tokens", "train", {"distance": "curriculum"}),
)
Result = dict[str, Any]
Panels = dict[str, dict[str, list[tuple[int, float]]]]  # title -> label of a curve -> (step, value)


@styled
def hero_figure(results: list[Result], reach: Result | None = None, narrow: bool = False) -> Figure:
    """Recall against distance in windows, with intervals and H90; below it the gradient field, if there is one.

    `results` are recall.json of several models: all tasks of the first are drawn, and its first task of the others.
    `reach` is reach.json of the first model.
    """
    drawn = figure(narrow, 1.35 if reach else 1.0)
    axes = drawn.subplots(2 if reach else 1, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1] if reach else None)
    _draw_recall(axes[0, 0], results, narrow)
    _draw_landmarks(axes[0, 0], results[0], (reach or {}).get("predictions", {}), narrow)
    if reach:
        _draw_field(axes[1, 0], reach)
    axes[-1, 0].set_xlabel(f"distance, {distance_unit(results[0])}")
    return drawn


@styled
def reach_figure(reach: Result, narrow: bool = False) -> Figure:
    """The gradient field of one model alone."""
    drawn = figure(narrow, 0.8)
    ax = drawn.subplots(subplot_kw={"xlabel": f"distance, {distance_unit(reach)}"})
    _draw_field(ax, reach)
    ax.set_xlim(0, None)
    return drawn


def _draw_recall(ax: Axes, results: list[Result], narrow: bool) -> None:
    main, task = results[0], next(iter(results[0]["tasks"]))
    curves = [(main, name) for name in main["tasks"]] + [(r, task) for r in results[1:] if task in r["tasks"]]
    for i, (result, name) in enumerate(curves):
        color = GREY if result is not main and len(results) == 2 else COLORS[i % len(COLORS)]
        label = name if len(results) == 1 else result["model"] + (f", {name}" if name != task else "")
        style = {"color": color, "label": label, "ls": ("-", "--", ":")[i // len(COLORS) % 3]}
        _draw_task(ax, result, name, style | {"zorder": 3 if result is main else 2})
    chance = main["tasks"][task]["chance"]
    ax.axhline(chance, color=MUTED, lw=0.9, ls=(0, (1, 2)))
    ax.annotate("chance", (0.005, chance), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED, va="bottom")
    ax.set(ylim=(-0.02, 1.04), xlim=(0, None), ylabel="recall: right answers")
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    ax.grid(axis="y", color=GRID, lw=0.8)
    if len(curves) > 3:
        ax.figure.legend(loc="outside lower center", ncols=1 if narrow else 3, fontsize=8.5)
    elif len(curves) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.17), fontsize=8.5)


def _draw_task(ax: Axes, result: Result, task: str, style: Result) -> None:
    label, scale, entry = style["label"], result["window"] or 1, result["tasks"][task]
    tip = "{label}: distance {distance:,} tokens, recall {accuracy:.1%} [{low:.1%}, {high:.1%}], n = {n}"
    tips = [tip.format(label=label, **row) for row in entry["rows"]]
    x, y, low, high = np.array([[row[k] for k in ("distance", "accuracy", "low", "high")] for row in entry["rows"]]).T
    _draw_interval(ax, x / scale, y, low, high, style, tips)
    if h90 := entry["h90"]:
        tip = f"{label}: H90 = {h90:,} tokens, the farthest distance recalled in at least 90 % of cases"
        marks(ax, [h90 / scale], [0.9], [tip], "white", 34, marker="D", edgecolors=style["color"])


def _draw_interval(ax: Axes, x: Any, y: Any, low: Any, high: Any, style: Result, tips: Sequence[str] = ()) -> None:
    """Draw a curve with a dot at each point, and its interval as a band; `tips` are hover texts of the dots."""
    ax.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0, zorder=1)
    ax.plot(x, y, lw=1.8, **style)
    marks(ax, x, y, tips, style["color"])


def _draw_landmarks(ax: Axes, result: Result, predictions: Result, narrow: bool) -> None:
    """Draw lines at W, 1.5 W, R, W·k, H90 and the predictions. Labels that may meet get other sides or levels."""
    window, far = result["window"], result["reach"]
    if h90 := next(iter(result["tasks"].values()))["h90"]:
        landmark(ax, h90 / (window or 1), f"◇ H90 = {h90:,}", "left", (0, (1, 2)), MUTED, level=1)
    if not window:
        return
    landmark(ax, 1.0, "W", "left")
    landmark(ax, 1.5, "1.5 W", "right", "--", MUTED)
    if predictions:
        landmark(ax, predictions["xiao_bound"] / window, "Xiao’s bound", "right", ":", MUTED, level=3)
        landmark(ax, predictions["mixture_horizon"] / window, "mixture", "right", "-.", MUTED, level=2)
    if far is not None:
        landmark(ax, far / window, "R" if narrow else "R = k(W−1)", "left")
        landmark(ax, result["window_times_layers"] / window, "W·k", "right", "--", MUTED)


def _draw_field(ax: Axes, reach: Result) -> None:
    """Draw the share of the gradient energy at each distance, before and after training, and the mixture."""
    scale = reach["window"] or 1
    curves = [(reach["predictions"].get("mixture", []), COLORS[1], "--", "mixture (theory)")]
    for moment, color in (("before", GREY), ("after", COLORS[0])):
        energy, quantiles = reach["gradient"][moment]["energy"], reach["gradient"][moment]["quantiles"]
        curves.append((energy, color, "-", f"{moment} training"))
        d99 = next(row["distance"] for row in quantiles if row["share"] == 0.99)
        tip = f"{moment} training: 99 % of the energy comes from at most {d99:,} tokens back"
        marks(ax, [d99 / scale], [max(energy[d99], LOWEST)], [tip], color)
    for values, color, line, label in curves:
        (shown,) = np.nonzero(np.array(values) > LOWEST)  # what a logarithmic axis can show
        if len(shown):
            ax.plot(shown / scale, np.array(values)[shown], color=color, lw=1.4, ls=line, label=label)
    ax.legend(loc="upper right", fontsize=8)
    if reach["reach"] is not None:
        ax.axvline(reach["reach"] / scale, color=INK, lw=1.0, zorder=1)
    ax.set(yscale="log", ylabel="share of the\ngradient energy")
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(axis="y", color=GRID, lw=0.8)


@styled
def loss_figure(losses: list[Result], narrow: bool = False) -> Figure:
    """Loss of held-out text by position and by context, with 95 % intervals; `losses` are loss.json of each model."""
    drawn = figure(narrow, 1.5 if narrow else 0.75)
    axes = drawn.subplots(2, 1) if narrow else drawn.subplots(1, 2)
    for ax, word, x_key in ((axes[0], "position", "middle"), (axes[1], "context", "context")):
        for color, loss in zip(cycle(COLORS), losses, strict=False):
            keys = (x_key, "bits_per_token", "standard_error")
            rows = [[row[key] for key in keys] for row in loss[f"by_{word}"]]
            x, y, error = np.array(rows, dtype=float).reshape(-1, 3).T
            style = {"color": color, "label": loss["model"]}
            _draw_interval(ax, np.maximum(1.0, x), y, y - 1.96 * error, y + 1.96 * error, style)
            for tokens, line in ((loss["window"], "-"), (loss["reach"], "--")):
                if tokens:
                    ax.axvline(tokens, color=INK, lw=0.8, ls=line)
        ax.set(title=f"Loss by {word}", xlabel=f"{word}, tokens", ylabel="bits per token")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        ax.grid(axis="y", color=GRID, lw=0.8)
    if len(losses) > 1:
        axes[0].legend(fontsize=8)
    return drawn


@styled
def training_figure(panels: Panels, narrow: bool = False) -> Figure:
    """One panel for each of `training_panels`, against the step."""
    rows = len(panels) if narrow else (len(panels) + 1) // 2
    drawn = figure(narrow, (0.6 if narrow else 0.5) * rows)
    for i, (title, curves) in enumerate(panels.items()):
        ax = drawn.add_subplot(rows, 1 if narrow else 2, i + 1)
        for color, (label, points) in zip(cycle(COLORS), curves.items(), strict=False):
            ax.plot(*np.array(points).T, color=color, lw=1.4, label=label)
            some = points[:: max(1, len(points) // 40)]
            tips = [f"{label}: step {step:,}, {value:.3g}" for step, value in some]
            steps, values = np.array(some).T
            marks(ax, steps, values, tips, color, size=9)
        ax.set_title(title, fontsize=9.5)
        ax.set(xlabel="step", ylim=(0, None))
        ax.grid(axis="y", color=GRID, lw=0.8)
        if len(curves) > 1:
            ax.legend(fontsize=8)
    return drawn


def training_panels(runs: list[tuple[str, list[Result]]]) -> Panels:
    """The quantities that were logged, for the names of runs and the lines of their metrics.jsonl.

    A single run shows all columns of a panel. Several runs share the panels and show the first column of each.
    """
    panels: Panels = {}
    for (title, kind, columns), (name, lines) in product(PANELS, runs):
        for column, label in list(columns.items())[: None if len(runs) == 1 else 1]:
            logged = [line for line in lines if line.get("kind") == kind and isinstance(line.get(column), int | float)]
            if logged:
                curve = label if len(runs) == 1 else name
                panels.setdefault(title, {})[curve] = [(line["step"], line[column]) for line in logged]
    return panels
