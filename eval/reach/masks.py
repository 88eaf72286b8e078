"""Pictures of what layers may see, all drawn from `model.windows`: the masks, and the cone of a stack.

    python -m eval.mask_plots [CONFIG.yaml] [--out DIR]

writes, without a model, `mask.png` (the causal triangle beside the sliding band, for a sentence), and of the config's
stack `layers.png` (one mask per kind of layer) and `cone.png` (what the last token sees, layer by layer). With a model,
`python -m eval.reach MODEL --plot` writes them too.

Shades run from dark to light, so that kinds of layers can be told apart in grey and by the colour-blind.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from eval.plots.canvas import INK, MUTED, STYLE, save
from eval.reach.cliff import cliff_length
from model import windows
from model.errors import UserError, cli
from model.windows import LayerSpec

SENTENCE, SENTENCE_WINDOW = "The cat sat on the", 3
SEEN, UNSEEN = "#12355b", "#eef1f5"
WIDEST_MASK = 24  # tokens that a window spans in a panel; a wider one is drawn to scale
LONGEST_CONE = 8192  # tokens
TITLE_WIDTH = 24  # characters over a panel
BoolArray = NDArray[np.bool_]


def write(specs: Sequence[LayerSpec], out: Path) -> None:
    """mask.png, layers.png and cone.png into the folder `out`."""
    save(sentence_figure(), out / "mask.png")
    save(layers_figure(specs), out / "layers.png")
    save(cone_figure(specs), out / "cone.png")


def mask(spec: LayerSpec, length: int) -> BoolArray:
    """Bool (length, length): rows are queries, columns are keys.

    >>> mask(LayerSpec("sliding", 3), 5).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 0, 1, 1, 1]])
    """
    positions = torch.arange(length)
    seen: BoolArray = windows.visible(spec, positions[:, None], positions[None, :]).numpy()
    return seen


# ---------------------------------------------------------------------------------------------------------- drawing


def _cells(ax: Axes, filled: BoolArray, color: Any, left: float = 0.0, gap: float = 0.0) -> None:
    """One outline of the true cells of a (rows, columns) array: row r from y = r, column c from x = left + c.

    Neighbours in a row are one rectangle, so that long rows stay small in an SVG.
    """
    edges = np.diff(np.pad(filled, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (row, start), (_, end) = np.argwhere(edges == 1).T, np.argwhere(edges == -1).T
    if len(row):
        x0, x1, y0, y1 = left + start + gap, left + end - gap, row + gap, row + 1 - gap
        corners = np.stack([np.stack(c, -1) for c in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], 1).astype(float)
        outline = Outline.make_compound_path_from_polys(corners)
        ax.add_patch(PathPatch(outline, facecolor=color, edgecolor="none", antialiased=gap > 0))


def _shades(count: int) -> list[Any]:
    """`count` colours from dark to light, for any eye."""
    return [matplotlib.colormaps["cividis"](x) for x in np.linspace(0.12, 0.85, max(2, count))][:count]


def _square(ax: Axes, length: int) -> None:
    ax.set_xlim(0, length)
    ax.set_ylim(length, 0)
    ax.set_aspect("equal")
    ax.set_facecolor(UNSEEN)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


# ------------------------------------------------------------------------------------------------- the two triangles


def sentence_figure(sentence: str = SENTENCE, window: int = SENTENCE_WINDOW, narrow: bool = False) -> Figure:
    """The causal triangle beside the diagonal band of a sliding window, with words as rows and columns."""
    words = sentence.split()
    panels = (
        ("Vanilla: all earlier tokens", LayerSpec("full")),
        (f"Sliding window, W = {window}", LayerSpec("sliding", window)),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 8.4) if narrow else (9.0, 4.6), layout="constrained")
        axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        for ax, (title, spec) in zip(axes, panels, strict=True):
            _draw_words(ax, mask(spec, len(words)), words)
            ax.set_title(title, pad=10)
        return figure


def _draw_words(ax: Axes, seen: BoolArray, words: list[str]) -> None:
    n = len(words)
    _square(ax, n)
    for row in range(n):  # row by row and cell by cell: each is a square of its own here
        for column in range(n):
            _cells(ax, _only(n, row, column), SEEN if seen[row, column] else "white", gap=0.03)
            mark, color = ("1", "white") if seen[row, column] else ("0", MUTED)
            ax.text(column + 0.5, row + 0.52, mark, ha="center", va="center", color=color, fontsize=13)
    centres = np.arange(n) + 0.5
    ax.set_xticks(centres, words)
    ax.set_yticks(centres, words)
    ax.tick_params(labelsize=11, labelcolor=INK, labeltop=True, labelbottom=False)
    ax.set_xlabel("key: the token looked at")
    ax.set_ylabel("query: the token that looks")


def _only(n: int, row: int, column: int) -> BoolArray:
    cell = np.zeros((n, n), dtype=np.bool_)
    cell[row, column] = True
    return cell


# ------------------------------------------------------------------------------------------------------ kinds of layers


def kinds_of(specs: Sequence[LayerSpec]) -> dict[LayerSpec, int]:
    """Each kind of mask in the stack, and how many layers have it; sinks and rotary positions hide nothing.

    >>> kinds_of([LayerSpec("sliding", 4), LayerSpec("full", rope=False), LayerSpec("sliding", 4, sink=True)])
    {LayerSpec(kind='sliding', window=4, ...): 2, LayerSpec(kind='full', window=None, ...): 1}
    """
    masks = [replace(spec, sink=False, rope=True, rope_theta=None) for spec in specs]
    return {spec: masks.count(spec) for spec in dict.fromkeys(masks)}


def title_of(spec: LayerSpec) -> str:
    """
    >>> title_of(LayerSpec("dilated", 1024, dilation=2, global_tokens=4))
    'dilated, W = 1,024, every 2nd, 4 global'
    """
    nth = {1: "", 2: ", every 2nd", 3: ", every 3rd"}.get(spec.dilation, f", every {spec.dilation}th")
    window = f", W = {spec.window:,}" if spec.window else ""
    return f"{spec.kind}{window}{nth}" + (f", {spec.global_tokens:,} global" if spec.global_tokens else "")


def scaled(spec: LayerSpec, by: int) -> LayerSpec:
    """The layer with its window and global tokens divided, at least one each; the dilation stays."""
    window = None if spec.window is None else max(1, spec.window // by)
    return replace(spec, window=window, global_tokens=-(-spec.global_tokens // by))


def layers_figure(specs: Sequence[LayerSpec], narrow: bool = False) -> Figure:
    """One mask for each kind of layer in the stack, over more than two windows."""
    kinds = kinds_of(specs)
    columns = min(len(kinds), 2 if narrow else 4)
    rows = -(-len(kinds) // columns)
    with matplotlib.rc_context(STYLE):
        size = 2.2 if narrow else max(2.4, 4.4 / columns)
        figure = Figure(figsize=(max(4.4, size * columns), size * rows + 0.8 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (spec, count), color in zip(axes, kinds.items(), _shades(len(kinds)), strict=False):
            _draw_kind(ax, spec, f"{count} of {len(specs)} layers", color)
        for ax in axes[len(kinds) :]:
            ax.remove()
        return figure


def _draw_kind(ax: Axes, spec: LayerSpec, count: str, color: Any) -> None:
    span = max(spec.ring_slots or 8, spec.global_tokens)
    drawn = scaled(spec, -(-span // WIDEST_MASK))
    length = 2 * max(drawn.ring_slots or 8, drawn.global_tokens) + 4
    _square(ax, length)
    _cells(ax, mask(drawn, length), color)
    lines = [title_of(spec), f"drawn as {title_of(drawn).removeprefix(f'{spec.kind}, ')}" * (drawn != spec), count]
    ax.set_title("\n".join(fill(line, TITLE_WIDTH) for line in lines if line), fontsize=9)
    ax.set_xlabel("key", fontsize=8.5)
    ax.set_ylabel("query", fontsize=8.5)
    ax.tick_params(labelsize=8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))


# ------------------------------------------------------------------------------------------------------------- the cone


def cone_figure(specs: Sequence[LayerSpec], narrow: bool = False) -> Figure:
    """What the last token sees through its top 0, 1, …, k layers, with R and W k; long stacks are drawn to scale."""
    by = 1
    while _cone_length(drawn := [scaled(spec, by) for spec in specs]) > LONGEST_CONE:
        by *= 2
    length = _cone_length(drawn)
    seen = windows.cone(drawn, length).numpy()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.2) if narrow else (9.0, 4.6), layout="constrained")
        ax = figure.subplots()
        _draw_cone(ax, drawn, seen)
        if len(ax.get_legend_handles_labels()[0]) > 1:
            figure.legend(fontsize=8, loc="outside lower center", ncols=1 if narrow else 3)
        _mark_cone(ax, drawn, narrow)
        note = "" if by == 1 else f", every window divided by {by:,}{_real_reach(specs)}"
        ax.set_title(f"What the last token sees, layer by layer{note}", pad=22, fontsize=9.5 if narrow else 11)
        return figure


def _real_reach(specs: Sequence[LayerSpec]) -> str:
    far = windows.reach_of_other_tokens(specs)
    return "" if far is None else f" (the real R is {far:,})"


def _cone_length(specs: Sequence[LayerSpec]) -> int:
    """Tokens that show the whole cone; with a full layer, what the other layers span and a third more."""
    bounded = cliff_length(specs)
    return bounded or 32 + 4 * sum(spec.ring_slots or 0 for spec in specs) // 3


def _draw_cone(ax: Axes, specs: Sequence[LayerSpec], seen: BoolArray) -> None:
    """Rows from the query at the top to the input, each in the shade of the layer that it looks through."""
    depth, length = seen.shape
    kinds = list(kinds_of(specs))
    of_row = [None, *(kinds.index(next(iter(kinds_of([spec])))) for spec in reversed(specs))]
    for i, (kind, color) in enumerate(zip(kinds, _shades(len(kinds)), strict=True)):
        rows = np.array([index == i for index in of_row])
        _cells(ax, seen & rows[:, None], color, left=-length + 0.5)
        ax.scatter([], [], marker="s", color=[color], label=f"through {title_of(kind)}")
    _cells(ax, seen & (np.arange(depth) == 0)[:, None], INK, left=-length + 0.5)
    ax.set_xlim(-length - 0.5, max(2.0, length / 100))
    ax.set_ylim(depth, 0)
    ax.set_facecolor(UNSEEN)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{abs(x):,.0f}"))
    ticks = sorted({round(row) for row in np.linspace(0, depth - 1, min(depth, 9))})
    ax.set_yticks([row + 0.5 for row in ticks], [str(row) for row in ticks])
    ax.set_xlabel("tokens back from the query")
    ax.set_ylabel("layers back from the output")


def _mark_cone(ax: Axes, specs: Sequence[LayerSpec], narrow: bool) -> None:
    """Lines at R and W k; R and W k nearly touch, so their labels part."""
    far, product = windows.reach_of_other_tokens(specs), windows.window_times_layers(specs)
    if far is None or product is None:
        text = "no bound: a full layer sees every earlier token"
        ax.annotate(text, (0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", fontsize=8.5)
        return
    others = " but for the global tokens" if windows.reach(specs) is None and not narrow else ""
    side = "left" if 3 * far > product else "right"  # where there is room
    marks = ((far, f"R = {far:,}{others}", side, "-"), (product, f"W·k = {product:,}", "right", "--"))
    for x, label, side, line in marks:
        ax.axvline(-x, color=INK, lw=1.1, ls=line)
        ax.annotate(
            label,
            (-x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-2 if side == "right" else 2, 4),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8.5,
            annotation_clip=False,
        )


# ---------------------------------------------------------------------------------------------------------- the command


def specs_of_config(file: str) -> tuple[LayerSpec, ...]:
    """The stack that a config of ours describes. Raises UserError for a config that can't be read."""
    from training.planning.dry_run import vocab_size
    from training.settings.build import model_config
    from training.settings.config_file import load_settings

    settings = load_settings(file, [])
    return model_config(settings, vocab_size(settings)).specs


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.mask_plots", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", metavar="CONFIG.yaml")
    parser.add_argument("--out", metavar="DIR", default=".", help="where the pictures go; default: here")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    out = Path(args.out)
    specs = specs_of_config(args.config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out!r} can't be made ({error.strerror}); name a folder you may write") from error
    write(specs, out)
    print(f"Written: {', '.join(str(out / name) for name in ('mask.png', 'layers.png', 'cone.png'))}")


if __name__ == "__main__":
    sys.exit(cli(main))
