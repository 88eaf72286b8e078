"""What a sweep found: one row a run, as JSON, Markdown, a table on the terminal and a picture."""

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from eval.plots.canvas import COLORS, GRID, STYLE

Row = dict[str, Any]
METRICS = {
    "h90": "H90, tokens",
    "h50": "H50, tokens",
    "u90": "U90 = H90 / R",
    "bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s",
}
LAST = {"steps": "step", "tokens": "tokens", "distance": "distance"}  # a row's key: what the last log line calls it


def row(labels: dict[str, Any], folder: Path, state: str) -> Row:
    """Labels, state and what the run's result files hold; None for what is not there."""
    recall, loss = _read(folder / "recall.json"), _read(folder / "loss.json")
    result = recall or loss
    task, *further = recall["tasks"].values() if recall else [{}]
    return {
        "run": folder.name,
        "labels": labels,
        "state": state,
        **{key: result.get(key) for key in ("window", "layers", "reach", "window_times_layers", "parameters")},
        **{key: task.get(key) for key in ("h90", "h90_interval", "h50", "h50_interval", "u90", "u50")},
        "further": {other["task"]: {key: other.get(key) for key in ("h90", "h50")} for other in further},
        "cache_bytes": task.get("cache_bytes"),
        "bits_per_byte": loss.get("bits_per_byte"),
        **_training(folder / "metrics.jsonl"),
    }


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _training(file: Path) -> Row:
    """Steps and tokens trained, the farthest D, and the median of the logged rates but the first, which compiles."""
    lines = file.read_text().splitlines() if file.exists() else []
    logged = [found for line in lines if (found := json.loads(line)).get("kind") == "train"]
    rates = [found["tokens_per_second"] for found in logged[1:] or logged]
    last = logged[-1] if logged else {}
    rate = statistics.median(rates) if rates else None
    return {**{key: last.get(name) for key, name in LAST.items()}, "tokens_per_second": rate}


# -- tables -----------------------------------------------------------------------------------------------------------


def cells(found: Row, further: Sequence[str] = ()) -> list[str]:
    """Of a line of the table, after the labels; `further` names tasks beside the first one."""
    return [
        _number(found["reach"], ","),
        _number(found["h90"], ","),
        _number(found["h50"], ",.0f"),
        _number(found["u90"], ".2f"),
        *(_number(found["further"].get(task, {}).get("h50"), ",.0f") for task in further),
        _number(found["bits_per_byte"], ".3f"),
        _number(found["tokens"], ","),
        _number(found["tokens_per_second"], ",.0f"),
        _number(found["cache_bytes"], ","),
        found["state"],
    ]


def further_tasks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(task for found in rows for task in found["further"]))


def heads(rows: Sequence[Row]) -> list[str]:
    others = [f"H50 {task}" for task in further_tasks(rows)]
    found = ["R", "H90", "H50", "U90", *others, "bits per byte", "tokens", "tokens/s", "cache bytes", "state"]
    return [*rows[0]["labels"], *found]


def table(rows: Sequence[Row]) -> Table:
    made = Table(box=box.SIMPLE_HEAD)
    for name in heads(rows):
        made.add_column(name, justify="right")
    for found in rows:
        style = None if found["state"] == "done" else "dim"
        made.add_row(*map(str, found["labels"].values()), *cells(found, further_tasks(rows)), style=style)
    return made


def markdown(name: str, rows: Sequence[Row], command: str) -> str:
    tasks, names = further_tasks(rows), heads(rows)
    said = (
        "Distances in tokens; tokens/s of one run beside the others; bf16 cache of one row as long as those evaluated."
    )
    lines = [f"# {name}", "", f"Made by `{command}`. {said}", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join([*map(str, found["labels"].values()), *cells(found, tasks)]) + " |" for found in rows]
    return "\n".join([*lines, "", "![The metrics against each variable](sweep.png)", ""])


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# -- picture ----------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Row]) -> Figure | None:
    """Every metric against every variable but the seed: dots are runs, lines the means over seeds. None: no figures."""
    metrics = [m for m in METRICS if any(found[m] is not None for found in rows)]
    variables = [v for v in rows[0]["labels"] if v != "seed" and len(_values(rows, v)) > 1] or ["seed"]
    if not metrics:
        return None
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(4.6 * len(variables) + 0.6, 2.5 * len(metrics)), layout="constrained")
        grid = made.subplots(len(metrics), len(variables), squeeze=False)
        for (i, metric), (j, variable) in itertools.product(enumerate(metrics), enumerate(variables)):
            _draw(grid[i][j], rows, metric, variable, [v for v in variables if v != variable])
            if i + 1 == len(metrics):
                grid[i][j].set_xlabel(variable)
        return made


def _values(rows: Iterable[Row], variable: str) -> list[Any]:
    return list(dict.fromkeys(found["labels"].get(variable) for found in rows))


def _draw(ax: Axes, rows: Sequence[Row], metric: str, variable: str, others: list[str]) -> None:
    places = _places(ax, _values(rows, variable))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for found in rows:
        if found[metric] is not None:
            groups.setdefault(tuple(found["labels"].get(v) for v in others), []).append(found)
    for color, (key, group) in zip(itertools.cycle(COLORS), groups.items()):
        points = [(places[found["labels"].get(variable)], found[metric]) for found in group]
        means = [(x, statistics.fmean(y for at, y in points if at == x)) for x in sorted({x for x, _ in points})]
        label = ", ".join(f"{name} {value}" for name, value in zip(others, key))
        ax.plot([x for x, _ in means], [y for _, y in means], color=color, lw=1.4, label=label)
        ax.scatter([x for x, _ in points], [y for _, y in points], color=color, s=14, zorder=3)
    ax.set_title(METRICS[metric], fontsize=9.5)
    if metric != "bits_per_byte":  # of which no run comes near zero
        ax.set_ylim(0, 1.08 * max(found[metric] for group in groups.values() for found in group) or 1)
    ax.grid(axis="y", color=GRID, lw=0.8)
    if others and len(groups) > 1:
        ax.legend(fontsize=7.5)


def _places(ax: Axes, values: list[Any]) -> dict[Any, float]:
    """Where values stand: numbers where they belong, if they grow so on powers of two; words side by side."""
    if all(isinstance(v, int | float) for v in values):
        if min(values) > 0 and max(values) >= 4 * min(values):
            ax.set_xscale("log", base=2)
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        return {v: float(v) for v in values}
    ax.set_xticks(range(len(values)), [str(v) for v in values], rotation=20)
    return {v: float(i) for i, v in enumerate(values)}
