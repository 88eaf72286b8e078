"""Shows the runs of a sweep side by side: as JSON, as a table in Markdown and on the terminal, and as a picture."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from eval.plots.canvas import COLORS, GRID, save, styled
from eval.report.runs import read_metrics
from training.run.checkpoint import write_json, write_text
from training.run.folder import read_facts

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
    rows = [row(*state) for state in states]
    write_json(folder / "sweep.json", {"name": name, "command": command, "runs": rows})
    page, picture = markdown(name, rows, command), figure(rows)
    if picture is not None:
        save(picture, folder / "sweep.png")
    write_text(folder / "sweep.md", page + ("\n![The metrics of all runs](sweep.png)\n" if picture else ""))
    console.print(Markdown(page))
    console.print(
        f"Written: {folder}/sweep.json, sweep.md{', sweep.png' if picture else ''}", soft_wrap=True, markup=False
    )


def row(labels: dict[str, Any], folder: Path, state: str) -> Row:
    """Labels, state and results of a run; None for what it has not got. `further` are tasks beside the first one."""
    recall, loss = read_facts(folder, "recall.json"), read_facts(folder, "loss.json")
    task, *further = recall["tasks"].values() if recall else [{}]
    logged = [event for event in read_metrics(folder / "metrics.jsonl") if event.get("kind") == "train"]
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
        **{k: last.get(k) for k in ("tokens", "distance")},
        "tokens_per_second": statistics.median(rates) if rates else None,
    }


def markdown(name: str, rows: Sequence[Row], command: str) -> str:
    """A page with a table of all runs. Tasks beside the first one have a column each."""
    tasks = dict.fromkeys(task for r in rows for task in r["further"])
    columns = {"reach": ("R", ","), "h90": ("H90", ","), "h50": ("H50", ",.0f"), "u90": ("U90", ".2f")}
    columns |= {task: (f"H50 {task}", ",.0f") for task in tasks}
    columns |= {"bits_per_byte": ("bits per byte", ".3f"), "tokens": ("tokens", ",")}
    columns |= {"tokens_per_second": ("tokens/s", ",.0f"), "cache_bytes": ("cache bytes", ",")}
    heads = [*rows[0]["labels"], *(head for head, _ in columns.values()), "state"]
    lines = [heads, ["---:"] * len(heads)]
    for r in rows:
        values = r | {task: r["further"].get(task, {}).get("h50") for task in tasks}
        cells = ("–" if values[key] is None else format(values[key], number) for key, (_, number) in columns.items())
        lines.append([*map(str, r["labels"].values()), *cells, r["state"]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {name}\n\nMade by `{command}`. {NOTE}\n\n{table}\n"


@styled
def figure(rows: Sequence[Row]) -> Figure | None:
    """Every metric against the first variable, one colour for each combination of the others.

    Dots are runs, lines or dashes are means over seeds. None if no run has a metric.
    """
    metrics = [m for m in METRICS if any(r[m] is not None for r in rows)]
    if not metrics:
        return None
    varied = [v for v in rows[0]["labels"] if v != "seed" and len({r["labels"][v] for r in rows}) > 1]
    variable, *others = varied or ["seed"]
    values = list(dict.fromkeys(r["labels"][variable] for r in rows))
    are_words = any(isinstance(v, str) for v in values)  # which are not joined by lines
    style: dict[str, Any] = {"ls": "none", "marker": "_", "ms": 12} if are_words else {"lw": 1.4}
    groups: dict[str, list[Row]] = {}
    for r in rows:
        groups.setdefault(", ".join(f"{name} {r['labels'][name]}" for name in others), []).append(r)
    drawn = Figure(figsize=(6, 2.5 * len(metrics)), layout="constrained")
    for ax, metric in zip(drawn.subplots(len(metrics), squeeze=False, sharex=True)[:, 0], metrics):
        for color, (label, group) in zip(line_colors(len(groups)), groups.items()):
            points = [(values.index(r["labels"][variable]), r[metric]) for r in group if r[metric] is not None]
            means = {x: statistics.fmean(y for at, y in points if at == x) for x in sorted({x for x, _ in points})}
            ax.plot(list(means), list(means.values()), color=color, label=label, **style)
            ax.scatter([x for x, _ in points], [y for _, y in points], color=color, s=14, zorder=3)
        ax.set_title(METRICS[metric], fontsize=9.5)
        ax.set_ylim(bottom=None if metric == "bits_per_byte" else 0)  # no run comes near zero bits
        ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_xticks(range(len(values)), values)
    ax.set_xlabel(variable)
    if others:
        drawn.axes[0].legend(fontsize=7.5)
    return drawn


def line_colors(n: int) -> list[Any]:
    """`n` different colours: those of the house, or equal steps of a colormap where they are too few."""
    return list(COLORS[:n]) if n <= len(COLORS) else list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, n)))
