"""Maps of right answers over two axes: the relay map (layer, offset) and the needle heat map (length, depth)."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import GRID, INK, figure, styled

COLORMAP = matplotlib.colors.LinearSegmentedColormap.from_list(
    "recall", ["#fdf6ec", "#f6c98a", "#e8894a", "#a53b4f", "#3d1a4b"], N=41
)


@styled
def relay_figure(relay: dict[str, Any], narrow: bool = False) -> Figure:
    """Right answers by layer (upwards) and distance behind the value (to the right), with the frontier of each layer.

    The frontier is the farthest distance from which a layer can have received anything.
    """
    drawn = figure(narrow, 0.9)
    ax = drawn.subplots()
    scale = float(relay["window"] or 1)
    columns = _edges([offset / scale for offset in relay["offsets"]])
    columns[0] = 0.0
    tips = [
        f"{f'after layer {layer}' if layer else 'embedding'}, {offset:,} tokens behind the value: {right:.0%} right"
        for layer, rights in enumerate(relay["accuracy"])
        for offset, right in zip(relay["offsets"], rights, strict=True)
    ]
    _draw_cells(ax, columns, _edges(range(len(relay["accuracy"]))), relay["accuracy"], tips)
    _draw_frontier(ax, relay["frontier"], scale, columns[-1])
    ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    unit = "in windows of W tokens" if relay["window"] else "in tokens"
    ax.set(xlim=(0, columns[-1]), xlabel=f"distance behind the value, {unit}", ylabel="after layer")
    return drawn


def _draw_frontier(ax: Axes, limits: list[int | None], scale: float, end: float) -> None:
    """Draw steps: nothing of the value can be to the right of a layer's step."""
    steps = [(limit / scale, layer) for layer, limit in enumerate(limits) if limit is not None]
    if not steps:
        return
    x, y = [x for x, _ in steps for _ in "ab"], [layer + half for _, layer in steps for half in (-0.5, 0.5)]
    ax.plot(x, y, color=INK, lw=1.4)
    middle = steps[len(steps) // 2]
    if middle[0] < end:
        ax.annotate("frontier", middle, xytext=(6, -10), textcoords="offset points", fontsize=9, color=INK)


@styled
def heat_figure(heat: dict[str, Any], narrow: bool = False) -> Figure:
    """Recall by total length (to the right) and depth of the needle (downwards), with the line where it is R away."""
    drawn = figure(narrow, 0.8)
    ax = drawn.subplots()
    lengths, depths = heat["lengths"], heat["depths"]
    by_place = {(cell["depth"], cell["length"]): cell for cell in heat["cells"]}
    cells = [by_place[depth, length] for depth in depths for length in lengths]
    tips = [
        f"{cell['length']:,} tokens, needle at {cell['depth']:.0%}: distance {cell['distance']:,}, "
        f"recall {cell['accuracy']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}], n = {cell['n']}"
        for cell in cells
    ]
    values = np.reshape([cell["accuracy"] for cell in cells], (len(depths), len(lengths)))
    _draw_cells(ax, _edges(range(len(lengths))), _edges([100 * depth for depth in depths]), values, tips)
    _draw_reach(ax, heat)
    ax.invert_yaxis()
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    ax.set_yticks([100 * depth for depth in depths], [f"{depth:.0%}" for depth in depths])
    ax.set(xlabel="total length, tokens", ylabel="depth of the needle")
    return drawn


def _draw_reach(ax: Axes, heat: dict[str, Any]) -> None:
    """Draw a line in each column: above it the needle is more than R tokens back. Short texts have none."""
    reach, farthest = heat["reach"], {cell["length"]: cell["farthest"] for cell in heat["cells"]}
    if reach is None or max(farthest.values()) <= reach:
        return
    outline: dict[str, Any] = {"path_effects": [patheffects.withStroke(linewidth=4, foreground="white")], "color": INK}
    for column, length in enumerate(heat["lengths"]):
        if farthest[length] > reach:
            depth = 100 * (1 - (reach - 1) / (farthest[length] - 1))
            ax.plot([column - 0.5, column + 0.5], [depth, depth], lw=1.8, **outline)
    ax.annotate(
        f"R = {reach:,}", (column + 0.45, depth), xytext=(0, 4), textcoords="offset points",
        ha="right", va="bottom", fontsize=9, **outline,
    )  # fmt: skip


def _draw_cells(ax: Axes, x: Any, y: Any, values: Sequence[Sequence[float]] | np.ndarray, tips: list[str]) -> None:
    """Draw a map with edges `x` and `y`, a hover text for each cell and a color bar."""
    cells = ax.pcolor(x, y, np.asarray(values), cmap=COLORMAP, vmin=0, vmax=1, urls=tips, clip_on=False)
    ax.tick_params(length=0)
    ax.spines[:].set_edgecolor(GRID)
    bar = ax.figure.colorbar(cells, ax=ax, pad=0.02, aspect=30, format=ticker.PercentFormatter(1.0, decimals=0))
    bar.set_label("right answers")
    bar.outline.set_visible(False)


def _edges(centres: Sequence[float]) -> np.ndarray:
    """Borders of cells around increasing centres.

    >>> _edges([1, 3, 4]).tolist()
    [0.0, 2.0, 3.5, 4.5]
    """
    middle = np.asarray(centres, dtype=float)
    if len(middle) == 1:
        return np.array([middle[0] - 0.5, middle[0] + 0.5])
    inner = (middle[1:] + middle[:-1]) / 2
    return np.concatenate([[2 * middle[0] - inner[0]], inner, [2 * middle[-1] - inner[-1]]])
