"""Stages: stretches of steps in one run that have other settings, such as longer rows and another rotary base.

    training:
      stages:
        - {start: 0.8, set: {data.seq_len: 2048, model.rope_theta: 1000000}}     the last fifth of the steps

A stage keeps the settings of the stage before it, except those that it sets. Weights, moments, the step, the learning
rate schedule and the curriculum's D go on. What the settings decide is made anew: what layers may see, positions,
rows of text and recall, and the probe.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from training.settings.build import layer_dicts
from training.settings.consistency import inconsistencies
from training.settings.problems import ABSENT, Keys, Problem, all_fields, explain
from training.settings.schema import Settings, StageSettings

MAY_CHANGE = (
    "data.seq_len", "model.layers", "model.sliding_window", "model.rope_theta", "model.rope_scaling",
    "model.max_position_embeddings", "recall.seq_len", "recall.tokens_per_step", "recall.weight",
    "recall.curriculum.max_distance", "recall.curriculum.row_lengths", "training.tokens_per_step",
    "training.micro_batch_tokens", "training.text_weight", "training.optimizer.lr", "training.probe_distances",
)  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """The steps from `first` to `end` (exclusive), which have the same `settings`; these list no stages.

    `text_first` is the step at which the order of its text begins: where rows or tokens of a step last changed.
    """

    settings: Settings
    first: int
    end: int
    text_first: int


def stretches_of(settings: Settings) -> list[Stretch]:
    """The steps of a run from the first to the last. One stretch if there are no stages."""
    stages, steps = settings.training.stages, settings.training.max_steps
    firsts = [0, *(first_step(stage, steps) for stage in stages)]
    now, text_first = _without_stages(settings), 0
    result = []
    for first, end, stage in zip(firsts, [*firsts[1:], steps], [None, *stages], strict=True):
        before, now = now, now if stage is None else Settings.model_validate(_changed(now, stage.set))
        text_first = text_first if _rows_of(now) == _rows_of(before) else first
        result.append(Stretch(now, first, end, text_first))
    return result


def first_step(stage: StageSettings, max_steps: int) -> int:
    return stage.start if isinstance(stage.start, int) else round(stage.start * max_steps)


def stage_problems(settings: Settings) -> list[Problem]:
    """All problems of the first stage that has any: its start, names that can't change, and the settings it makes."""
    now, last, steps = _without_stages(settings), 0, settings.training.max_steps
    for number, stage in enumerate(settings.training.stages):
        at: Keys = ("training", "stages", number)
        problems = [*_misplaced(at, stage, last, steps), *_fixed(at, stage)]
        if not problems:
            tree = _changed(now, stage.set)
            try:
                before, now = now, Settings.model_validate(tree)
                found = inconsistencies(now) or _lost_weights(before, now)
            except ValidationError as errors:
                found = explain(errors, tree)
            problems = [_within(at, problem) for problem in found]
        if problems:
            return problems
        last = first_step(stage, steps)
    return []


def _without_stages(settings: Settings) -> Settings:
    return settings.model_copy(update={"training": settings.training.model_copy(update={"stages": []})})


def _rows_of(settings: Settings) -> tuple[int, int]:
    """What decides which tokens the rows of a step hold."""
    return settings.data.seq_len, settings.training.tokens_per_step


def _changed(settings: Settings, change: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = settings.model_dump(mode="json")
    changed = dict(_dotted(change))
    if isinstance(scaling := changed.get("model.rope_scaling"), dict):
        trained = _trained_context(settings)
        if scaling.get("rope_type") != "linear":
            changed["model.rope_scaling"] = scaling = {"original_max_position_embeddings": trained} | scaling
        trained, factor = scaling.get("original_max_position_embeddings", trained), scaling.get("factor")
        if isinstance(trained, int) and isinstance(factor, int | float) and factor < 2**53:
            longest = max(settings.model.max_position_embeddings, int(trained * factor))
            changed.setdefault("model.max_position_embeddings", longest)
    for name, value in changed.items():
        *sections, last = name.split(".")
        section = tree
        for key in sections:
            section = section[key]
        section[last] = value
    return tree


def _trained_context(before: Settings) -> int:
    """The rows, in tokens, from which scaling of the rotary positions starts: those of the model before this stage."""
    model, known = before.model, before.model.rope_scaling
    pretrained = model.max_position_embeddings if model.init.from_pretrained else before.data.seq_len
    return (known and known.original_max_position_embeddings) or pretrained


def _dotted(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name. Sections may be nested, as an override on the command line writes them.

    >>> dict(_dotted({"data": {"seq_len": 64}, "model.rope_theta": 500}))
    {'data.seq_len': 64, 'model.rope_theta': 500}
    """
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in MAY_CHANGE:
            yield from _dotted(value, f"{name}.")
        else:
            yield name, value


def _misplaced(at: Keys, stage: StageSettings, last: int, steps: int) -> Iterator[Problem]:
    first, keys = first_step(stage, steps), (*at, "start")
    if first >= steps:
        what = f"the stage begins at step {first:,}, and the run has training.max_steps = {steps:,}"
        yield Problem(keys, stage.start, what, "lower it")
    elif first <= last:
        what = f"the stage begins at step {first:,}, and the one before it at step {last:,}"
        yield Problem(keys, stage.start, what, "raise it, or put the stages in order")


def _fixed(at: Keys, stage: StageSettings) -> Iterator[Problem]:
    known = {path for path, _ in all_fields(Settings)}
    for name, value in _dotted(stage.set):
        if name in MAY_CHANGE:
            continue
        remedy = f"a stage may set {', '.join(MAY_CHANGE)}"
        if name.startswith("data.sources"):
            what = "sources stay the same through a run"
            remedy = "give the source a weight that changes: points [share of all steps, weight]"
        elif name not in known:
            what = "unknown setting"
            near = get_close_matches(name, MAY_CHANGE, n=1)
            remedy = f"did you mean {near[0]}?" if near else remedy
        elif name.startswith("model."):
            what = "it decides what weights the model has, and these stay the same through a run"
        else:
            what = "it stays the same through a run"
        yield Problem((*at, "set", name), value, what, remedy)


def _lost_weights(before: Settings, now: Settings) -> Iterator[Problem]:
    """A sink is a weight of its layer."""
    layers = enumerate(zip(layer_dicts(before.model), layer_dicts(now.model), strict=True))
    if (number := next((i for i, (a, b) in layers if a["sink"] != b["sink"]), None)) is not None:
        what = f"layer {number} would gain or lose its sink, which is a weight"
        yield Problem(("model", "layers"), ABSENT, what, "keep `sink` of each layer as it was")


def _within(at: Keys, problem: Problem) -> Problem:
    """A problem of the settings of a stage, as one of the stage."""
    value = "" if problem.value is ABSENT else f" = {problem.value!r}"
    what = f"from this stage on {'.'.join(map(str, problem.keys))}{value}: {problem.what}"
    return Problem(at, ABSENT, what, problem.remedy)
