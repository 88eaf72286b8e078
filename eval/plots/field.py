"""Where the gradient goes, and what others predict."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GREY, GRID, INK, STYLE, figure, marks


def draw_field(ax: Axes, reach: dict[str, Any], window: int | None) -> None:
    """Share of the gradient's energy at each distance, on a logarithmic axis, before and after training."""
    scale, floor = float(window or 1), 1.0
    for i, (moment, color) in enumerate((("before", GREY), ("after", COLORS[0]))):
        energy = np.array(reach["gradient"][moment]["energy"])
        shown = energy > 1e-12
        x = np.arange(len(energy)) / scale
        floor = min(floor, float(energy[shown].min()) / 3)
        ax.plot(x[shown], energy[shown], color=color, lw=1.5, label=f"{moment} training", zorder=2 + i)
        for row in reach["gradient"][moment]["quantiles"]:
            if row["share"] == 0.99:
                y = max(energy[row["distance"]], 1e-12)
                tip = f"{moment} training: 99 % of the energy lies within {row['distance']} tokens"
                marks(ax, f"field-{moment}", [row["distance"] / scale], [y], [tip], color)
    if reach["reach"] is not None:
        ax.axvline(reach["reach"] / scale, color=INK, lw=1.0, zorder=1)
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(1e-12, floor))
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_ylabel("gradient energy")
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.legend(loc="upper right", fontsize=8)


def reach_figure(reach: dict[str, Any], narrow: bool = False) -> Figure:
    """The gradient field alone, with the predictions of others on the same axis."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(narrow, 0.8)
        ax = drawn.subplots()
        draw_field(ax, reach, reach["window"])
        mixture = reach.get("predictions", {}).get("mixture")
        if mixture:
            x = np.arange(len(mixture)) / float(reach["window"] or 1)
            shown = np.array(mixture) > 1e-12
            ax.plot(x[shown], np.array(mixture)[shown], color=COLORS[1], lw=1.2, ls="--", label="exact mixture")
            ax.legend(loc="upper right", fontsize=8)
        ax.set_xlim(left=0)
        ax.set_xlabel("distance, in windows W" if reach["window"] else "distance, tokens")
        return drawn
