"""Which keys a query sees, drawn from `model.windows`: the masks of layers, and the cone of a stack."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from eval.plots.canvas import INK, MUTED, landmark, styled
from eval.reach.cliff import cliff_length
from model import windows
from model.windows import LayerSpec

SEEN, UNSEEN = "#12355b", "#eef1f5"
WIDEST_MASK = 24  # tokens of a window in a panel; a wider window is drawn to scale
LONGEST_CONE = 8192  # tokens; longer stacks are drawn to scale


def mask(spec: LayerSpec, length: int) -> np.ndarray:
    """Bool (length, length): whether the query of the row sees the key of the column."""
    positions = torch.arange(length)
    return np.asarray(windows.visible(spec, positions[:, None], positions[None, :]))


def _draw_cells(ax: Axes, cells: np.ndarray, colors: Sequence[Any], left: float = 0.0) -> None:
    """Draw a grid of cells from x = `left` and y = 0 downwards; a cell with the number n has the n-th colour."""
    rows, columns = cells.shape
    ax.imshow(
        cells, ListedColormap(colors), vmin=-0.5, vmax=len(colors) - 0.5, interpolation="nearest",
        extent=(left, left + columns, rows, 0),
    )  # fmt: skip
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _shades(count: int) -> list[Any]:
    """`count` colours from dark to light, which can be told apart in grey and by the colour-blind."""
    return [matplotlib.colormaps["cividis"](x) for x in np.linspace(0.12, 0.85, max(2, count))][:count]


@styled
def sentence_figure() -> Figure:
    """The causal triangle beside the band of a sliding window, with words as rows and columns."""
    drawn, words = Figure(figsize=(9.0, 4.6), layout="constrained"), ["The", "cat", "sat", "on", "the"]
    full, sliding = drawn.subplots(1, 2)
    full.set_title("Full attention: all earlier tokens")
    sliding.set_title("Sliding window of W = 3 tokens")
    for ax, spec in ((full, LayerSpec("full")), (sliding, LayerSpec("sliding", 3))):
        seen, edges = mask(spec, len(words)), np.arange(len(words) + 1)
        _draw_cells(ax, seen, ["white", SEEN])
        for (query, key), sees in np.ndenumerate(seen):
            color = "white" if sees else MUTED
            ax.text(key + 0.5, query + 0.52, str(int(sees)), ha="center", va="center", color=color, fontsize=13)
        ax.hlines(edges, 0, len(words), color=UNSEEN, lw=3)
        ax.vlines(edges, 0, len(words), color=UNSEEN, lw=3)
        ax.set_xticks(edges[:-1] + 0.5, words)
        ax.set_yticks(edges[:-1] + 0.5, words)
        ax.tick_params(labelsize=11, labelcolor=INK, labeltop=True, labelbottom=False)
        ax.set(xlabel="key: the token that is looked at", ylabel="query: the token that looks")
    return drawn


def kinds_of(specs: Sequence[LayerSpec]) -> Counter[LayerSpec]:
    """Each different mask of the stack, and how many layers have it. Sinks and rotary positions change no mask.

    >>> kinds_of([LayerSpec("sliding", 4), LayerSpec("full", rope=False), LayerSpec("sliding", 4, sink=True)])
    Counter({LayerSpec(kind='sliding', window=4, ...): 2, LayerSpec(kind='full', window=None, ...): 1})
    """
    return Counter(replace(spec, sink=False, rope=True, rope_theta=None) for spec in specs)


def title_of(spec: LayerSpec) -> str:
    """The layer in a few words.

    >>> title_of(LayerSpec("dilated", 1024, dilation=2, global_tokens=4))
    'dilated, W = 1,024, dilation 2, 4 global tokens'
    """
    window = f", W = {spec.window:,}" if spec.window else ""
    dilation = f", dilation {spec.dilation}" if spec.dilation > 1 else ""
    return spec.kind + window + dilation + (f", {spec.global_tokens:,} global tokens" if spec.global_tokens else "")


def scaled(spec: LayerSpec, by: int) -> LayerSpec:
    """The layer with its window and global tokens divided by `by`, at least one each; the dilation stays."""
    window = None if spec.window is None else max(1, spec.window // by)
    return replace(spec, window=window, global_tokens=-(-spec.global_tokens // by))


@styled
def layers_figure(specs: Sequence[LayerSpec]) -> Figure:
    """One mask for each kind of layer in the stack, over more than two windows; wide windows are drawn to scale."""
    kinds = kinds_of(specs)
    columns = min(len(kinds), 4)
    rows, size = -(-len(kinds) // columns), max(2.4, 4.4 / columns)
    figure = Figure(figsize=(max(4.4, size * columns), (size + 0.8) * rows), layout="constrained")
    for i, (spec, color) in enumerate(zip(kinds, _shades(len(kinds)), strict=True)):
        ax = figure.add_subplot(rows, columns, i + 1, xlabel="key", ylabel="query")
        drawn = scaled(spec, -(-max(spec.ring_slots or 8, spec.global_tokens) // WIDEST_MASK))
        length = 2 * max(drawn.ring_slots or 8, drawn.global_tokens) + 4
        _draw_cells(ax, mask(drawn, length), [UNSEEN, color])
        scale = [f"drawn as {title_of(drawn).removeprefix(f'{spec.kind}, ')}"] if drawn != spec else []
        title = (title_of(spec), *scale, f"{kinds[spec]} of {len(specs)} layers")
        ax.set_title("\n".join(fill(line, 24) for line in title), fontsize=9)
        ax.locator_params(nbins=4, integer=True)
    return figure


def cone_length(specs: Sequence[LayerSpec]) -> int:
    """Tokens that show the whole cone; with a full layer, a third more than the windows of the other layers span."""
    return cliff_length(specs) or 32 + 4 * sum(spec.ring_slots or 0 for spec in specs) // 3


@styled
def cone_figure(specs: Sequence[LayerSpec]) -> Figure:
    """What the last token sees through its top 0, 1, …, k layers, with R and W·k; long stacks are drawn to scale.

    The query is at the top, the input at the bottom. A row has the colour of the layer that it looks through.
    """
    by, far = 1, windows.reach_of_other_tokens(specs)
    while cone_length(drawn := [scaled(spec, by) for spec in specs]) > LONGEST_CONE:
        by *= 2
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    ax = figure.subplots()
    note = f", every window divided by {by:,}" + ("" if far is None else f" (the real R is {far:,})")
    ax.set_title("What the last token sees, layer by layer" + (note if by > 1 else ""), pad=22)
    length, kinds = cone_length(drawn), list(kinds_of(drawn))
    shades, kind_of = _shades(len(kinds)), [kinds.index(next(iter(kinds_of([spec])))) for spec in reversed(drawn)]
    cells = windows.cone(drawn, length).numpy() * np.array([1, *(2 + kind for kind in kind_of)])[:, None]
    _draw_cells(ax, cells, [UNSEEN, INK, *shades], left=-length + 0.5)
    for spec, color in zip(kinds, shades, strict=True):
        ax.scatter([], [], marker="s", color=[color], label=f"through {title_of(spec)}")
    if len(kinds) > 1:
        figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{abs(x):,.0f}"))
    rows = sorted({round(row) for row in np.linspace(0, len(drawn), min(len(drawn) + 1, 9))})
    ax.set_yticks([row + 0.5 for row in rows], [str(row) for row in rows])
    ax.set(xlabel="tokens back from the last token", ylabel="layers back from the output")
    ax.set(xlim=(-length - 0.5, max(2.0, length / 100)), facecolor=UNSEEN, aspect="auto")
    far, product = windows.reach_of_other_tokens(drawn), windows.window_times_layers(drawn)
    if far is None or product is None:
        landmark(ax, -length - 0.5, "unbounded: a full layer sees every earlier token", "right")
        return figure
    others = "" if windows.reach(drawn) is not None else ", global tokens aside"
    landmark(ax, -far, f"R = {far:,}{others}", "right" if 3 * far > product else "left")  # where there is room
    landmark(ax, -product, f"W·k = {product:,}", "left", "--")
    return figure
