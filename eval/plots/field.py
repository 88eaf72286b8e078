"""Where the gradient goes, and what others predict."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eval.plots.canvas import COLORS, GREY, GRID, INK, STYLE, figure, marks

FloatArray = NDArray[np.float64]
LOWEST = 1e-12  # of the energy that a picture shows


def draw_field(ax: Axes, reach: dict[str, Any], window: int | None) -> None:
    """Share of the gradient's energy at each distance before and after training, and the mixture; logarithmic axis."""
    scale, floor = float(window or 1), 1.0
    for i, (moment, color) in enumerate((("before", GREY), ("after", COLORS[0]))):
        floor = min(floor, _draw_energy(ax, reach, moment, scale, color, f"{moment} training", 2 + i))
    mixture = reach["predictions"].get("mixture")
    if mixture:
        _draw_shown(ax, np.array(mixture), scale, color=COLORS[1], lw=1.2, ls="--", label="exact mixture")
    _finish(ax, reach, scale, floor)


def draw_fields(ax: Axes, fields: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    """The fields of several models after training, each in windows of its own and in its colour of the curves above."""
    floor = 1.0
    for i, reach in enumerate(fields):
        color = colors.get(reach["model"], GREY)
        floor = min(floor, _draw_energy(ax, reach, "after", float(reach["window"] or 1), color, "", 2, i))
    _finish(ax, fields[0], float(fields[0]["window"] or 1), floor)


def _draw_shown(ax: Axes, energy: FloatArray, scale: float, **style: Any) -> FloatArray:
    """The values that a logarithmic axis can show; returns them."""
    shown = energy > LOWEST
    ax.plot(np.arange(len(energy))[shown] / scale, energy[shown], **style)
    return energy[shown]


def _draw_energy(
    ax: Axes, reach: dict[str, Any], moment: str, scale: float, color: str, label: str, zorder: int, series: int = 0
) -> float:
    """One curve, with a mark where 99 % of the energy is passed; returns the lowest value that the axis should show."""
    energy = np.array(reach["gradient"][moment]["energy"])
    shown = _draw_shown(ax, energy, scale, color=color, lw=1.5, label=label or None, zorder=zorder)
    for row in reach["gradient"][moment]["quantiles"]:
        if row["share"] == 0.99:
            tip = f"{label or reach['model']}: 99 % of the energy lies within {row['distance']:,} tokens"
            y = max(energy[row["distance"]], LOWEST)
            marks(ax, f"field-{moment}-{series}", [row["distance"] / scale], [y], [tip], color)
    return float(shown.min()) / 3


def _finish(ax: Axes, reach: dict[str, Any], scale: float, floor: float) -> None:
    if reach["reach"] is not None:
        ax.axvline(reach["reach"] / scale, color=INK, lw=1.0, zorder=1)
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(LOWEST, floor))
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_ylabel("gradient energy")
    ax.grid(axis="y", color=GRID, lw=0.8)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right", fontsize=8)


def reach_figure(reach: dict[str, Any], narrow: bool = False) -> Figure:
    """The gradient field alone, with the predictions of others on the same axis."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(narrow, 0.8)
        ax = drawn.subplots()
        draw_field(ax, reach, reach["window"])
        ax.set_xlim(left=0)
        ax.set_xlabel("distance, in windows W" if reach["window"] else "distance, tokens")
        return drawn
