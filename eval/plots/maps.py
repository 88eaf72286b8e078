"""Maps of accuracy over two axes: the relay map (layer x offset) and the needle heat map (length x depth)."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from eval.plots.canvas import GRID, INK, STYLE, figure, tips_on

COLORMAP = matplotlib.colors.LinearSegmentedColormap.from_list(
    "recall", ["#fdf6ec", "#f6c98a", "#e8894a", "#a53b4f", "#3d1a4b"], N=41
)


def relay_figure(relay: dict[str, Any], narrow: bool = False) -> Figure:
    """Accuracy by layer (up) and distance behind the value (right), with the frontier of what each layer can know."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(narrow, 0.9)
        ax = drawn.subplots()
        scale = float(relay["window"] or 1)
        columns = _edges([offset / scale for offset in relay["offsets"]], start=0.0)
        layers = np.arange(len(relay["accuracy"]) + 1) - 0.5
        tips = [
            f"{'embedding' if layer == 0 else f'after layer {layer}'}, {offset:,} tokens behind: {right:.0%}"
            for layer, row in enumerate(relay["accuracy"])
            for offset, right in zip(relay["offsets"], row, strict=True)
        ]
        mesh = _mesh(ax, "relay", columns, layers, relay["accuracy"], tips)
        _draw_frontier(ax, relay, scale, float(columns[-1]))
        ax.set_xlim(0, columns[-1])
        ax.set_ylim(layers[0], layers[-1])
        ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        ax.set_ylabel("layer")
        ax.set_xlabel("distance behind the value, " + ("in windows W" if relay["window"] else "tokens"))
        _colorbar(drawn, ax, mesh, "read rightly")
        return drawn


def _draw_frontier(ax: Axes, relay: dict[str, Any], scale: float, end: float) -> None:
    """Steps: what lies right of a layer's step has no path from the value."""
    limits = relay["frontier"]
    bounded = [layer for layer, limit in enumerate(limits) if limit is not None]
    if not bounded:
        return
    x = [limits[layer] / scale for layer in bounded for _ in (0, 1)]
    y = [layer + side for layer in bounded for side in (-0.5, 0.5)]
    ax.plot(x, y, color=INK, lw=1.4)
    middle = bounded[len(bounded) // 2]
    if limits[middle] / scale < end:
        ax.annotate(
            "frontier", (limits[middle] / scale, middle), xytext=(6, -10), textcoords="offset points",
            fontsize=9, color=INK,
        )  # fmt: skip


def heat_figure(heat: dict[str, Any], narrow: bool = False) -> Figure:
    """Recall by total length (right) and depth of the needle (down), with the line on which the distance is R."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(narrow, 0.8)
        ax = drawn.subplots()
        lengths, depths = heat["lengths"], heat["depths"]
        cells = {(cell["length"], cell["depth"]): cell for cell in heat["cells"]}
        shown = [[cells[length, depth] for length in lengths] for depth in depths]
        tips = [
            f"{cell['length']:,} tokens, needle at {cell['depth']:.0%}: distance {cell['distance']:,}, "
            f"recall {cell['accuracy']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}], n = {cell['n']}"
            for row in shown
            for cell in row
        ]
        columns, rows = np.arange(len(lengths) + 1) - 0.5, _edges([100 * depth for depth in depths])
        mesh = _mesh(ax, "heat", columns, rows, [[cell["accuracy"] for cell in row] for row in shown], tips)
        _draw_reach(ax, heat)
        ax.set_ylim(rows[-1], rows[0])
        ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        ax.set_xlabel("total length, tokens")
        ax.set_ylabel("depth of the needle, %")
        _colorbar(drawn, ax, mesh, "recall")
        return drawn


def _draw_reach(ax: Axes, heat: dict[str, Any]) -> None:
    """In each column a line: above it the needle is more than R tokens back. Shorter lengths have none."""
    if heat["reach"] is None:
        return
    farthest = {cell["length"]: cell["farthest"] for cell in heat["cells"]}
    crossed = {
        column: 100 * (1 - (heat["reach"] - 1) / (farthest[length] - 1))
        for column, length in enumerate(heat["lengths"])
        if farthest[length] > heat["reach"]
    }
    outline = [patheffects.withStroke(linewidth=4, foreground="white")]
    for column, depth in crossed.items():
        ax.plot([column - 0.5, column + 0.5], [depth, depth], color=INK, lw=1.8, path_effects=outline)
    if crossed:
        column, depth = max(crossed.items())
        ax.annotate(
            f"R = {heat['reach']:,}", (column + 0.45, depth), xytext=(0, 4), textcoords="offset points",
            ha="right", va="bottom", fontsize=9, color=INK, path_effects=outline,
        )  # fmt: skip


def _mesh(ax: Axes, name: str, x: Any, y: Any, values: Sequence[Sequence[float]], tips: list[str]) -> QuadMesh:
    mesh = ax.pcolormesh(x, y, np.array(values), cmap=COLORMAP, vmin=0, vmax=1)
    tips_on(ax, mesh, name, tips)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_edgecolor(GRID)
    return mesh


def _colorbar(drawn: Figure, ax: Axes, mesh: QuadMesh, label: str) -> None:
    bar = drawn.colorbar(mesh, ax=ax, pad=0.02, aspect=30, format=ticker.PercentFormatter(1.0, decimals=0))
    bar.set_label(label)
    bar.outline.set_visible(False)


def _edges(centres: Sequence[float], start: float | None = None) -> np.ndarray:
    """Borders of cells around increasing centres; the first one may be given."""
    middle = np.asarray(centres, dtype=float)
    if len(middle) == 1:
        return np.array([middle[0] - 0.5 if start is None else start, middle[0] + 0.5])
    inner = (middle[1:] + middle[:-1]) / 2
    first = middle[0] - (inner[0] - middle[0]) if start is None else start
    return np.concatenate([[first], inner, [middle[-1] + (middle[-1] - inner[-1])]])
