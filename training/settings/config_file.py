"""From YAML files and the command line to `Settings`, or to one message with every problem.

    extends: base.yaml            a file, or a list of files (later ones win), relative to the file that says so
    training:
      optimizer: {lr: 3e-4}       sections merge key by key; lists and values replace; null takes the default back

On the command line `model.sliding_window=32`, `model.layers.0.kind=full`, `recall.tasks={needle-noise: 1}`.

Files are YAML 1.2 (core schema). PyYAML alone reads YAML 1.1, where `3e-4` is text, `off` is false and `010` is 8. Here
`3e-4` and `1e9` are numbers, one without a fraction is a whole number, only `true` and `false` are booleans, and `on`,
`yes` and dates are text. A key twice in one section, aliases and tags are refused: files share settings by `extends`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from model.errors import UserError
from training.settings.consistency import inconsistencies
from training.settings.problems import Keys, Problem, dotted, explain
from training.settings.schema import Settings


@dataclass
class _Draft:
    """What was read so far: the tree, where each of its keys was written, and the problems on the way."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem, path: str) -> None:
        """Note a problem with the origin of its key, of the nearest section that was written, or else `path`."""
        keys = problem.keys
        while keys and keys not in self.origins:
            keys = keys[:-1]
        self.problems.append(problem.at(self.origins.get(keys, path)))


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read `path` with everything it extends, apply the overrides in order, check it all.

    Raises UserError: all problems at once, each with its dotted path, value, file and line, and remedy.
    """
    draft = _Draft()
    _read(Path(path), draft, ())
    for text in overrides:
        _override(text, draft)
    settings = _validate(draft, str(path))
    if settings is None or draft.problems:
        raise UserError(report(str(path), draft.problems))
    return settings


def report(path: str, problems: list[Problem]) -> str:
    """One message with all problems in `path`."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{path}: {count} in the settings", *map(str, problems)])


def _validate(draft: _Draft, path: str) -> Settings | None:
    """Check field by field, then across fields. Fields that are wrong themselves are left out of the second check."""
    tree = _without_nulls(draft.tree)
    wrong: list[Keys] = []
    try:
        settings: Settings | None = Settings.model_validate(tree)
    except ValidationError as errors:
        for problem in explain(errors, tree):
            draft.add(problem, path)
            wrong.append(problem.keys)
        settings = _without(wrong, tree)
    for problem in inconsistencies(settings) if settings else ():
        if not any(_rests_on(problem, dotted(keys)) for keys in wrong):
            draft.add(problem, path)
    return settings


def _without(wrong: list[Keys], tree: dict[str, Any]) -> Settings | None:
    """Settings without the keys that are wrong; None if they are incomplete without."""
    for *parents, last in wrong:
        section: Any = tree
        for key in parents:
            section = section[key] if _holds(section, key) else None
        if isinstance(section, dict):
            section.pop(str(last), None)
    try:
        return Settings.model_validate(tree)
    except ValidationError:
        return None


def _rests_on(problem: Problem, name: str) -> bool:
    """Whether the problem rests on the setting `name`, its section or a part of it."""
    return any(f"{name}.".startswith(f"{path}.") or f"{path}.".startswith(f"{name}.") for path in problem.rests_on)


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_nulls(v) for k, v in tree.items() if v is not None}
    return [_without_nulls(v) for v in tree] if isinstance(tree, list) else tree


# -- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path, draft: _Draft, chain: tuple[Path, ...]) -> None:
    """Merge `path` and what it extends into the draft; `chain` are the files that led here."""
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError("extends runs in a circle: " + " -> ".join(map(str, (*chain, path))) + "\n  remove one of them")
    tree, lines = parse_file(path, chain)
    parents = tree.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise UserError(f"{path}: extends = {parents!r}\n  expected a file name or a list of them")
    for name in parents:
        _read(path.parent / name, draft, (*chain, path))
    draft.tree = _merged(draft.tree, tree)
    draft.origins |= {keys: f"{path}:{line}" for keys, line in lines.items()}


def parse_file(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[Keys, int]]:
    """The sections of a YAML file and the line of each key; `chain` are the files that led to it.

    Raises UserError if it can't be read or holds no sections.
    """
    try:
        tree, lines = parse(path.read_bytes())
    except OSError as problem:
        remedy = f"{chain[-1]} extends it; the path is relative to that file" if chain else _files_beside(path)
        raise UserError(f"{path}: can't be read: {problem.strerror}\n  {remedy}") from problem
    except yaml.YAMLError as problem:
        what, line = _reason(problem)
        raise UserError(f"{path}{f':{line}' if line else ''}: {what}\n  correct the YAML there") from problem
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {_in_words(tree)}, not settings\n  expected lines such as `name: my-run`")
    return tree, lines


