"""From YAML files and the command line to `Settings`, or to one message that holds every problem.

    extends: base.yaml            a file, or a list of files (later ones win), relative to the file that says so
    training:
      optimizer: {lr: 3e-4}       sections merge key by key; lists and values replace; null takes the default back

On the command line `model.sliding_window=32`, `model.layers.0.kind=full`, `recall.tasks={needle-noise: 1}`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model.errors import UserError
from training.settings import yaml_text
from training.settings.consistency import inconsistencies
from training.settings.problems import Problem, dotted, explain
from training.settings.schema import Settings

Keys = tuple[str | int, ...]


@dataclass
class _Draft:
    """What was read so far: the tree, where each key of it came from, and what was wrong on the way."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, keys: Keys, otherwise: str) -> str:
        """Of the key, or of the nearest section that was written down."""
        while keys and keys not in self.origins:
            keys = keys[:-1]
        return self.origins.get(keys, otherwise)


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


def _validate(draft: _Draft, path: str) -> Settings | None:
    """Field by field, then across fields. Fields that are wrong are left out of the second look."""
    tree = _without_nulls(draft.tree)
    wrong: list[Keys] = []
    settings = None
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as errors:
        found = list(explain(errors, tree))
        wrong = [p.keys for p in found]
        draft.problems += [p.at(draft.origin(p.keys, path)) for p in found]
        settings = _rest(tree, wrong)
    if settings is not None:
        doubts = [p for p in inconsistencies(settings) if not any(_touches(p, keys) for keys in wrong)]
        draft.problems += [p.at(draft.origin(p.keys, path)) for p in doubts]
    return settings


def _rest(tree: dict[str, Any], wrong: list[Keys]) -> Settings | None:
    """Settings without the keys that are wrong, if they can stand without."""
    for keys in wrong:
        *parents, last = keys
        section: Any = tree
        for key in parents:
            section = section[key] if _holds(section, key) else None
        if isinstance(section, dict):
            section.pop(str(last), None)
    try:
        return Settings.model_validate(tree)
    except ValidationError:
        return None


def _touches(problem: Problem, wrong: Keys) -> bool:
    """Whether a problem across fields rests on a field that is wrong itself."""
    name = dotted(wrong)
    return any(name == p or name.startswith(f"{p}.") or p.startswith(f"{name}.") for p in problem.rests_on)


def report(path: str, problems: list[Problem]) -> str:
    """One message of all problems in `path`."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{path}: {count} in the settings", *map(str, problems)])


# -- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path, draft: _Draft, chain: tuple[Path, ...]) -> None:
    """Merge `path` and what it extends into the draft; `chain` holds the files that led here."""
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError("extends runs in a circle: " + " -> ".join(map(str, (*chain, path))) + "\n  remove one of them")
    tree, lines = parse_file(path, chain)
    for parent in _parents(path, tree):
        _read(path.parent / parent, draft, (*chain, path))
    draft.tree = _merged(draft.tree, tree)
    draft.origins |= {keys: f"{path}:{line}" for keys, line in lines.items()}


def parse_file(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[Keys, int]]:
    """The sections of a YAML file and the line of each key; `chain` holds the files that led to it.

    Raises UserError where it can't be read or holds no sections.
    """
    asked_by = f"\n  {chain[-1]} extends it; the path is relative to that file" if chain else ""
    try:
        tree, lines = yaml_text.parse(path.read_bytes())
    except OSError as problem:
        raise UserError(f"{path}: can't be read: {problem.strerror}{asked_by or _files_beside(path)}") from problem
    except yaml.YAMLError as problem:
        what, line = yaml_text.reason(problem)
        raise UserError(f"{path}{f':{line}' if line else ''}: {what}\n  mend the YAML there") from problem
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {_kind(tree)}, not settings\n  expected lines such as `name: my-run`")
    return tree, lines


def _files_beside(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    return f"\n  {folder} holds {', '.join(names)}" if names else "\n  give the path of a YAML file"


def _parents(path: Path, tree: dict[str, Any]) -> list[str]:
    names = tree.pop("extends", None) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{path}: extends = {names!r}\n  expected a file name or a list of them")
    return names


def _merged(below: Any, above: Any) -> Any:
    """Sections merge key by key, anything else replaces.

    >>> _merged({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
    {'a': {'b': 1, 'c': [3]}}
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_nulls(v) for k, v in tree.items() if v is not None}
    return [_without_nulls(v) for v in tree] if isinstance(tree, list) else tree


# -- command line -----------------------------------------------------------------------------------------------------


def _override(text: str, draft: _Draft) -> None:
    """Apply `a.b.0.c=value` to the draft, or note why that can't be."""
    name, equals, value_text = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        draft.problems.append(Problem((), text, "expected key=value", "write for example training.max_steps=100"))
        return
    try:
        value, _ = yaml_text.parse(value_text)
    except yaml.YAMLError as problem:
        what, _ = yaml_text.reason(problem)
        draft.problems.append(Problem(keys, value_text, f"not YAML: {what}", "quote it for the shell: 'key=[1, 2]'"))
        return
    _set(text, keys, value, draft)


def _set(text: str, keys: tuple[str, ...], value: Any, draft: _Draft) -> None:
    found: Any = draft.tree
    path: Keys = ()
    for last, key in _with_last(keys):
        if isinstance(found, list):
            if not _holds(found, key):
                have = f"{dotted(path)} has {len(found)} items"
                draft.problems.append(
                    Problem((*path, key), value, have, f"use 0 to {len(found) - 1}, or give the list")
                )
                return
            key = int(key)
        elif not isinstance(found, dict):
            problem = f"{dotted(path)} is {_kind(found)}, not a section"
            draft.problems.append(Problem((*path, key), value, problem, f"use {dotted(path)}=value"))
            return
        path = (*path, key)
        if last:
            found[key] = _merged(found[key] if _holds(found, key) else None, value)
        else:
            if not _holds(found, key) or found[key] is None:
                found[key] = {}
                draft.origins[path] = f"override {text}"
            found = found[key]
    draft.origins = {k: v for k, v in draft.origins.items() if k[: len(path)] != path} | {path: f"override {text}"}


def _with_last(keys: tuple[str, ...]) -> Iterator[tuple[bool, Any]]:
    for i, key in enumerate(keys, start=1):
        yield i == len(keys), key


def _holds(section: Any, key: Any) -> bool:
    if isinstance(section, list):
        return str(key).isdecimal() and int(key) < len(section)
    return isinstance(section, dict) and key in section


def _kind(value: Any) -> str:
    """In a sentence.

    >>> _kind(3), _kind("a"), _kind(None)
    ('a number', 'text', 'nothing')
    """
    names = {dict: "a section", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
