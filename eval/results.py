"""Writes what an evaluation measured: a JSON file, its picture, and the tables of the report on the terminal."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.report.runs import Run
from eval.report.tables import tables_of
from training.run.checkpoint import write_json


def write_result(name: str, result: dict[str, Any], folder: Path, draw: Callable[[Any], Any]) -> None:
    """Write NAME.json, and what `draw` makes of the module `eval.plots` as NAME.png, into `folder`; print tables."""
    from eval import plots  # imports matplotlib

    write_json(folder / f"{name}.json", result)
    plots.save(draw(plots), folder / f"{name}.png")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables_of(Run(folder, {name: result})).values():
        table.print(console)
    print(f"Written: {folder / name}.json and {name}.png")
