"""A grid of runs from one YAML file: what it may say, and the list of runs that it means.

    name: law
    config: ../quickstart.yaml        relative to this file
    set: {training.max_steps: 600}    for every run, by dotted path
    grid:                             every combination of the axes
      - {axis: layers, key: model.num_hidden_layers, values: [2, 4, 8]}
      - axis: window
        points:
          - {label: 8, set: {model.sliding_window: 8, recall.rows.relay_pace: 6}}
          - {label: 16, set: {model.sliding_window: 16}}
    seeds: [0, 1]
    evaluate: {recall: {n: 200}, loss: {}}

A run is named by its labels, `layers=8,window=16,seed=0`, and lives in the folder of that name. A setting that is text
may hold labels of its run: `runs/sweeps/law-base/window={window},seed={seed}`.
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
from training.settings.problems import ABSENT, Problem, explain
from training.settings.schema import PositiveInt, Settings, Strict

Label = str | int | float
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Overrides = dict[str, Any]


class Point(Strict):
    """One value of an axis."""

    label: Label = Field(description="how the value is called in names, table and plots")
    config: str | None = Field(
        None, description="the config of these runs, relative to this file; default: the sweep's"
    )
    set: Overrides = Field(default_factory=dict, description="settings by dotted path")


class Axis(Strict):
    """One variable: a key with values, or points that set several keys at once."""

    axis: Name = Field(description="name of the variable")
    key: str | None = Field(None, description="dotted path of the setting that `values` are for")
    values: list[Any] = Field(default_factory=list, description="values of `key`")
    points: list[Point] = Field(default_factory=list, description="labels with the settings of each")

    def all_points(self) -> list[Point]:
        made = [Point(label=_label(value), set={str(self.key): value}) for value in self.values]
        return made + self.points


class Extra(Strict):
    """A run of its own beside the grid."""

    labels: dict[str, Label] = Field(description="variable: label", min_length=1)
    config: str | None = Field(None, description="its config, relative to this file; default: the sweep's")
    set: Overrides = Field(default_factory=dict, description="settings by dotted path")


class RecallOptions(Strict):
    """As `python -m eval.recall` takes them."""

    n: PositiveInt = Field(200, description="items a distance")
    tasks: list[str] = Field(default_factory=list, description="default: those the run was trained on")
    distances: list[PositiveInt | Annotated[str, Field(pattern=rf"^{SHARE}$")]] = Field(
        default_factory=list, description="tokens, or shares of W and R such as 0.9R; default: the protocol's"
    )
    max_distance: PositiveInt | None = Field(None, description="cut the protocol's distances here")


class LossOptions(Strict):
    """As `python -m eval.loss` takes them."""

    max_tokens: PositiveInt = Field(200_000, description="held-out tokens to score")
    rows: PositiveInt = Field(64, description="rows for the curves by position and context")
    context: PositiveInt | None = Field(None, description="tokens before each scored token; default: R, up to 1,024")


class Evaluations(Strict):
    """What is measured after each run."""

    recall: RecallOptions | None = Field(None, description="H90, H50, U90")
    loss: LossOptions | None = Field(None, description="bits per byte")

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """(name, options) of each evaluation."""
        for name, options in (("recall", self.recall), ("loss", self.loss)):
            if options is not None:
                given = {k: v for k, v in options.model_dump().items() if v not in (None, [])}
                yield name, [x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", _option(v))]


class Sweep(Strict):
    """A sweep file."""

    name: Name = Field(description="of the sweep and its folder")
    config: str | None = Field(None, description="the config that runs start from, relative to this file")
    set: Overrides = Field(default_factory=dict, description="settings of every run by dotted path")
    grid: list[Axis] = Field(default_factory=list, description="axes; every combination is a run")
    runs: list[Extra] = Field(default_factory=list, description="further runs")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [0], min_length=1, description="each run once a seed"
    )
    evaluate: Evaluations = Field(Evaluations(), description="what is measured after each run")


@dataclass(frozen=True)
class Run:
    """One run: its labels by variable (the seed the last), the config and the overrides that make it."""

    labels: dict[str, Label]
    config: Path
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


def load_sweep(path: Path) -> Sweep:
    """Raises UserError: all problems at once, each with its path, value, line and remedy."""
    tree, lines = parse_file(path)
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as errors:
        found = list(explain(errors, tree, Sweep))
    else:
        found = list(_inconsistencies(sweep))
    if found:
        raise UserError(report(str(path), [p.at(_line(path, lines, p.keys)) for p in found]))
    return sweep


def runs(sweep: Sweep, path: Path, folder: Path, more: Sequence[str] = ()) -> list[Run]:
    """Every run of the sweep; `folder` is the sweep's, `more` are overrides of the command line, which win."""
    made = []
    for labels, config, settings in _combinations(sweep):
        for seed in sweep.seeds:
            named = labels | {"seed": seed}
            run = folder / ",".join(f"{name}={_plain(label)}" for name, label in named.items())
            given = sweep.set | settings | {"seed": seed}
            overrides = [f"{key}={_flow(_filled(value, named))}" for key, value in given.items()]
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{sweep.name}-{run.name}")
            own = [f"name={name}", f"run_dir={_flow(str(run))}"]
            made.append(Run(named, path.parent / str(config), (*overrides, *more, *own), run))
    return made


