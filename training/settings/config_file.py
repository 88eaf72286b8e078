"""From YAML files and the command line to `Settings`, or to one message with every problem.

    extends: base.yaml            a file, or a list of files (later ones win), relative to the file that says so;
                                  one that is named again, by any of them, is read the first time alone
    training:
      optimizer: {lr: 3e-4}       sections merge key by key; lists and values replace; null takes the default back

On the command line `model.sliding_window=32`, `model.layers.0.kind=full`, `recall.tasks={needle-noise: 1}`.

Files are YAML 1.2 (core schema). PyYAML alone reads YAML 1.1, where `3e-4` is text, `off` is false and `010` is 8. Here
`3e-4` and `1e9` are numbers, one without a fraction is a whole number, only `true` and `false` are booleans, and `on`,
`yes` and dates are text. A key twice in one section, aliases and tags are refused: files share settings by `extends`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from model.errors import UserError, read_small_file
from training.settings.consistency import inconsistencies
from training.settings.pretrained import fill_in
from training.settings.problems import MOST_SHOWN, Keys, Problem, explain
from training.settings.schema import Settings
from training.settings.stages import stage_problems

MOST_BYTES, MOST_KEYS = 1 << 18, 16  # of a file, which PyYAML reads in a second or two; in the path of an override


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read `path` with everything it extends, apply the overrides in order, check it all.

    Raises UserError with all wrong values at once, or if each value is right, with all contradictions between them.
    Each problem has its dotted path, value, file and line, and remedy.
    """
    tree: dict[str, Any] = {}
    origins: dict[Keys, str] = {}
    _read(Path(path), tree, origins, (), set())
    problems = [problem for text in overrides if (problem := _override(text, tree, origins))]
    tree = _without_nulls(tree)
    problems += fill_in(tree)
    try:
        settings = Settings.model_validate(tree)
        problems += inconsistencies(settings) or stage_problems(settings)
    except ValidationError as errors:
        problems += explain(errors, tree)
    if problems:
        raise UserError(report(str(path), problems, origins))
    return settings


def report(path: str, problems: list[Problem], origins: Mapping[Keys, str] = MappingProxyType({})) -> str:
    """One message with the first problems in `path`, each with the origin of its key or of the nearest section."""
    more = f"more than {MOST_SHOWN}, of which these are the first" if len(problems) > MOST_SHOWN else ""
    lines = [f"{path}: {more or len(problems)} problem{'s' * (len(problems) > 1)} in the settings"]
    for problem in problems[:MOST_SHOWN]:
        keys = problem.keys
        while keys and keys not in origins:
            keys = keys[:-1]
        lines.append(str(problem if problem.origin else problem.at(origins.get(keys, path))))
    return "\n".join(lines)


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_nulls(v) for k, v in tree.items() if v is not None}
    return [_without_nulls(v) for v in tree] if isinstance(tree, list) else tree


def _read(
    path: Path, settings: dict[str, Any], origins: dict[Keys, str], chain: tuple[Path, ...], seen: set[str]
) -> None:
    """Merge `path` and what it extends into the settings, but for what was `seen`; `chain` are the files that led here.

    Without `seen`, files that name two others each would be read 2, 4, 8 ... times.
    """
    real = os.path.realpath(path)
    if real in map(os.path.realpath, chain):
        raise UserError("extends runs in a circle: " + " -> ".join(map(str, (*chain, path))) + "\n  remove one of them")
    if real in seen:
        return
    seen.add(real)
    tree, lines = parse_file(path, chain)
    parents = tree.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise UserError(f"{path}: extends = {parents!r}\n  expected a file name or a list of them")
    for name in parents:
        _read(path.parent / name, settings, origins, (*chain, path), seen)
    settings |= _merged(settings, tree)
    origins |= {keys: f"{path}:{line}" for keys, line in lines.items()}


def parse_file(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[Keys, int]]:
    """The sections of a YAML file and the line of each key; `chain` are the files that led to it. Raises UserError."""
    try:
        tree, lines = parse(read_small_file(path, MOST_BYTES))
    except OSError as problem:
        files = ", ".join(sorted(p.name for p in path.parent.glob("*.y*ml"))) or "no YAML file"
        remedy = f"{chain[-1]} extends it; the path is relative to that file" if chain else f"{path.parent} has {files}"
        raise UserError(f"{path}: can't be read: {problem.strerror}\n  {remedy}") from problem
    except yaml.YAMLError as problem:
        what, line = _reason(problem)
        raise UserError(f"{path}{f':{line}' if line else ''}: {what}\n  correct the YAML there") from problem
    if not isinstance(tree, dict):
        raise UserError(f"{path}: has no settings\n  expected lines such as `name: my-run`")
    return tree, lines


