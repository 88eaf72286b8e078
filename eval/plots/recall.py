"""Recall by distance with what theory says on the same axis, and the gradient field below it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GREY, GRID, INK, MUTED, figure, landmark, marks, styled

LINES = ("-", "--", ":")
LOWEST = 1e-12  # the smallest share of the gradient energy that a picture shows


@styled
def hero_figure(
    results: list[dict[str, Any]],
    reach: dict[str, Any] | None = None,
    narrow: bool = False,
    fields: Sequence[dict[str, Any]] = (),
) -> Figure:
    """Recall against distance in windows, with intervals and H90; below it the gradient field, if there is one.

    `results` are recall.json of several models: all tasks of the first are drawn, and its first task of the others.
    `reach` is reach.json of the first model. `fields` are reach.json of several models, to be compared below.
    """
    fields = list(fields) or ([reach] if reach and reach.get("gradient") else [])
    drawn = figure(narrow, 1.35 if fields else 1.0)
    axes = drawn.subplots(2 if fields else 1, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1] if fields else None)
    top, bottom = axes[0, 0], axes[-1, 0]
    colors = _draw_recall(top, results, narrow)
    _draw_landmarks(top, results[0], (reach or {}).get("predictions", {}), narrow)
    if fields:
        _draw_fields(bottom, fields, colors)
    bottom.set_xlabel(_distance_label(results[0]))
    return drawn


@styled
def reach_figure(reach: dict[str, Any], narrow: bool = False) -> Figure:
    """The gradient field of one model alone."""
    drawn = figure(narrow, 0.8)
    ax = drawn.subplots()
    _draw_fields(ax, [reach], {})
    ax.set(xlim=(0, None), xlabel=_distance_label(reach))
    return drawn


def _distance_label(result: dict[str, Any]) -> str:
    return "distance, in windows of W tokens" if result["window"] else "distance, in tokens"


def _scale(result: dict[str, Any]) -> float:
    """Tokens per unit of the distance axis."""
    return float(result["window"] or 1)


def _draw_recall(ax: Axes, results: list[dict[str, Any]], narrow: bool) -> dict[str, str]:
    """Draw the curves and return the colour of each model."""
    main, task = results[0], next(iter(results[0]["tasks"]))
    curves = [(main, name) for name in main["tasks"]] + [(r, task) for r in results[1:] if task in r["tasks"]]
    colors: dict[str, str] = {}
    for i, (result, name) in enumerate(curves):
        color = GREY if result is not main and len(results) == 2 else COLORS[i % len(COLORS)]
        label = name if len(results) == 1 else result["model"] + (f", {name}" if name != task else "")
        _draw_curve(ax, result, name, color, label, LINES[i // len(COLORS) % len(LINES)], 3 if result is main else 2)
        colors.setdefault(result["model"], color)
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
    return colors


def _draw_curve(ax: Axes, result: dict[str, Any], task: str, color: str, label: str, line: str, zorder: int) -> None:
    entry = result["tasks"][task]
    rows, h90 = entry["rows"], entry["h90"]
    x = np.array([row["distance"] for row in rows]) / _scale(result)
    y = [row["accuracy"] for row in rows]
    low, high = ([row[key] for row in rows] for key in ("low", "high"))
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=zorder - 1)
    ax.plot(x, y, color=color, lw=1.8, ls=line, label=label, zorder=zorder)
    tips = [
        f"{label}: distance {row['distance']:,} tokens ({d:.1f} W), recall {row['accuracy']:.1%} "
        f"[{row['low']:.1%}, {row['high']:.1%}], n = {row['n']}"
        for row, d in zip(rows, x, strict=True)
    ]
    marks(ax, x, y, tips, color)
    if h90:
        tip = f"{label}: H90 = {h90:,} tokens, the farthest distance recalled in at least 90 % of cases"
        marks(ax, [h90 / _scale(result)], [0.9], [tip], "white", 34, marker="D", edgecolors=color)


def _draw_landmarks(ax: Axes, result: dict[str, Any], predictions: dict[str, Any], narrow: bool) -> None:
    """Draw lines at W, 1.5 W, R and W·k, at H90, and at Xiao's bound and the mixture's horizon if they are predicted.

    R and W·k nearly touch, so their labels go to opposite sides. What is measured can be anywhere, so its labels have
    levels of their own.
    """
    window = result["window"]
    h90 = next(iter(result["tasks"].values()))["h90"]
    if h90:
        landmark(ax, h90 / _scale(result), f"◇ H90 = {h90:,}", "left", (0, (1, 2)), MUTED, level=1)
    if not window:
        return
    landmark(ax, 1.0, "W", "left")
    landmark(ax, 1.5, "1.5 W", "right", "--", MUTED)
    if predictions:
        landmark(ax, predictions["xiao_bound"] / window, "Xiao’s bound", "right", ":", MUTED, level=3)
        landmark(ax, predictions["mixture_horizon"] / window, "mixture", "right", "-.", MUTED, level=2)
    if result["reach"] is not None:
        landmark(ax, result["reach"] / window, "R" if narrow else "R = k(W−1)", "left")
        landmark(ax, result["window_times_layers"] / window, "W·k", "right", "--", MUTED)


def _draw_fields(ax: Axes, fields: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    """Draw the share of the gradient energy at each distance, on a logarithmic axis.

    Of one model: before and after training, and the mixture. Of several: after training, in the `colors` of the models.
    """
    main = fields[0]
    if len(fields) == 1:
        curves = [(main, "before", GREY, "before training"), (main, "after", COLORS[0], "after training")]
    else:
        curves = [(field, "after", colors.get(field["model"], GREY), field["model"]) for field in fields]
    for field, moment, color, label in curves:
        energy = np.array(field["gradient"][moment]["energy"])
        _draw_positive(ax, energy, _scale(field), color=color, lw=1.5, label=label)
        d99 = next(row["distance"] for row in field["gradient"][moment]["quantiles"] if row["share"] == 0.99)
        tip = f"{label}: 99 % of the energy comes from at most {d99:,} tokens back"
        marks(ax, [d99 / _scale(field)], [max(energy[d99], LOWEST)], [tip], color)
    if len(fields) == 1:
        mixture = np.array(main["predictions"].get("mixture", []))
        _draw_positive(ax, mixture, _scale(main), color=COLORS[1], lw=1.2, ls="--", label="mixture (theory)")
        ax.legend(loc="upper right", fontsize=8)
    if main["reach"] is not None:
        ax.axvline(main["reach"] / _scale(main), color=INK, lw=1.0, zorder=1)
    ax.set(yscale="log", ylabel="share of the\ngradient energy")
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(axis="y", color=GRID, lw=0.8)


def _draw_positive(ax: Axes, values: np.ndarray, scale: float, **style: Any) -> None:
    """Draw the values that the logarithmic axis shows."""
    (shown,) = np.nonzero(values > LOWEST)
    if len(shown):
        ax.plot(shown / scale, values[shown], **style)
