"""The pictures: one drawing of each, used for the PNG beside the numbers and for the SVG inside the report.

A marker that carries numbers belongs to a collection with an id; `svg` writes its texts, to be shown on hover.
"""

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
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
    "legend.frameon": False,
}
WIDE, NARROW = (9.0, 4.8), (4.4, 4.6)


def save(figure: Figure, path: Path) -> None:
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
    for name, tips in getattr(figure, "tips", {}).items():
        text = _with_tips(text, name, tips)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)


def _with_tips(text: str, name: str, tips: list[str]) -> str:
    """Put each hover text on its marker: the n-th <use> of the group `name`."""
    start = text.index(f'<g id="{name}"')
    end = text.find("<g id=", start + 1)
    group, waiting = text[start:end], iter(tips)
    group = re.sub(r"<use ", lambda _: f'<use data-tip="{escape(next(waiting))}" ', group)
    return text[:start] + group + text[end:]


def _figure(narrow: bool, height: float = 1.0) -> Figure:
    width, tall = NARROW if narrow else WIDE
    figure = Figure(figsize=(width, tall * height), layout="constrained")
    figure.tips = {}  # type: ignore[attr-defined]
    return figure


def _marks(ax: Axes, name: str, x: Any, y: Any, tips: list[str], color: str, size: float = 26) -> None:
    """Dots that tell their numbers on hover."""
    tag = f"tip-{name}"
    ax.scatter(x, y, s=size, color=color, zorder=4, gid=tag, linewidths=0.8, edgecolors="white")
    ax.figure.tips[tag] = tips  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------- recall


def hero_figure(
    results: list[dict[str, Any]], reach: dict[str, Any] | None = None, task: str | None = None, narrow: bool = False
) -> Figure:
    """Recall against distance in W with intervals; further results in grey; the gradient field on the same axis."""
    with matplotlib.rc_context(STYLE):
        task = task or next(iter(results[0]["tasks"]))
        field = reach if reach and reach.get("gradient") else None
        figure = _figure(narrow, 1.35 if field else 1.0)
        if field:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        else:
            top = figure.subplots()
        _draw_recall(top, results, task, reach, narrow)
        if field:
            _draw_field(bottom, field, results[0]["window"])
        axis = bottom if field else top
        axis.set_xlabel("distance, in windows W" if results[0]["window"] else "distance, tokens")
        return figure


def _scale(result: dict[str, Any]) -> float:
    return float(result["window"] or 1)


def _draw_recall(
    ax: Axes, results: list[dict[str, Any]], task: str, reach: dict[str, Any] | None, narrow: bool
) -> None:
    main = results[0]
    shown = [(main, t) for t in main["tasks"]] + [(r, task) for r in results[1:] if task in r["tasks"]]
    several = len(results) > 1
    for i, (result, name) in enumerate(shown):
        twin = result is not main
        color = COLORS[i] if not twin or len(results) > 2 else GREY
        label = name if not several else f"{result['model']}" + (f", {name}" if name != task else "")
        _draw_curve(ax, result, name, color, label, zorder=2 if twin else 3, series=i)
    _draw_landmarks(ax, main, reach, narrow)
    chance = main["tasks"][task]["chance"]
    ax.axhline(chance, color=MUTED, lw=0.9, ls=(0, (1, 2)))
    ax.annotate("chance", (0.005, chance), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED, va="bottom")
    ax.set_ylim(-0.02, 1.04)
    ax.set_xlim(left=0)
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("recall")
    ax.grid(axis="y", color=GRID, lw=0.8)
    if len(shown) > 1:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.17), fontsize=8.5)


def _draw_curve(ax: Axes, result: dict[str, Any], task: str, color: str, label: str, zorder: int, series: int) -> None:
    rows = result["tasks"][task]["rows"]
    x = np.array([row["distance"] for row in rows]) / _scale(result)
    y = np.array([row["accuracy"] for row in rows])
    low, high = ([row[key] for row in rows] for key in ("low", "high"))
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=zorder - 1)
    ax.plot(x, y, color=color, lw=1.8, label=label, zorder=zorder)
    tips = [
        f"{label}: distance {row['distance']:,} tokens ({d:.1f} W), recall {row['accuracy']:.1%} "
        f"[{row['low']:.1%}, {row['high']:.1%}], n = {row['n']}"
        for row, d in zip(rows, x, strict=True)
    ]
    _marks(ax, f"recall-{series}", x, y, tips, color)


