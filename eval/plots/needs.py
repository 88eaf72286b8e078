"""What texts gain from context, how many of their tokens need more, and what patterns of layers cost."""

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from eval.plots.canvas import COLORS, GREY, GRID, INK, styled


@styled
def needs_figure(needs: dict[str, Any]) -> Figure:
    """Three panels, from needs.json; the third only if there is advice."""
    drawn = Figure(figsize=(14 if needs["advice"] else 9.3, 4.4), layout="constrained")
    axes = drawn.subplots(1, 3 if needs["advice"] else 2)
    titles = ("Bits per token gained from context", "Tokens that need more context")
    for ax, title in zip(axes, titles, strict=False):
        ax.set(title=title, xlabel="context, tokens")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for color, text in zip(cycle(COLORS), needs["texts"], strict=False):
        _draw_text(axes[0], axes[1], text, color)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[1].plot([], [], color=GREY, ls=":", label="by chance")
    axes[1].legend(fontsize=8)
    if needs["advice"]:
        _draw_advice(axes[2], needs)
    for ax in axes:
        ax.grid(color=GRID, lw=0.8)
    return drawn


def _draw_text(gained: Axes, needed: Axes, text: dict[str, Any], color: str) -> None:
    """The gain since the first context, each step with its own interval, and the tokens that need more."""
    rows = text["contexts"]
    contexts = [row["context"] for row in rows]
    steps = np.array([row["gain"] or [0.0, 0.0, 0.0] for row in rows])
    total = np.cumsum(steps[:, 0])
    margins = np.abs(steps[:, 1:] - steps[:, :1]).T
    gained.errorbar(contexts, total, margins, color=color, marker="o", ms=4, lw=1.6, capsize=3, label=text["text"])
    gained.legend(fontsize=8)
    value, low, high = np.array([row["need"] for row in rows]).T
    needed.fill_between(contexts, low, high, color=color, alpha=0.18, lw=0)
    needed.plot(contexts, value, color=color, marker="o", ms=4, lw=1.6, label=text["text"])
    needed.plot(contexts, [row["by_chance"][0] for row in rows], color=color, ls=":", lw=1.2)


def _draw_advice(ax: Axes, needs: dict[str, Any]) -> None:
    """Each pattern at its cache and at the share of the gain in its window; rings mark the front."""
    rows = needs["advice"]
    for color, every in zip(cycle(COLORS), dict.fromkeys(row["full_every"] for row in rows), strict=False):
        group = [row for row in rows if row["full_every"] == every]
        label = {0: "sliding only", 1: "full only"}.get(every, f"1 in {every} full")
        x, y = np.array([[row["cache_bytes"] / 2**20, row["in_window"]] for row in group]).T
        ax.plot(x, y, color=color, marker="o", ms=4, lw=1, label=label)
    front = [row for row in rows if row["pareto"]]
    x, y = np.array([[row["cache_bytes"] / 2**20, row["in_window"]] for row in front]).T
    ax.scatter(x, y, s=90, facecolors="none", edgecolors=INK, label="front", zorder=4)
    for row in rows:
        if row["full_every"] == 0:
            at = row["cache_bytes"] / 2**20, row["in_window"]
            ax.annotate(f"W = {row['window']:,}", at, (6, -9), textcoords="offset points", fontsize=8)
    ax.set(title="Patterns of layers", ylabel="share of the gain inside one window", ylim=(-0.05, 1.05))
    ax.set(xlabel=f"cache of {needs['serve_tokens']:,} tokens, MiB", xscale="log")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(fontsize=8)
