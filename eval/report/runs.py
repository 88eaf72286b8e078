"""Run folders, as far as they have been measured."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.recall.__main__ import read_result
from model.errors import UserError

RESULTS = ("recall", "reach", "loss", "relay", "heat")
Result = dict[str, Any]


@dataclass
class Run:
    """A run folder as far as it has been measured."""

    folder: Path
    recall: Result | None = None
    reach: Result | None = None
    loss: Result | None = None
    relay: Result | None = None
    heat: Result | None = None
    metrics: list[Result] = field(default_factory=list)
    settings: str = ""

    @property
    def any(self) -> Result:
        """One of the results; all begin with the same fields."""
        return next((result for result in self.results if result), {})

    @property
    def results(self) -> list[Result | None]:
        return [getattr(self, kind) for kind in RESULTS]

    @property
    def name(self) -> str:
        return str(self.any["model"])

    @property
    def missing(self) -> list[str]:
        return [f"python -m eval.{kind} {self.folder}" for kind in RESULTS if getattr(self, kind) is None]


def read_run(name: str) -> Run:
    """Raises UserError when the folder is not there, holds no result, or holds a broken one."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"RUN {name!r}: no such folder; give the folder of a run, such as runs/quickstart")
    found = {kind: read_result(file) for kind in RESULTS if (file := folder / f"{kind}.json").exists()}
    if not found:
        raise UserError(f"RUN {name!r}: nothing measured yet; run `python -m eval.recall {name}` first")
    settings = folder / "settings.yaml"
    text = settings.read_text() if settings.exists() else ""
    return Run(folder, **found, metrics=read_metrics(folder / "metrics.jsonl"), settings=text)


def read_metrics(file: Path) -> list[Result]:
    """Rows of metrics.jsonl; the last line may have been cut by a killed run and is then left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{file}, line {number}: not JSON ({error}); mend or remove that line") from error
    return rows


def tell_apart(runs: list[Run]) -> list[Run]:
    """Runs whose model has the name of another's are called by their folder."""
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        for result in run.results:
            if names.count(name) > 1 and result is not None:
                result["model"] = str(run.folder)
    return runs
