"""The curves of losses and of training."""

from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLORS, GRID, INK, figure, marks, styled

PANELS = (  # title, kind of line in metrics.jsonl, its columns and the label of each
    ("Training loss, nats", "train", {"loss_text": "text", "loss_answer": "answers", "loss_relay": "relay head"}),
    ("Held-out text, bits per byte", "validation", {"bits_per_byte": "held-out"}),
    ("Distance recalled in 90 % of cases, tokens", "probe", {"horizon": "recall"}),
    ("Longest distance in training, tokens", "train", {"distance": "curriculum"}),
)
Metrics = list[tuple[str, list[dict[str, Any]]]]  # name of a run, lines of its metrics.jsonl


@styled
def loss_figure(losses: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Loss of held-out text by position and by context, with 95 % intervals; `losses` are loss.json of each model."""
    drawn = figure(narrow, 1.5 if narrow else 0.75)
    axes = drawn.subplots(2, 1) if narrow else drawn.subplots(1, 2)
    for ax, word, x_key in ((axes[0], "position", "middle"), (axes[1], "context", "context")):
        for i, loss in enumerate(losses):
            _draw_loss(ax, loss, word, x_key, COLORS[i % len(COLORS)])
        ax.set(title=f"Loss by {word}", xlabel=f"{word}, tokens", ylabel="bits per token")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        ax.grid(axis="y", color=GRID, lw=0.8)
    if len(losses) > 1:
        axes[0].legend(fontsize=8)
    return drawn


def _draw_loss(ax: Axes, loss: dict[str, Any], word: str, x_key: str, color: str) -> None:
    rows = loss[f"by_{word}"]
    x = [max(1.0, row[x_key]) for row in rows]
    y = [row["bits_per_token"] for row in rows]
    margin = np.array([1.96 * row["standard_error"] for row in rows])
    ax.fill_between(x, y - margin, y + margin, color=color, alpha=0.18, lw=0)
    ax.plot(x, y, color=color, lw=1.6, label=loss["model"])
    tips = [
        f"{loss['model']}: {word} {row['label']} tokens, {row['bits_per_token']:.2f} ± {m:.2f} bits per token"
        for row, m in zip(rows, margin, strict=True)
    ]
    marks(ax, x, y, tips, color)
    for tokens, line in ((loss["window"], "-"), (loss["reach"], "--")):
        if tokens:
            ax.axvline(tokens, color=INK, lw=0.8, ls=line)


@styled
def training_figure(runs: Metrics, narrow: bool = False) -> Figure:
    """One panel for each quantity of metrics.jsonl that was logged, against the step.

    A single run shows all columns of a panel. Several runs share the panels and show the first column of each.
    """
    logged = [(title, curves) for title, kind, columns in PANELS if (curves := _curves(runs, kind, columns))]
    rows = len(logged) if narrow else (len(logged) + 1) // 2
    drawn = figure(narrow, (0.6 if narrow else 0.5) * rows)
    for i, (title, curves) in enumerate(logged):
        _draw_panel(drawn.add_subplot(rows, 1 if narrow else 2, i + 1), title, curves)
    return drawn


def has_curves(runs: Metrics) -> bool:
    """Whether `training_figure` has anything to show."""
    return any(_curves(runs, kind, columns) for _, kind, columns in PANELS)


def _curves(runs: Metrics, kind: str, columns: dict[str, str]) -> dict[str, list[tuple[int, float]]]:
    """Label -> points (step, value): of each column for a single run, of the first column for several runs."""
    if len(runs) == 1:
        wanted = [(label, runs[0][1], column) for column, label in columns.items()]
    else:
        wanted = [(name, lines, next(iter(columns))) for name, lines in runs]
    curves = {
        label: [
            (r["step"], r[column]) for r in lines if r.get("kind") == kind and isinstance(r.get(column), int | float)
        ]
        for label, lines, column in wanted
    }
    return {label: points for label, points in curves.items() if points}


def _draw_panel(ax: Axes, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for i, (label, points) in enumerate(curves.items()):
        color, (steps, values) = COLORS[i % len(COLORS)], zip(*points, strict=True)
        ax.plot(steps, values, color=color, lw=1.4, label=label)
        every = slice(None, None, max(1, len(points) // 40))
        tips = [f"{label}: step {step:,}, {value:.3g}" for step, value in points[every]]
        marks(ax, steps[every], values[every], tips, color, size=9)
    ax.set_title(title, fontsize=9.5)
    ax.set(xlabel="step", ylim=(0, None))
    ax.grid(axis="y", color=GRID, lw=0.8)
    if len(curves) > 1:
        ax.legend(fontsize=8)
