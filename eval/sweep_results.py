"""Shows the runs of a sweep side by side: as JSON, as a table in Markdown and on the terminal, and as a picture."""

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from eval.plots.canvas import COLORS, GRID, STYLE, save

Row = dict[str, Any]
METRICS = {
    "h90": "H90, tokens",
    "h50": "H50, tokens",
    "u90": "U90 = H90 / R",
    "bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s",
}
NOTE = "Distances in tokens; tokens/s of one run beside the others; bf16 cache of one row as long as those evaluated."


def write_results(
    name: str, states: Iterable[tuple[dict[str, Any], Path, str]], folder: Path, command: str, console: Console
) -> None:
    """Writes sweep.json, sweep.md and sweep.png from (labels, folder, state) of each run, and prints the table."""
    from training.run.checkpoint import write_json, write_text  # imports torch, which python -m eval.law does not need

    rows = [row(*state) for state in states]
    write_json(folder / "sweep.json", {"name": name, "command": command, "runs": rows})
    write_text(folder / "sweep.md", markdown(name, rows, command))
    picture = figure(rows)
    if picture is not None:
        save(picture, folder / "sweep.png")
    console.print(table(rows), f"Written: {folder}/sweep.json, sweep.md" + (", sweep.png" if picture else ""), sep="\n")


def row(labels: dict[str, Any], folder: Path, state: str) -> Row:
    """Labels, state and results of a run; None for what it has not got. `further` are tasks beside the first one."""
    recall, loss = _read(folder / "recall.json"), _read(folder / "loss.json")
    task, *further = recall["tasks"].values() if recall else [{}]
    log = folder / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    logged = [event for event in events if event.get("kind") == "train"]
    last = logged[-1] if logged else {}
    rates = [event["tokens_per_second"] for event in logged[1:] or logged]  # the first one includes compilation
    return {
        "run": folder.name,
        "labels": labels,
        "state": state,
        **{k: (recall or loss).get(k) for k in ("window", "layers", "reach", "window_times_layers", "parameters")},
        **{k: task.get(k) for k in ("h90", "h90_interval", "h50", "h50_interval", "u90", "u50", "cache_bytes")},
        "further": {other["task"]: {k: other.get(k) for k in ("h90", "h50")} for other in further},
        "bits_per_byte": loss.get("bits_per_byte"),
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "distance": last.get("distance"),
        "tokens_per_second": statistics.median(rates) if rates else None,
    }


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


# -- tables -----------------------------------------------------------------------------------------------------------


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(headings, the cells of each row). Tasks beside the first one have a column each."""
    tasks = dict.fromkeys(task for r in rows for task in r["further"])
    columns = {"reach": ("R", ","), "h90": ("H90", ","), "h50": ("H50", ",.0f"), "u90": ("U90", ".2f")}
    columns |= {task: (f"H50 {task}", ",.0f") for task in tasks}
    columns |= {"bits_per_byte": ("bits per byte", ".3f"), "tokens": ("tokens", ",")}
    columns |= {"tokens_per_second": ("tokens/s", ",.0f"), "cache_bytes": ("cache bytes", ",")}

    def cell(r: Row, key: str, number: str) -> str:
        value = r["further"].get(key, {}).get("h50") if key in tasks else r[key]
        return "–" if value is None else format(value, number)

    heads = [*rows[0]["labels"], *(head for head, _ in columns.values()), "state"]
    return heads, [
        [*map(str, r["labels"].values()), *(cell(r, key, number) for key, (_, number) in columns.items()), r["state"]]
        for r in rows
    ]


def table(rows: Sequence[Row]) -> Table:
    shown, (heads, cells) = Table(box=box.SIMPLE_HEAD), _cells(rows)
    for name in heads:
        shown.add_column(name, justify="right")
    for line in cells:
        shown.add_row(*line, style=None if line[-1] == "done" else "dim")
    return shown


def markdown(name: str, rows: Sequence[Row], command: str) -> str:
    heads, cells = _cells(rows)
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *cells)]
    lines.insert(1, "|" + "---|" * len(heads))
    picture = "![The metrics against each variable](sweep.png)"
    return "\n".join([f"# {name}", "", f"Made by `{command}`. {NOTE}", "", *lines, "", picture, ""])


# -- picture ----------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Row]) -> Figure | None:
    """Every metric against every variable: dots are runs, lines or dashes are means over seeds. None: no figures."""
    metrics = [m for m in METRICS if any(r[m] is not None for r in rows)]
    variables = [v for v in rows[0]["labels"] if v != "seed" and len(_values(rows, v)) > 1] or ["seed"]
    if not metrics:
        return None
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(4.6 * len(variables) + 0.6, 2.5 * len(metrics)), layout="constrained")
        grid = drawn.subplots(len(metrics), len(variables), squeeze=False, sharex="col")
        for (i, metric), (j, variable) in itertools.product(enumerate(metrics), enumerate(variables)):
            _draw(grid[i][j], rows, metric, variable, [v for v in variables if v != variable])
        for top, bottom, variable in zip(grid[0], grid[-1], variables):
            bottom.set_xlabel(variable)
            if len(top.lines) > 1:
                top.legend(fontsize=7.5)
        return drawn


def line_colors(n: int) -> list[Any]:
    """`n` different colours: those of the house, or equal steps of a colormap where they are too few."""
    return list(COLORS[:n]) if n <= len(COLORS) else list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, n)))


def _values(rows: Iterable[Row], variable: str) -> list[Any]:
    return list(dict.fromkeys(r["labels"].get(variable) for r in rows))


def _draw(ax: Axes, rows: Sequence[Row], metric: str, variable: str, others: list[str]) -> None:
    """One panel: a colour for each combination of the other variables. Words stand side by side and are not joined."""
    values = _values(rows, variable)
    are_words = not all(isinstance(v, int | float) for v in values)
    places = {v: i if are_words else v for i, v in enumerate(values)}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault(tuple(r["labels"].get(v) for v in others), []).append(r)
    style: dict[str, Any] = {"ls": "none", "marker": "_", "ms": 12} if are_words else {"lw": 1.4}
    for i, (color, (key, group)) in enumerate(zip(line_colors(len(groups)), groups.items())):
        aside = 0.6 * ((i + 0.5) / len(groups) - 0.5) if are_words else 0
        points = [(places[r["labels"].get(variable)] + aside, r[metric]) for r in group if r[metric] is not None]
        means = [(x, statistics.fmean(y for at, y in points if at == x)) for x in sorted({x for x, _ in points})]
        label = ", ".join(f"{name} {value}" for name, value in zip(others, key))
        ax.plot([x for x, _ in means], [y for _, y in means], color=color, label=label, **style)
        ax.scatter([x for x, _ in points], [y for _, y in points], color=color, s=14, zorder=3)
    ax.set_title(METRICS[metric], fontsize=9.5)
    if metric != "bits_per_byte":  # no run comes near zero bits
        ax.set_ylim(0, 1.08 * max(r[metric] for r in rows if r[metric] is not None) or 1)
    ax.grid(axis="y", color=GRID, lw=0.8)
    if are_words:
        ax.set_xticks(range(len(values)), [str(v) for v in values], rotation=20)
        ax.set_xlim(-0.5, len(values) - 0.5)
        return
    if min(values) > 0 and max(values) >= 4 * min(values):
        ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{v:g}" for v in values])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