def _merged(below: Any, above: Any) -> Any:
    """Sections merge key by key. Keys that are indices change items of a list. Anything else replaces.

    >>> _merged({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
    {'a': {'b': 1, 'c': [3]}}
    >>> _merged([1, 2], {"1": 3})
    [1, 3]
    """
    if isinstance(below, list) and isinstance(above, dict) and above and above.keys() <= _items(below).keys():
        return list(_merged(_items(below), above).values())
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _override(text: str, settings: dict[str, Any], origins: dict[Keys, str]) -> Problem | None:
    """Apply `a.b.0.c=value` to the settings, or return why that is impossible."""
    name, equals, value_text = text.partition("=")
    names = name.strip().split(".")
    if not equals or not all(names) or len(names) > MOST_KEYS:
        return Problem((), text, "expected key=value", "write for example training.max_steps=100", "command line")
    try:
        tree, _ = parse(value_text)
    except yaml.YAMLError as problem:
        what, remedy = f"not YAML: {_reason(problem)[0]}", "quote it for the shell: 'key=[1, 2]'"
        return Problem(tuple(names), value_text, what, remedy, "command line")
    for key in reversed(names):
        tree = {key: tree}
    path: Keys = tuple(int(key) if re.fullmatch("[0-9]{1,9}", key) else key for key in names)
    for keys in [keys for keys in origins if keys[: len(path)] == path]:
        del origins[keys]
    before: Any = dict(settings)
    settings |= _merged(settings, tree)
    after: Any = settings
    for n, key in enumerate(names, 1):
        before, after = _items(before).get(key), _items(after).get(key)
        if n == len(path) or type(before) is not type(after):  # written here for the first time, or replaced
            origins[path[:n]] = f"override {text}"
    return None


def _items(section: Any) -> dict[str, Any]:
    """The values in a section or list by their keys; empty for anything else."""
    if isinstance(section, list):
        return {str(i): item for i, item in enumerate(section)}
    return section if isinstance(section, dict) else {}


class _Loader(yaml.BaseLoader):
    """Leaves every scalar as text, and refuses what settings don't need."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases are not read; use extends", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"remove the tag {event.tag}", event)
        # Escapes can write characters that no path and no terminal accepts.
        if character := re.search("[\0\ud800-\udfff]", getattr(event, "value", "")):
            raise _refused(f"text holds the character {character[0]!r}", event)
        return super().compose_node(parent, index)


def _refused(what: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, what, where.start_mark)


def parse(text: str | bytes) -> tuple[Any, dict[Keys, int]]:
    """The value of a YAML text, and the line of every key and list item by its path. Raises yaml.YAMLError.

    >>> parse("lr: 3e-4\\nswitch: off\\nsteps: 1e3")
    ({'lr': 0.0003, 'switch': 'off', 'steps': 1000}, {('lr',): 1, ('switch',): 2, ('steps',): 3})
    """
    lines = dict[Keys, int]()
    try:
        node = yaml.compose(text, _Loader)
        return (None if node is None else _value(node, (), lines)), lines
    except RecursionError as problem:
        raise yaml.YAMLError("nested too deeply") from problem
    except ValueError as problem:  # an escape such as "\\U00110000"
        raise yaml.YAMLError(f"text holds a character that does not exist ({problem})") from problem


def _value(node: Any, path: Keys, lines: dict[Keys, int]) -> Any:
    """The value of a node at `path`; the lines of the keys below it go into `lines`."""
    if isinstance(node, yaml.SequenceNode):
        lines |= {(*path, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [_value(item, (*path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _plain(node.value) if node.style is None else node.value
    section: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("a key must be a word", key)
        if key.value in section:
            raise _refused(f"{key.value} is here twice", key)
        lines[*path, key.value] = key.start_mark.line + 1
        section[key.value] = _value(value, (*path, key.value), lines)
    return section


def _plain(text: str) -> Any:
    """The value of a scalar without quotes."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", text):
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    if re.fullmatch(r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)", text):
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return int(number) if number.is_integer() else number
    return text


def _reason(problem: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong, and the line."""
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        return problem.problem or "not YAML", problem.problem_mark.line + 1
    return str(problem).splitlines()[0], None
