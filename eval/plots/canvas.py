"""What all pictures share: style, colours, and how a figure becomes a file or a part of a page.

A marker that carries numbers belongs to a collection with an id; `svg` writes its texts, to be shown on hover.
"""

import io
import re
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.figure import Figure

matplotlib.use("Agg")

INK, MUTED, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
COLORS = ("#0f6fc6", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285")
GREY = "#9ca3af"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "windreach",
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
}
WIDE, NARROW = (9.0, 4.8), (4.4, 4.6)


def save(figure: Figure, path: Path | BinaryIO) -> None:
    """As PNG, to a file by its name or one that is open."""
    figure.savefig(path, dpi=160, facecolor="white")


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an inline <svg> that scales with its container; `data-tip` on a marker is its hover text.

    Ids get the prefix, so that several pictures can share a page; namespaces are left out, as HTML needs none.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height|xmlns|xmlns:xlink)="[^"]*"', "", head)
    text = f"{head}>{body}".replace("xlink:href", "href")
    text = _shorter(text)
    for name, tips in getattr(figure, "tips", {}).items():
        text = _with_tips(text, name, tips)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)


def _shorter(text: str) -> str:
    """The same drawing in fewer bytes: two decimals, and rectangles by their corners. Maps have thousands of them.

    >>> _shorter('<path d="M 1.2345 2 L 3 2 L 3 4 L 1.2345 4 L 1.2345 2 "/>')
    '<path d="M1.23 2H3V4H1.23Z"/>'
    """
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    corner = r"(-?[\d.]+)"
    rectangle = rf"M {corner} {corner} L {corner} \2 L \3 {corner} L \1 \4 L \1 \2 ?(?:z )?"
    return re.sub(rectangle, r"M\1 \2H\3V\4H\1Z", text)


def _with_tips(text: str, name: str, tips: list[str]) -> str:
    """Put each hover text on its marker: the n-th <use> of the group `name`, or the n-th cell of a mesh."""
    start = text.index(f'<g id="{name}"')
    end = text.find("<g id=", start + 1)
    group, waiting = text[start:end], iter(tips)
    shape = "use" if "<use " in group else "path"
    if shape == "path":  # cells touch: without this a seam shows between any two
        group = group.replace(">", ' shape-rendering="crispEdges">', 1)
        group = re.sub(r' clip-path="[^"]*"', "", group)
    group = re.sub(f"<{shape} ", lambda _: f'<{shape} data-tip="{escape(next(waiting))}" ', group, count=len(tips))
    return text[:start] + group + text[end:]


def figure(narrow: bool, height: float = 1.0) -> Figure:
    """An empty one for wide screens or for phones, `height` times as tall as usual."""
    width, tall = NARROW if narrow else WIDE
    made = Figure(figsize=(width, tall * height), layout="constrained")
    made.tips = {}  # type: ignore[attr-defined]
    return made


def marks(ax: Axes, name: str, x: Any, y: Any, tips: list[str], color: str, size: float = 26) -> None:
    """Dots that tell their numbers on hover."""
    tips_on(ax, ax.scatter(x, y, s=size, color=color, zorder=4, linewidths=0.8, edgecolors="white"), name, tips)


def tips_on(ax: Axes, collection: Collection, name: str, tips: list[str]) -> None:
    """Hover texts for the members of a collection, in their order; `name` is unique in the figure."""
    tag = f"tip-{name}"
    collection.set_gid(tag)
    ax.figure.tips[tag] = tips  # type: ignore[union-attr]
