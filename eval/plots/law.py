"""The horizon against depth for each window, with the fitted law."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.plots.canvas import GREY, GRID, styled
from eval.sweep_results import line_colors


@styled
def figure(runs: Sequence[dict[str, Any]], laws: dict[str, dict[str, Any]], horizons: dict[str, str]) -> Figure:
    """Each horizon against depth, one colour per window: runs as dots, the fit as a line, the exact reach in grey."""
    windows = sorted({run["window"] for run in runs})
    depths = np.array(sorted({run["layers"] for run in runs}), dtype=np.float64)
    drawn = Figure(figsize=(5.2 * len(horizons), 4.4), layout="constrained")
    for ax, (horizon, title) in zip(drawn.subplots(1, len(horizons)), horizons.items()):
        law = laws[f"{title}, all"]["fit"]
        for color, window in zip(line_colors(len(windows)), windows):
            ax.plot(depths, depths * (window - 1), color=GREY, lw=1, ls=":")
            line = law.factor * window**law.window.value * depths**law.depth.value
            ax.plot(depths, line, color=color, lw=1.4, label=f"W = {window}")
            group = [run for run in runs if run["window"] == window and run.get(horizon)]
            ax.scatter([r["layers"] for r in group], [r[horizon] for r in group], s=26, color=color, zorder=3)
        ax.loglog(base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(xlabel="layers k", title=f"{title}, tokens; dotted: reach k(W - 1)")
        ax.grid(color=GRID, lw=0.8)
        ax.legend(fontsize=8)
    return drawn
