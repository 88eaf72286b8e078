"""What all pictures share: style, colours, marks with hover texts, and how a figure becomes a PNG or part of a page.

matplotlib can give each mark of a picture a link. `svg` turns the text of the link into `data-tip`, which the script of
the report shows when the mouse is over the mark. A PNG ignores it, so one drawing serves both.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.run.checkpoint import write_bytes

matplotlib.use("Agg")

INK, MUTED, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
COLORS = ("#0f6fc6", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285")
GREY = "#9ca3af"
STYLE: dict[Any, Any] = {
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
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
}
styled = matplotlib.rc_context(STYLE)  # a decorator for functions that draw


def figure(narrow: bool, height: float = 1.0) -> Figure:
    """An empty figure for wide screens or for phones, `height` times as tall as usual."""
    width, usual = (4.4, 4.6) if narrow else (9.0, 4.8)  # inches
    return Figure(figsize=(width, usual * height), layout="constrained")


def distance_unit(result: dict[str, Any]) -> str:
    return "in windows of W tokens" if result["window"] else "in tokens"


def save(figure: Figure, path: Path | BinaryIO) -> None:
    """Write the figure as a PNG to a path or an open file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, facecolor="white")
    if isinstance(path, Path):
        write_bytes(path, buffer.getvalue())
    else:
        path.write(buffer.getvalue())


def marks(ax: Axes, x: Any, y: Any, tips: Sequence[str], color: str, size: float = 26, **style: Any) -> None:
    """Draw dots; each shows its text of `tips` on hover. `style` is passed to matplotlib's scatter."""
    style.setdefault("edgecolors", "white")
    ax.scatter(x, y, s=size, urls=tips, linewidths=0.8, clip_on=False, zorder=4, color=color, **style)


def landmark(ax: Axes, x: float, label: str, side: str, line: Any = "-", color: str = INK, level: int = 0) -> None:
    """Draw a vertical line at `x` and its label above the axes, to its "left" or "right", `level` text lines up."""
    ax.axvline(x, color=color, lw=1.0, ls=line, zorder=1)
    ax.annotate(
        label, (x, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points", annotation_clip=False,
        xytext=(3 if side == "right" else -3, 2 + 12 * level), ha="left" if side == "right" else "right", va="bottom",
        fontsize=8, color=INK,
    )  # fmt: skip


@styled
def svg(figure: Figure, prefix: str) -> str:
    """The figure as an inline <svg> that scales with its container and holds the hover texts as `data-tip`.

    Each id gets the prefix, so that several pictures can share a page. Namespaces are left out: HTML needs none.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, body = buffer.getvalue().partition("<svg")[2].split(">", 1)
    head = re.sub(r' (width|height|xmlns|xmlns:xlink)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+|\n", r"\1", d[0]), body)  # a map has many outlines
    body = re.sub(r"""<a xlink:href=(".*?"|'.*?') target="_blank">""", r"<g data-tip=\1>", body).replace("</a>", "</g>")
    body = re.sub(r'( id="| href="#|url\(#)', rf"\g<1>{prefix}-", body.replace("xlink:href", "href"))
    return f"<svg{head}>{body}"
