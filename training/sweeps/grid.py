"""Reads a sweep file, which docs/sweep.md describes, and lists the runs that it stands for."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from data.tasks.distance import PATTERN as SHARE
from model.errors import UserError
from training.settings.config_file import load_settings, parse_file, report
from training.settings.problems import Keys, Problem, explain
from training.settings.schema import PositiveInt, Settings, Strict

Label = str | int | float
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Point(Strict):
    """One value of an axis. set: settings by dotted path."""

    label: Label = Field(description="the name of the value in runs, tables and plots")
    set: dict[str, Any] = Field(default_factory=dict)


class Axis(Strict):
    """One variable: a key (dotted path) with its values, or points that set several keys at once."""

    axis: Name = Field(description="the name of the variable")
    key: str | None = None
    values: list[Any] = Field(default_factory=list)
    points: list[Point] = Field(default_factory=list)

    def all_points(self) -> list[Point]:
        """The points, after those of the values. A value that is neither number nor text has its JSON as label."""
        named = [v if isinstance(v, Label) and not isinstance(v, bool) else json.dumps(v) for v in self.values]
        return [Point(label=label, set={str(self.key): v}) for label, v in zip(named, self.values)] + self.points


class Options(Strict):
    """Options of an evaluation's command, which describes them."""

    def arguments(self) -> list[str]:
        given = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in self if v}
        return [word for k, text in given.items() for word in (f"--{k.replace('_', '-')}", text)]


class RecallOptions(Options):
    n: PositiveInt = 200
    tasks: list[str] = Field(default_factory=list)
    distances: list[PositiveInt | Annotated[str, Field(pattern=rf"^{SHARE}$")]] = Field(default_factory=list)
    max_distance: PositiveInt | None = None


class LossOptions(Options):
    max_tokens: PositiveInt = 200_000
    rows: PositiveInt = 64
    context: PositiveInt | None = None


class Evaluations(Strict):
    """What is measured after each run."""

    recall: RecallOptions | None = None
    loss: LossOptions | None = None


class Sweep(Strict):
    """A sweep file; docs/sweep.md explains its keys."""

    name: Name = Field(description="name of the sweep and of its folder")
    config: str = Field(description="the YAML file that all runs start from, relative to this file")
    set: dict[str, Any] = Field(default_factory=dict)
    grid: list[Axis] = Field(description="the variables; every combination of their values is a run", min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    evaluate: Evaluations = Evaluations()

    def axes(self) -> list[Axis]:
        """The axes of the grid; the last axis is the seed."""
        return [*self.grid, Axis(axis="seed", key="seed", values=self.seeds)]


@dataclass(frozen=True)
class Run:
    """One run: its labels by variable (the seed is the last), its config, overrides and folder."""

    labels: dict[str, Label]
    config: Path
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


def load_sweep(path: Path) -> Sweep:
    """Raises UserError with all problems at once, each with its path, value, line and remedy."""
    tree, lines = parse_file(path)
    try:
        sweep = Sweep.model_validate(tree)
        problems = list(_inconsistencies(sweep))
    except ValidationError as errors:
        problems = list(explain(errors, tree, Sweep))

    def origin(keys: Keys) -> str:
        line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
        return f"{path}:{line}" if line else str(path)

    if problems:
        raise UserError(report(str(path), [p.at(origin(p.keys)) for p in problems]))
    return sweep


def _inconsistencies(sweep: Sweep) -> Iterator[Problem]:
    """Problems of axes and seeds that the types don't show."""
    axes = sweep.axes()
    names = [axis.axis for axis in axes]
    for i, axis in enumerate(axes):
        at: Keys = ("grid", i) if i < len(sweep.grid) else ("seeds",)
        labels = [_plain(point.label) for point in axis.all_points()]
        if not labels or (axis.key is None) == bool(axis.values):
            yield Problem(at, axis.axis, "an axis needs both key and values, or points", "add what is missing")
        if axis.axis in names[i + 1 :]:
            yield Problem((*at, "axis"), axis.axis, "another axis has this name (seeds are one)", "use another name")
        if len(set(labels)) < len(labels):
            yield Problem(at, labels, "one of them is listed twice", "list each once")


def runs(sweep: Sweep, path: Path, folder: Path, more: Sequence[str] = ()) -> list[Run]:
    """Every run of the sweep in `path`, inside `folder`. The last axis that sets a key wins; `more` wins over all."""
    listed, axes = [], sweep.axes()
    for points in itertools.product(*(axis.all_points() for axis in axes)):
        labels = {axis.axis: point.label for axis, point in zip(axes, points)}
        run = folder / ",".join(f"{name}={_plain(label)}" for name, label in labels.items())
        given = sweep.set | {key: value for point in points for key, value in point.set.items()}
        overrides = [f"{key}={json.dumps(_filled(value, labels))}" for key, value in given.items()]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{sweep.name}-{run.name}")
        own = [f"name={name}", f"run_dir={json.dumps(str(run))}"]
        listed.append(Run(labels, path.parent / sweep.config, (*overrides, *more, *own), run))
    return listed


def checked_settings(listed: Sequence[Run]) -> dict[str, Settings]:
    """Settings of each run by its name. Raises UserError with all problems of the first run that can't start."""
    settings = {}
    for run in listed:
        try:
            settings[run.name] = load_settings(run.config, run.overrides)
        except UserError as problem:
            raise UserError(f"the run {run.name} can't start\n{problem}") from problem
    return settings


def _filled(value: Any, labels: dict[str, Label]) -> Any:
    """A setting with the labels of its run in place of their names.

    >>> _filled("runs/base-{layers}-{seed}", {"layers": 8, "seed": 0}), _filled(3, {"layers": 8})
    ('runs/base-8-0', 3)
    """
    for name, label in labels.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", _plain(label))
    return value


def _plain(label: Label) -> str:
    """A label as part of a folder's name.

    >>> _plain(0.05), _plain("[16, 32]")
    ('0.05', '16-32')
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(label)).strip("-")
