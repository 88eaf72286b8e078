"""Recall by distance, with what theory says on the same axis."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GREY, GRID, INK, MUTED, STYLE, figure, marks
from eval.plots.field import draw_field, draw_fields

LINES = ("-", "--", ":")


def hero_figure(
    results: list[dict[str, Any]],
    reach: dict[str, Any] | None = None,
    task: str | None = None,
    narrow: bool = False,
    fields: Sequence[dict[str, Any]] = (),
) -> Figure:
    """Recall against distance in W with intervals; one further result in grey; the gradient field on the same axis.

    `reach` is that of the first result; `fields` are those of several, whose trained fields are then drawn instead.
    """
    with matplotlib.rc_context(STYLE):
        task = task or next(iter(results[0]["tasks"]))
        fields = list(fields) or ([reach] if reach and reach.get("gradient") else [])
        drawn = figure(narrow, 1.35 if fields else 1.0)
        if fields:
            top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        else:
            top = bottom = drawn.subplots()
        colors = _draw_recall(top, results, task, reach, narrow)
        if len(fields) == 1:
            draw_field(bottom, fields[0], results[0]["window"])
        elif fields:
            draw_fields(bottom, fields, colors)
        bottom.set_xlabel("distance, in windows W" if results[0]["window"] else "distance, tokens")
        return drawn


def _scale(result: dict[str, Any]) -> float:
    return float(result["window"] or 1)


def _draw_recall(
    ax: Axes, results: list[dict[str, Any]], task: str, reach: dict[str, Any] | None, narrow: bool
) -> dict[str, str]:
    """The curves: every task of the first result, `task` of the others. Returns the colour of each model."""
    main = results[0]
    shown = [(main, t) for t in main["tasks"]] + [(r, task) for r in results[1:] if task in r["tasks"]]
    colors: dict[str, str] = {}
    for i, (result, name) in enumerate(shown):
        twin = result is not main
        color = COLORS[i % len(COLORS)] if not twin or len(results) > 2 else GREY
        label = name if len(results) == 1 else f"{result['model']}" + (f", {name}" if name != task else "")
        line = LINES[i // len(COLORS) % len(LINES)]
        _draw_curve(ax, result, name, color, label, line, zorder=2 if twin else 3, series=i)
        colors.setdefault(result["model"], color)
    _draw_landmarks(ax, main, reach, narrow)
    _draw_chance(ax, main["tasks"][task]["chance"])
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlim(left=0)
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("recall")
    ax.grid(axis="y", color=GRID, lw=0.8)
    if len(shown) > 3:
        ax.figure.legend(loc="outside lower center", ncols=1 if narrow else 3, fontsize=8.5)
    elif len(shown) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.17), fontsize=8.5)
    return colors


def _draw_chance(ax: Axes, chance: float) -> None:
    ax.axhline(chance, color=MUTED, lw=0.9, ls=(0, (1, 2)))
    ax.annotate("chance", (0.005, chance), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED, va="bottom")


def _draw_curve(
    ax: Axes, result: dict[str, Any], task: str, color: str, label: str, line: str, zorder: int, series: int
) -> None:
    rows = result["tasks"][task]["rows"]
    x = np.array([row["distance"] for row in rows]) / _scale(result)
    y = np.array([row["accuracy"] for row in rows])
    low, high = ([row[key] for row in rows] for key in ("low", "high"))
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=zorder - 1)
    ax.plot(x, y, color=color, lw=1.8, ls=line, label=label, zorder=zorder)
    tips = [
        f"{label}: distance {row['distance']:,} tokens ({d:.1f} W), recall {row['accuracy']:.1%} "
        f"[{row['low']:.1%}, {row['high']:.1%}], n = {row['n']}"
        for row, d in zip(rows, x, strict=True)
    ]
    marks(ax, f"recall-{series}", x, y, tips, color)


def _draw_landmarks(ax: Axes, result: dict[str, Any], reach: dict[str, Any] | None, narrow: bool) -> None:
    """Lines at W, 1.5 W, Xiao's bound and the mixture's horizon at the measured alpha, R and W k.

    R and W k nearly touch, so their labels part; what depends on alpha may stand anywhere and has rows of its own.
    """
    window = result["window"]
    if not window:
        return
    places = [(1.0, "W", "right", "-", 0), (1.5, "1.5 W", "left", "--", 0)]
    said = (reach or {}).get("predictions", {})
    if said:
        places.append((said["xiao_bound"] / window, "Xiao’s bound at α", "left", ":", 2))
        places.append((said["mixture_horizon"] / window, "mixture at α", "left", "-.", 1))
    if result["reach"] is not None:
        places.append((result["reach"] / window, "R" if narrow else "R = k(W−1)", "right", "-", 0))
        places.append((result["window_times_layers"] / window, "W·k", "left", "--", 0))
    for x, label, side, line, row in places:
        ax.axvline(x, color=INK if line == "-" else MUTED, lw=1.0, ls=line, zorder=1)
        ax.annotate(
            label,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if side == "right" else 3, 2 + 12 * row),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color=INK,
            annotation_clip=False,
        )