def _draw_landmarks(ax: Axes, result: dict[str, Any], reach: dict[str, Any] | None, narrow: bool) -> None:
    """Lines at W, 1.5 W, the mixture horizon, R and W k; R and W k nearly touch, so their labels part."""
    window = result["window"]
    if not window:
        return
    marks = [(1.0, "W", "right", "-"), (1.5, "1.5 W", "left", "--")]
    horizon = (reach or {}).get("predictions", {}).get("mixture_horizon")
    if horizon:
        marks.append((horizon / window, "mixture", "left", ":"))
    if result["reach"] is not None:
        marks.append((result["reach"] / window, "R" if narrow else "R = k(W−1)", "right", "-"))
        marks.append((result["window_times_layers"] / window, "W·k", "left", "--"))
    for x, label, side, line in marks:
        ax.axvline(x, color=INK if line == "-" else MUTED, lw=1.0, ls=line, zorder=1)
        shift = -3 if side == "right" else 3
        height = 14 if label == "mixture" else 2  # a second row: it may stand anywhere
        ax.annotate(
            label,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(shift, height),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color=INK,
            annotation_clip=False,
        )


# ---------------------------------------------------------------------------------------------- gradient field


def _draw_field(ax: Axes, reach: dict[str, Any], window: int | None) -> None:
    """Share of the gradient's energy at each distance, on a logarithmic axis, before and after training."""
    scale, floor = float(window or 1), 1.0
    for i, (moment, color) in enumerate((("before", GREY), ("after", COLORS[0]))):
        energy = np.array(reach["gradient"][moment]["energy"])
        shown = energy > 1e-12
        x = np.arange(len(energy)) / scale
        floor = min(floor, float(energy[shown].min()) / 3)
        ax.plot(x[shown], energy[shown], color=color, lw=1.5, label=f"{moment} training", zorder=2 + i)
        for row in reach["gradient"][moment]["quantiles"]:
            if row["share"] == 0.99:
                y = max(energy[row["distance"]], 1e-12)
                tip = f"{moment} training: 99 % of the energy lies within {row['distance']} tokens"
                _marks(ax, f"field-{moment}", [row["distance"] / scale], [y], [tip], color)
    if reach["reach"] is not None:
        ax.axvline(reach["reach"] / scale, color=INK, lw=1.0, zorder=1)
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(1e-12, floor))
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_ylabel("gradient energy")
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.legend(loc="upper right", fontsize=8)


def reach_figure(reach: dict[str, Any], narrow: bool = False) -> Figure:
    """The gradient field alone, with the predictions of others on the same axis."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(narrow, 0.8)
        ax = figure.subplots()
        _draw_field(ax, reach, reach["window"])
        mixture = reach.get("predictions", {}).get("mixture")
        if mixture:
            x = np.arange(len(mixture)) / float(reach["window"] or 1)
            shown = np.array(mixture) > 1e-12
            ax.plot(x[shown], np.array(mixture)[shown], color=COLORS[1], lw=1.2, ls="--", label="exact mixture")
            ax.legend(loc="upper right", fontsize=8)
        ax.set_xlim(left=0)
        ax.set_xlabel("distance, in windows W" if reach["window"] else "distance, tokens")
        return figure


# -------------------------------------------------------------------------------------------------------- loss


def loss_figure(losses: list[dict[str, Any]], narrow: bool = False) -> Figure:
    """Loss by position in a row of text, and by the context a token is given."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(narrow, 1.5 if narrow else 0.75)
        axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        for ax, key, title, axis in (
            (axes[0], "by_position", "Loss by position in a row", "position, tokens"),
            (axes[1], "by_context", "Loss by available context", "context, tokens"),
        ):
            for i, loss in enumerate(losses):
                _draw_loss(ax, loss, key, COLORS[i % len(COLORS)], i)
            ax.set_title(title)
            ax.set_xlabel(axis)
            ax.set_ylabel("bits per token")
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            ax.grid(axis="y", color=GRID, lw=0.8)
        if len(losses) > 1:
            axes[0].legend(fontsize=8)
        return figure


def _draw_loss(ax: Axes, loss: dict[str, Any], key: str, color: str, series: int) -> None:
    rows = loss[key]
    x = [max(1.0, row.get("context", row.get("middle", 0))) for row in rows]
    y = [row["bits_per_token"] for row in rows]
    spread = np.array([1.96 * row["standard_error"] for row in rows])
    ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.18, lw=0)
    ax.plot(x, y, color=color, lw=1.6, label=loss["model"])
    where = "context" if key == "by_context" else "position"
    tips = [
        f"{loss['model']}: {where} {row['label']} tokens, {row['bits_per_token']:.2f} ± {s:.2f} bits a token"
        for row, s in zip(rows, spread, strict=True)
    ]
    _marks(ax, f"{key}-{series}", x, y, tips, color)
    if loss["window"]:
        ax.axvline(loss["window"], color=INK, lw=0.8)
    if loss["reach"]:
        ax.axvline(loss["reach"], color=INK, lw=0.8, ls="--")


# ---------------------------------------------------------------------------------------------------- training


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
        figure = _figure(narrow, 0.6 * len(panels) if narrow else 0.5 * ((len(panels) + 1) // 2))
        grid = figure.subplots(len(panels), 1) if narrow else figure.subplots((len(panels) + 1) // 2, 2)
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
        return figure


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
    _marks(ax, name, x[::every], y[::every], tips[::every], color, size=9)
