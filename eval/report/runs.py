"""Run folders: the results that have been measured, the metrics of training, and the settings."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from eval.command import read_result
from model.errors import UserError

EVALUATIONS = ("recall", "reach", "loss", "relay", "heat")
Result = dict[str, Any]


@dataclass
class Run:
    """A run folder. `results` holds recall.json as "recall" and so on, for what has been measured."""

    folder: Path
    results: dict[str, Result]
    metrics: list[Result] = field(default_factory=list)
    settings: str = ""

    @property
    def header(self) -> Result:
        """One of the results: all begin with the same fields."""
        return next(iter(self.results.values()))

    @property
    def name(self) -> str:
        return str(self.header["model"])

    @property
    def missing(self) -> list[str]:
        """The evaluations that have not been run."""
        return [name for name in EVALUATIONS if name not in self.results]

    @property
    def measured_on(self) -> str:
        """The day on which the newest result was written."""
        newest = max((self.folder / f"{name}.json").stat().st_mtime for name in self.results)
        return datetime.fromtimestamp(newest).strftime("%Y-%m-%d")


def read_run(name: str) -> Run:
    """Read a run folder. Raises UserError if the folder is missing, holds no result, or holds a broken one."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"RUN {name!r}: no such folder; give the folder of a run, such as runs/quickstart")
    names = (*EVALUATIONS, "receipt")  # a receipt is for adapted models only, so it is never missing
    results = {key: read_result(file) for key in names if (file := folder / f"{key}.json").exists()}
    if not results:
        raise UserError(f"RUN {name!r}: nothing measured yet; run `python -m eval.recall {name}` first")
    settings = file.read_text(errors="replace") if (file := folder / "settings.yaml").exists() else ""
    return Run(folder, results, read_metrics(folder / "metrics.jsonl"), settings)


def read_metrics(file: Path) -> list[Result]:
    """The lines of metrics.jsonl. A last line that a killed run left incomplete is skipped."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(dict(json.loads(line.decode())))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{file}, line {number}: not JSON ({error}); correct or remove that line") from error
    return metrics


def tell_apart(runs: list[Run]) -> list[Run]:
    """Name runs by their folder where several have the same name."""
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            for result in run.results.values():
                result["model"] = str(run.folder)
    return runs
