"""The states of one model side by side: recall by distance, bits per byte by context, and the cache."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, StrMethodFormatter

from eval.plots.canvas import COLORS, GREY, GRID, MUTED, figure, marks, styled


@styled
def receipt_figure(receipt: dict[str, Any], narrow: bool = False) -> Figure:
    """One panel for each task, and one for the text."""
    panels = len(receipt["recall"]) + 1
    drawn = figure(narrow, 0.75 * panels if narrow else 0.85)
    axes = drawn.subplots(panels, 1) if narrow else drawn.subplots(1, panels)
    for ax, (task, entry) in zip(axes, receipt["recall"].items(), strict=False):
        _draw_task(ax, task, entry, list(receipt["states"]))
    _draw_text(axes[-1], receipt["text"])
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    return drawn


def _draw_task(ax: Axes, task: str, entry: dict[str, Any], states: list[str]) -> None:
    for color, state in zip(_colors(), states, strict=False):
        rows = [(row["distance"], row["states"][state]) for row in entry["rows"]]
        tips = [f"{state}: {d:,} tokens back, {s['correct']} of {s['n']} right" for d, s in rows]
        curve = [(d, s["accuracy"], s["low"], s["high"]) for d, s in rows]
        _draw_curve(ax, curve, color, state, tips)
    ax.axhline(entry["chance"], color=MUTED, lw=0.9, ls=(0, (1, 2)))
    ax.set(title=f"Recall, {task}", xlabel="distance, tokens", ylim=(-0.02, 1.04))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_text(ax: Axes, text: dict[str, Any]) -> None:
    for color, (state, entry) in zip(_colors(), text["states"].items(), strict=False):
        figures = zip(text["contexts"], entry["bits_per_byte"], strict=True)
        curve = [(context, *bits) for context, bits in figures]
        _draw_curve(ax, curve, color, state, [f"{state}: context {c:,}, {bits:.3f} bits" for c, bits, *_ in curve])
    ax.set(title="Held-out text, bits per byte", xlabel="context, tokens")


def _draw_curve(ax: Axes, curve: Sequence[tuple[float, ...]], color: str, label: str, tips: Sequence[str]) -> None:
    """Draw (x, value, low, high) with its interval as a band, on a logarithmic axis with a tick at each x."""
    x, y, low, high = np.array(curve).T
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
    ax.plot(x, y, color=color, lw=1.8, label=label)
    marks(ax, x, y, tips, color)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(x[:: max(1, len(x) // 5)].tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.grid(color=GRID, lw=0.8)


def _colors() -> Any:
    """Grey for the original, then one colour for each state."""
    yield GREY
    yield from cycle(COLORS)
