"""Recall by distance, with what theory says on the same axis."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GREY, GRID, INK, MUTED, STYLE, figure, marks
from eval.plots.field import draw_field


def hero_figure(
    results: list[dict[str, Any]], reach: dict[str, Any] | None = None, task: str | None = None, narrow: bool = False
) -> Figure:
    """Recall against distance in W with intervals; further results in grey; the gradient field on the same axis."""
    with matplotlib.rc_context(STYLE):
        task = task or next(iter(results[0]["tasks"]))
        field = reach if reach and reach.get("gradient") else None
        drawn = figure(narrow, 1.35 if field else 1.0)
        if field:
            top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        else:
            top = drawn.subplots()
        _draw_recall(top, results, task, reach, narrow)
        if field:
            draw_field(bottom, field, results[0]["window"])
        axis = bottom if field else top
        axis.set_xlabel("distance, in windows W" if results[0]["window"] else "distance, tokens")
        return drawn


def _scale(result: dict[str, Any]) -> float:
    return float(result["window"] or 1)


def _draw_recall(
    ax: Axes, results: list[dict[str, Any]], task: str, reach: dict[str, Any] | None, narrow: bool
) -> None:
    main = results[0]
    shown = [(main, t) for t in main["tasks"]] + [(r, task) for r in results[1:] if task in r["tasks"]]
    several = len(results) > 1
    for i, (result, name) in enumerate(shown):
        twin = result is not main
        color = COLORS[i] if not twin or len(results) > 2 else GREY
        label = name if not several else f"{result['model']}" + (f", {name}" if name != task else "")
        _draw_curve(ax, result, name, color, label, zorder=2 if twin else 3, series=i)
    _draw_landmarks(ax, main, reach, narrow)
    chance = main["tasks"][task]["chance"]
    ax.axhline(chance, color=MUTED, lw=0.9, ls=(0, (1, 2)))
    ax.annotate("chance", (0.005, chance), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED, va="bottom")
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlim(left=0)
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("recall")
    ax.grid(axis="y", color=GRID, lw=0.8)
    if len(shown) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.17), fontsize=8.5)


def _draw_curve(ax: Axes, result: dict[str, Any], task: str, color: str, label: str, zorder: int, series: int) -> None:
    rows = result["tasks"][task]["rows"]
    x = np.array([row["distance"] for row in rows]) / _scale(result)
    y = np.array([row["accuracy"] for row in rows])
    low, high = ([row[key] for row in rows] for key in ("low", "high"))
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=zorder - 1)
    ax.plot(x, y, color=color, lw=1.8, label=label, zorder=zorder)
    tips = [
        f"{label}: distance {row['distance']:,} tokens ({d:.1f} W), recall {row['accuracy']:.1%} "
        f"[{row['low']:.1%}, {row['high']:.1%}], n = {row['n']}"
        for row, d in zip(rows, x, strict=True)
    ]
    marks(ax, f"recall-{series}", x, y, tips, color)


def _draw_landmarks(ax: Axes, result: dict[str, Any], reach: dict[str, Any] | None, narrow: bool) -> None:
    """Lines at W, 1.5 W, the mixture horizon, R and W k; R and W k nearly touch, so their labels part."""
    window = result["window"]
    if not window:
        return
    marks = [(1.0, "W", "right", "-"), (1.5, "1.5 W", "left", "--")]
    horizon = (reach or {}).get("predictions", {}).get("mixture_horizon")
    if horizon:
        marks.append((horizon / window, "mixture", "left", ":"))
    if result["reach"] is not None:
        marks.append((result["reach"] / window, "R" if narrow else "R = k(W−1)", "right", "-"))
        marks.append((result["window_times_layers"] / window, "W·k", "left", "--"))
    for x, label, side, line in marks:
        ax.axvline(x, color=INK if line == "-" else MUTED, lw=1.0, ls=line, zorder=1)
        shift = -3 if side == "right" else 3
        height = 14 if label == "mixture" else 2  # a second row: it may stand anywhere
        ax.annotate(
            label,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(shift, height),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color=INK,
            annotation_clip=False,
        )
