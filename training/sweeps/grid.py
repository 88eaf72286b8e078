"""Reads a sweep file, and lists the runs that it stands for.

    name: law
    config: ../quickstart.yaml        relative to this file
    set: {training.max_steps: 600}    settings of every run, by dotted path
    grid:                             every combination of the axes is a run
      - {axis: layers, key: model.num_hidden_layers, values: [2, 4, 8]}
      - axis: window
        points:
          - {label: 8, set: {model.sliding_window: 8, recall.rows.relay_pace: 6}}
          - {label: 16, set: {model.sliding_window: 16}}
    seeds: [0, 1]
    evaluate: {recall: {n: 200}, loss: {}}

The labels of a run are its name, `layers=8,window=16,seed=0`, and the name of its folder. A setting that is text may
contain labels of its run in braces: `runs/sweeps/law-base/window={window},seed={seed}`.
"""

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
from training.settings.problems import ABSENT, Keys, Problem, explain
from training.settings.schema import PositiveInt, Settings, Strict

Label = str | int | float
Labels = dict[str, Label]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Overrides = dict[str, Any]


class Point(Strict):
    """One value of an axis. config: default is that of the sweep. set: settings by dotted path."""

    label: Label = Field(description="the name of the value in runs, tables and plots")
    config: str | None = None
    set: Overrides = Field(default_factory=dict)


class Axis(Strict):
    """One variable: a key (dotted path) with its values, or points that set several keys at once."""

    axis: Name = Field(description="the name of the variable")
    key: str | None = None
    values: list[Any] = Field(default_factory=list)
    points: list[Point] = Field(default_factory=list)

    def all_points(self) -> list[Point]:
        return [Point(label=_label(value), set={str(self.key): value}) for value in self.values] + self.points


class Extra(Strict):
    """A run beside the grid, with its labels by variable."""

    labels: Labels = Field(description="variable: label", min_length=1)
    config: str | None = None
    set: Overrides = Field(default_factory=dict)


class RecallOptions(Strict):
    """Options of `python -m eval.recall`; that command describes them."""

    n: PositiveInt = 200
    tasks: list[str] = Field(default_factory=list)
    distances: list[PositiveInt | Annotated[str, Field(pattern=rf"^{SHARE}$")]] = Field(default_factory=list)
    max_distance: PositiveInt | None = None


class LossOptions(Strict):
    """Options of `python -m eval.loss`; that command describes them."""

    max_tokens: PositiveInt = 200_000
    rows: PositiveInt = 64
    context: PositiveInt | None = None


class Evaluations(Strict):
    """What is measured after each run."""

    recall: RecallOptions | None = None
    loss: LossOptions | None = None

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """(name, options) of each evaluation."""
        for name, options in (("recall", self.recall), ("loss", self.loss)):
            given = options.model_dump() if options else {}
            texts = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in given.items() if v}
            if options:
                yield name, [word for k, text in texts.items() for word in (f"--{k.replace('_', '-')}", text)]


class Sweep(Strict):
    """A sweep file; the docstring of this module explains its keys."""

    name: Name = Field(description="name of the sweep and of its folder")
    config: str | None = None
    set: Overrides = Field(default_factory=dict)
    grid: list[Axis] = Field(default_factory=list)
    runs: list[Extra] = Field(default_factory=list)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    evaluate: Evaluations = Evaluations()

    def combinations(self) -> Iterator[tuple[Labels, str | None, Overrides]]:
        """Labels, config and settings of each run, without seeds. If axes set the same key, the last one wins."""
        for points in itertools.product(*(axis.all_points() for axis in self.grid)) if self.grid else ():
            labels = {axis.axis: point.label for axis, point in zip(self.grid, points)}
            config = next((point.config for point in reversed(points) if point.config), self.config)
            yield labels, config, {key: value for point in points for key, value in point.set.items()}
        for run in self.runs:
            yield run.labels, run.config or self.config, run.set


@dataclass(frozen=True)
class Run:
    """One run: its labels by variable (the seed is the last), its config, overrides and folder."""

    labels: Labels
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
        while keys and keys not in lines:
            keys = keys[:-1]
        return f"{path}:{lines[keys]}" if keys else str(path)

    if problems:
        raise UserError(report(str(path), [p.at(origin(p.keys)) for p in problems]))
    return sweep


def runs(sweep: Sweep, path: Path, folder: Path, more: Sequence[str] = ()) -> list[Run]:
    """Every run of the sweep in `path`. `folder` is that of the sweep; the overrides `more` win."""
    listed = []
    for (labels, config, settings), seed in itertools.product(sweep.combinations(), sweep.seeds):
        labels = labels | {"seed": seed}
        run = folder / _run_name(labels)
        given = sweep.set | settings | {"seed": seed}
        overrides = [f"{key}={json.dumps(_filled(value, labels))}" for key, value in given.items()]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{sweep.name}-{run.name}")
        own = [f"name={name}", f"run_dir={json.dumps(str(run))}"]
        listed.append(Run(labels, path.parent / str(config), (*overrides, *more, *own), run))
    return listed


def checked_settings(listed: Sequence[Run]) -> dict[str, Settings]:
    """Settings of each run by its name. Raises UserError with the problems of all runs, each problem once."""
    settings: dict[str, Settings] = {}
    problems: dict[str, list[str]] = {}
    for run in listed:
        try:
            settings[run.name] = load_settings(run.config, run.overrides)
        except UserError as problem:
            problems.setdefault(str(problem), []).append(run.name)
    if problems:
        parts = [f"{n[0]}{f' and {len(n) - 1} more' if n[1:] else ''}: {text}" for text, n in problems.items()]
        raise UserError("\n".join([f"{len(listed) - len(settings)} of {len(listed)} runs can't start", *parts]))
    return settings


def _inconsistencies(sweep: Sweep) -> Iterator[Problem]:
    if not sweep.grid and not sweep.runs:
        yield Problem(("grid",), ABSENT, "there is nothing to run", "add an axis to grid, or a run to runs")
    names = [axis.axis for axis in sweep.grid]
    for i, axis in enumerate(sweep.grid):
        at: Keys = ("grid", i)
        if not axis.values and not axis.points:
            yield Problem(at, axis.axis, "the axis has no values", "give key and values, or points")
        if axis.values and axis.key is None:
            what = "no key says which setting the values are for"
            yield Problem((*at, "values"), axis.values, what, "add key: a dotted path")
        if axis.key is not None and not axis.values:
            yield Problem((*at, "key"), axis.key, "it has no values", "add values: [a, b]")
        if axis.axis == "seed" or axis.axis in names[:i]:
            what = "seeds are an axis of their own" if axis.axis == "seed" else "two axes have this name"
            yield Problem((*at, "axis"), axis.axis, what, "use another name")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield Problem(("seeds",), sweep.seeds, "a seed is listed twice", "list each seed once")
    seen = set()
    for labels, config, _ in sweep.combinations():
        name = _run_name(labels)
        if name in seen:
            yield Problem(("runs" if sweep.runs else "grid",), name, "two runs have these labels", "change a label")
        if config is None:
            what, remedy = f"the run {name} has no config", "add config: ../quickstart.yaml here, or to the run"
            yield Problem(("config",), ABSENT, what, remedy)
        seen.add(name)


def _run_name(labels: Labels) -> str:
    return ",".join(f"{name}={_plain(label)}" for name, label in labels.items())


def _label(value: Any) -> Label:
    """The value itself if it is a number or text, else its JSON."""
    return value if isinstance(value, Label) and not isinstance(value, bool) else json.dumps(value)


def _filled(value: Any, labels: Labels) -> Any:
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