def checked_settings(found: Sequence[Run]) -> dict[str, Settings]:
    """Settings of each run by its name. Raises UserError with the problems of all; the same problem is told once."""
    settings: dict[str, Settings] = {}
    problems: dict[str, list[str]] = {}
    for run in found:
        try:
            settings[run.name] = load_settings(run.config, run.overrides)
        except UserError as problem:
            problems.setdefault(str(problem), []).append(run.name)
    if problems:
        parts = [f"{_count(names)}: {text}" for text, names in problems.items()]
        raise UserError("\n".join([f"{len(found) - len(settings)} of {len(found)} runs can't start", *parts]))
    return settings


# -- checks -----------------------------------------------------------------------------------------------------------


def _inconsistencies(sweep: Sweep) -> Iterator[Problem]:
    if not sweep.grid and not sweep.runs:
        yield Problem(("grid",), ABSENT, "there is nothing to run", "add an axis to grid, or a run to runs")
    for i, axis in enumerate(sweep.grid):
        yield from _axis_problems(("grid", i), axis)
    names = [axis.axis for axis in sweep.grid]
    for name in {n for n in names if names.count(n) > 1 or n == "seed"}:
        what = "seeds are an axis of their own" if name == "seed" else "two axes have this name"
        yield Problem(("grid", names.index(name), "axis"), name, what, "use another name")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield Problem(("seeds",), sweep.seeds, "a seed is here twice", "name each once")
    yield from _repeated(sweep)
    for at, config in _configs(sweep):
        if config is None:
            remedy = "name one there, or for the whole sweep: config: ../quickstart.yaml"
            yield Problem((*at, "config"), ABSENT, "these runs have no config", remedy)


def _axis_problems(at: tuple[str | int, ...], axis: Axis) -> Iterator[Problem]:
    if not axis.all_points():
        yield Problem(at, axis.axis, "the axis has no values", "give key and values, or points")
    if axis.values and axis.key is None:
        yield Problem((*at, "values"), axis.values, "no key says what they are values of", "add key: a dotted path")
    if axis.key is not None and not axis.values:
        yield Problem((*at, "key"), axis.key, "no values are given for it", "add values: [a, b]")


def _repeated(sweep: Sweep) -> Iterator[Problem]:
    seen = set()
    for labels, _, _ in _combinations(sweep):
        name = ",".join(f"{k}={_plain(v)}" for k, v in labels.items())
        if name in seen:
            yield Problem(("runs" if sweep.runs else "grid",), name, "two runs have these labels", "change a label")
        seen.add(name)


def _configs(sweep: Sweep) -> Iterator[tuple[tuple[str | int, ...], str | None]]:
    """Where a config is named, or would have to be."""
    if sweep.grid and not any(p.config for axis in sweep.grid for p in axis.all_points()):
        yield (), sweep.config
    for i, axis in enumerate(sweep.grid):
        if any(p.config for p in axis.points):
            yield from ((("grid", i, "points", j), p.config or sweep.config) for j, p in enumerate(axis.points))
    yield from ((("runs", i), run.config or sweep.config) for i, run in enumerate(sweep.runs))


def _combinations(sweep: Sweep) -> Iterator[tuple[dict[str, Label], str | None, Overrides]]:
    """Labels, config and settings of each run, seeds apart; where axes set the same key, the last one wins."""
    if sweep.grid:
        for points in itertools.product(*(axis.all_points() for axis in sweep.grid)):
            labels = {axis.axis: point.label for axis, point in zip(sweep.grid, points, strict=True)}
            config = next((point.config for point in reversed(points) if point.config), sweep.config)
            yield labels, config, {key: value for point in points for key, value in point.set.items()}
    for run in sweep.runs:
        yield run.labels, run.config or sweep.config, run.set


# -- words ------------------------------------------------------------------------------------------------------------


def _line(path: Path, lines: dict[tuple[str | int, ...], int], keys: tuple[str | int, ...]) -> str:
    while keys and keys not in lines:
        keys = keys[:-1]
    return f"{path}:{lines[keys]}" if keys else str(path)


def _flow(value: Any) -> str:
    """One line of YAML, which JSON is."""
    return json.dumps(value)


def _filled(value: Any, labels: dict[str, Label]) -> Any:
    """A setting with the labels of its run in it.

    >>> _filled("runs/base-{layers}-{seed}", {"layers": 8, "seed": 0}), _filled(3, {"layers": 8})
    ('runs/base-8-0', 3)
    """
    if isinstance(value, str):
        for name, label in labels.items():
            value = value.replace(f"{{{name}}}", _plain(label))
    return value


def _label(value: Any) -> Label:
    return value if isinstance(value, Label) and not isinstance(value, bool) else _flow(value)


def _option(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(label: Label) -> str:
    """A label as part of a folder's name.

    >>> _plain(0.05), _plain("[16, 32]")
    ('0.05', '16-32')
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(label)).strip("-")


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
