"""Loss by position and by context."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GRID, INK, STYLE, figure, marks


def loss_figure(losses: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Loss by position in a row of text, and by the context a token is given."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(narrow, 1.5 if narrow else 0.75)
        axes = drawn.subplots(2, 1) if narrow else drawn.subplots(1, 2)
        for ax, key, title, axis in (
            (axes[0], "by_position", "Loss by position in a row", "position, tokens"),
            (axes[1], "by_context", "Loss by available context", "context, tokens"),
        ):
            for i, loss in enumerate(losses):
                _draw_loss(ax, loss, key, COLORS[i % len(COLORS)], i)
            ax.set_title(title)
            ax.set_xlabel(axis)
            ax.set_ylabel("bits per token")
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            ax.grid(axis="y", color=GRID, lw=0.8)
        if len(losses) > 1:
            axes[0].legend(fontsize=8)
        return drawn


def _draw_loss(ax: Axes, loss: dict[str, Any], key: str, color: str, series: int) -> None:
    rows = loss[key]
    x = [max(1.0, row.get("context", row.get("middle", 0))) for row in rows]
    y = [row["bits_per_token"] for row in rows]
    spread = np.array([1.96 * row["standard_error"] for row in rows])
    ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.18, lw=0)
    ax.plot(x, y, color=color, lw=1.6, label=loss["model"])
    where = "context" if key == "by_context" else "position"
    tips = [
        f"{loss['model']}: {where} {row['label']} tokens, {row['bits_per_token']:.2f} ± {s:.2f} bits a token"
        for row, s in zip(rows, spread, strict=True)
    ]
    marks(ax, f"{key}-{series}", x, y, tips, color)
    if loss["window"]:
        ax.axvline(loss["window"], color=INK, lw=0.8)
    if loss["reach"]:
        ax.axvline(loss["reach"], color=INK, lw=0.8, ls="--")
