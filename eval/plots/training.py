"""The curves of metrics.jsonl."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GRID, STYLE, figure, marks

PANELS = (  # title, kind of row in metrics.jsonl, its columns and what they are
    ("Training loss, nats", "train", {"loss_text": "text", "loss_answer": "answers", "loss_relay": "relays"}),
    ("Held-out text, bits per byte", "validation", {"bits_per_byte": "held-out"}),
    ("Recall horizon, tokens", "probe", {"horizon": "recalled in 90 %"}),
    ("Longest distance asked, tokens", "train", {"distance": "curriculum"}),
)
Series = tuple[str, list[float], list[float]]


def training_figure(runs: list[tuple[str, list[dict[str, Any]]]], narrow: bool = False) -> Figure | None:
    """The curves of metrics.jsonl; None when there are none. With several runs, the first column of each panel."""
    panels = [(title, _panel(runs, kind, columns)) for title, kind, columns in PANELS]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        drawn = figure(narrow, 0.6 * len(panels) if narrow else 0.5 * ((len(panels) + 1) // 2))
        grid = drawn.subplots(len(panels), 1) if narrow else drawn.subplots((len(panels) + 1) // 2, 2)
        axes = np.atleast_1d(grid).ravel()
        for p, (ax, (title, series)) in enumerate(zip(axes, panels, strict=False)):
            for i, one in enumerate(series):
                _draw_series(ax, one, COLORS[i % len(COLORS)], f"train-{p}-{i}")
            ax.set_title(title, fontsize=9.5)
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
            ax.grid(axis="y", color=GRID, lw=0.8)
            if len(series) > 1:
                ax.legend(fontsize=8)
        for ax in axes[len(panels) :]:
            ax.remove()
        return drawn


def _panel(runs: list[tuple[str, list[dict[str, Any]]]], kind: str, columns: dict[str, str]) -> list[Series]:
    if len(runs) > 1:
        column = next(iter(columns))
        found = [(name, *_points(rows, kind, column)) for name, rows in runs]
    else:
        found = [(label, *_points(runs[0][1], kind, column)) for column, label in columns.items()]
    return [series for series in found if series[1]]


def _points(rows: list[dict[str, Any]], kind: str, column: str) -> tuple[list[float], list[float]]:
    points = [(r["step"], r[column]) for r in rows if r.get("kind") == kind and isinstance(r.get(column), int | float)]
    return [p[0] for p in points], [p[1] for p in points]


def _draw_series(ax: Axes, series: Series, color: str, name: str) -> None:
    label, x, y = series
    ax.plot(x, y, color=color, lw=1.4, label=label)
    every = max(1, len(x) // 40)
    tips = [f"{label}: step {a:,}, {b:.3g}" for a, b in zip(x, y, strict=True)]
    marks(ax, name, x[::every], y[::every], tips[::every], color, size=9)
