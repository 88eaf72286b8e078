"""How long the documents of each source are, beside the lengths that matter to the model."""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from data.statistics import Statistics
from eval.plots.canvas import COLORS, GRID, INK, figure, landmark, styled

LINES = ("-", "--", ":")


@styled
def lengths_figure(sources: Mapping[str, Statistics], limits: Mapping[str, int]) -> Figure:
    """Shares of the documents, and below them of the tokens, by length. A line marks each of `limits` (tokens)."""
    drawn = figure(narrow=False, height=1.2)
    axes = drawn.subplots(2, 1, sharex=True)
    for ax, unit in zip(axes, ("documents", "tokens")):
        for color, (name, source) in zip(cycle(COLORS), sources.items(), strict=False):
            sizes = np.array([getattr(size, unit) for size in source.by_length.values()])
            edges = [*source.by_length, 2 * max(source.by_length)]
            ax.stairs(sizes / sizes.sum(), edges, color=color, label=name, lw=1.6, zorder=3)
            ax.stairs(sizes / sizes.sum(), edges, color=color, alpha=0.12, fill=True, zorder=2)
        ax.set(ylabel=f"share of the {unit}", ylim=(0, None))
        ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        ax.grid(axis="y", color=GRID, lw=0.8)
    for i, (name, tokens) in enumerate(sorted(limits.items(), key=lambda limit: limit[1])):
        side, level = ("right", len(limits) - 1 - i) if i else ("left", 0)  # labels of neighbours don't meet
        landmark(axes[0], tokens, f"{name} = {tokens:,}", side, LINES[i], level=level)
        axes[1].axvline(tokens, color=INK, lw=1.0, ls=LINES[i], zorder=1)
    axes[0].legend(fontsize=8)
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes[1].set_xlabel("length of the document, tokens")
    return drawn