def _files_beside(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.y*ml"))
    return f"{path.parent} holds {', '.join(names)}" if names else "give the path of a YAML file"


def _merged(below: Any, above: Any) -> Any:
    """Sections merge key by key, anything else replaces.

    >>> _merged({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
    {'a': {'b': 1, 'c': [3]}}
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


# -- command line -----------------------------------------------------------------------------------------------------


def _override(text: str, draft: _Draft) -> None:
    """Apply `a.b.0.c=value` to the draft, or note why that is impossible."""
    name, equals, value_text = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        draft.problems.append(Problem((), text, "expected key=value", "write for example training.max_steps=100"))
        return
    try:
        value, _ = parse(value_text)
    except yaml.YAMLError as problem:
        what, remedy = f"not YAML: {_reason(problem)[0]}", "quote it for the shell: 'key=[1, 2]'"
        draft.problems.append(Problem(keys, value_text, what, remedy))
        return
    section: Any = draft.tree
    path: Keys = ()
    for key in keys:
        if path:
            if section[path[-1]] is None:
                section[path[-1]] = {}
            section = section[path[-1]]
        if isinstance(section, list) and not _holds(section, key):
            what, remedy = f"{dotted(path)} has {len(section)} items", f"use 0 to {len(section) - 1}, or give the list"
            draft.problems.append(Problem((*path, key), value, what, remedy))
            return
        if not isinstance(section, list | dict):
            what, remedy = f"{dotted(path)} is {_in_words(section)}, not a section", f"use {dotted(path)}=value"
            draft.problems.append(Problem((*path, key), value, what, remedy))
            return
        path = (*path, int(key) if isinstance(section, list) else key)
        if isinstance(section, dict):
            section.setdefault(key, None)
        draft.origins.setdefault(path, f"override {text}")
    section[path[-1]] = _merged(section[path[-1]], value)
    draft.origins = {k: v for k, v in draft.origins.items() if k[: len(path)] != path} | {path: f"override {text}"}


def _holds(section: Any, key: Any) -> bool:
    if isinstance(section, list):
        return str(key).isdecimal() and int(key) < len(section)
    return isinstance(section, dict) and key in section


def _in_words(value: Any) -> str:
    """What kind of value this is.

    >>> _in_words(3), _in_words("a"), _in_words(None)
    ('a number', 'text', 'nothing')
    """
    names = {dict: "a section", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


# -- YAML 1.2 ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Composes nodes with the tags of the YAML 1.2 core schema: null, bool, int, float."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]

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


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str | bytes) -> tuple[Any, dict[Keys, int]]:
    """The value of a YAML text, and the line of every key and list item by its path.

    Raises yaml.YAMLError, which `_reason` turns into a sentence.

    >>> parse("lr: 3e-4\\nswitch: off\\nsteps: 1e3")
    ({'lr': 0.0003, 'switch': 'off', 'steps': 1000}, {('lr',): 1, ('switch',): 2, ('steps',): 3})
    """
    loader, lines = _Loader(text), dict[Keys, int]()
    try:
        node = loader.get_single_node()
        return (None if node is None else _value(node, (), lines)), lines
    except RecursionError as problem:
        raise yaml.YAMLError("nested too deeply") from problem
    finally:
        loader.dispose()


def _value(node: Any, path: Keys, lines: dict[Keys, int]) -> Any:
    """The value of a node at `path`; the lines of the keys below it go into `lines`."""
    if isinstance(node, yaml.SequenceNode):
        lines |= {(*path, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [_value(item, (*path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.tag, node.value)
    section: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("a key must be a word", key)
        if key.value in section:
            raise _refused(f"{key.value} is here twice", key)
        lines[*path, key.value] = key.start_mark.line + 1
        section[key.value] = _value(value, (*path, key.value), lines)
    return section


def _scalar(tag: str, text: str) -> Any:
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    if tag == "float":
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return int(number) if number.is_integer() else number
    return text


def _reason(problem: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong, and the line."""
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        return problem.problem or "not YAML", problem.problem_mark.line + 1
    return str(problem).splitlines()[0], None
