"""Maps of right answers over two axes: the relay map (layer, offset) and the needle heat map (length, depth)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from eval.plots.canvas import GRID, INK, distance_unit, figure, styled

COLORMAP = LinearSegmentedColormap.from_list("recall", ["#fdf6ec", "#f6c98a", "#e8894a", "#a53b4f", "#3d1a4b"], N=41)


@styled
def relay_figure(relay: dict[str, Any], narrow: bool = False) -> Figure:
    """Right answers by layer (upwards) and distance behind the value (to the right), with the frontier of each layer.

    The frontier is the farthest distance to which the value can have come: to the right of it there is nothing.
    """
    drawn = figure(narrow, 0.9)
    ax = drawn.subplots()
    scale = float(relay["window"] or 1)
    columns, layers = _edges([offset / scale for offset in relay["offsets"]]), _edges(range(len(relay["accuracy"])))
    columns[0] = 0.0
    tips = [
        f"{f'after layer {layer}' if layer else 'embedding'}, {offset:,} tokens behind the value: {right:.0%} right"
        for layer, rights in enumerate(relay["accuracy"])
        for offset, right in zip(relay["offsets"], rights, strict=True)
    ]
    _draw_cells(ax, columns, layers, relay["accuracy"], tips)
    frontier = np.array(relay["frontier"], dtype=float) / scale  # nan where a layer has no limit
    _draw_steps(ax, frontier, layers, "horizontal", "frontier: the value can't be farther")
    ax.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.set(xlim=(0, columns[-1]), xlabel=f"distance behind the value, {distance_unit(relay)}", ylabel="after layer")
    return drawn


@styled
def heat_figure(heat: dict[str, Any], narrow: bool = False) -> Figure:
    """Recall by total length (to the right) and depth of the needle (downwards).

    Above the line of R the needle is more than R tokens back. Texts that are too short for that have no line.
    """
    drawn = figure(narrow, 0.8)
    ax = drawn.subplots()
    lengths, depths, reach = heat["lengths"], heat["depths"], heat["reach"]
    by_place = {(cell["depth"], cell["length"]): cell for cell in heat["cells"]}
    values = [[by_place[depth, length]["accuracy"] for length in lengths] for depth in depths]
    columns = _edges(range(len(lengths)))
    _draw_cells(ax, columns, _edges(depths), values)
    farthest = np.array([by_place[depths[0], length]["farthest"] for length in lengths])
    if reach is not None and farthest.max() > reach:
        depth_of_reach = np.where(farthest > reach, 1 - (reach - 1) / (farthest - 1), np.nan)
        _draw_steps(ax, depth_of_reach, columns, "vertical", f"above: farther than R = {reach:,}")
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    ax.set_yticks(depths, [f"{depth:.0%}" for depth in depths])
    ax.set(xlabel="total length, tokens", ylabel="depth of the needle", ylim=ax.get_ylim()[::-1])
    return drawn


def _draw_cells(ax: Axes, x: Any, y: Any, values: Sequence[Sequence[float]], tips: Sequence[str] = ()) -> None:
    """Draw a map with edges `x` and `y` and a colour bar; `tips` are hover texts of the cells."""
    cells = ax.pcolor(x, y, np.asarray(values), cmap=COLORMAP, vmin=0, vmax=1, urls=tips, clip_on=False)
    ax.tick_params(length=0)
    ax.spines[:].set_edgecolor(GRID)
    bar = ax.figure.colorbar(cells, ax=ax, pad=0.02, aspect=30, format=ticker.PercentFormatter(1.0, decimals=0))
    bar.set_label("right answers")
    bar.outline.set_visible(False)


def _draw_steps(ax: Axes, values: np.ndarray, edges: np.ndarray, orientation: Any, label: str) -> None:
    """Draw a line of steps over the map, with its legend; nan leaves a gap."""
    steps = ax.stairs(values, edges, orientation=orientation, baseline=None, color=INK, lw=1.6, label=label)
    steps.set_path_effects([patheffects.withStroke(linewidth=3.5, foreground="white")])
    ax.legend(loc="lower right", fontsize=8.5)


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
