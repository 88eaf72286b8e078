"""Mistakes in settings as sentences: dotted path, value, where it was written, what is expected, remedy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from training.settings.schema import Settings

Keys = tuple[str | int, ...]
ABSENT = object()  # the value of a setting that is missing
MOST_SHOWN = 20  # problems of a file


@dataclass(frozen=True)
class Problem:
    """`keys` lead to the setting; `origin` is the file and line, or the override, that set it."""

    keys: Keys
    value: Any
    what: str
    remedy: str
    origin: str = ""

    def at(self, origin: str) -> "Problem":
        return replace(self, origin=origin)

    def __str__(self) -> str:
        value = repr(self.value)
        value = value if len(value) <= 60 else f"{value[:57]}..."
        parts = [".".join(map(str, self.keys))] * bool(self.keys) + [value] * (self.value is not ABSENT)
        return f"  {' = '.join(parts)}  ({self.origin})\n    {self.what}; {self.remedy}"


_WORDS = {  # plain words for pydantic's
    "Input should be": "expected",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "valid integer": "whole number",
    "valid dictionary( or instance of .*)?": "section",
}
_REMEDIES = {  # by pydantic's name of the mistake
    **dict.fromkeys(("int_type", "float_type"), "write it in digits, without quotes, commas and _"),
    **dict.fromkeys(("model_type", "dict_type"), "write it as key: value on lines of its own"),
    "string_type": "put it in quotes if it looks like a number",
    "string_pattern_mismatch": "use letters, digits and . _ -",
    "bool_type": "only true and false are read as switches: write one of them",
    "list_type": "write it as [a, b]; a number in a path selects an item that is in the list",
    "tuple_type": "write it as [0.5, 1.0]",
}


def explain(errors: ValidationError, tree: Any, root: type[BaseModel] = Settings) -> list[Problem]:
    """One problem for each wrong key of `tree`, from pydantic's errors; `root` is the class that raised them.

    They end soon after `MOST_SHOWN`.
    """
    problems: dict[Keys, Problem] = {}
    fields = dict(all_fields(root))
    for error in errors.errors(include_url=False):
        if len(problems) > MOST_SHOWN:
            break
        keys = _keys(error["loc"], tree)
        names = [key for key in keys if isinstance(key, str)]  # without indices
        at = error["loc"] if "[key]" in error["loc"] else keys  # a wrong key of a dict and its wrong value are two
        mistake, value, facts = error["type"], error["input"], error.get("ctx", {})
        what, remedy = error["msg"], _REMEDIES.get(mistake, "correct it, or remove the line to take the default")
        if mistake == "extra_forbidden":
            what, remedy = "unknown key", _nearest_key(keys, ".".join(names[:-1]), fields)
        elif mistake == "missing":
            info = fields.get(".".join(names))
            value, remedy = ABSENT, "add it"
            what = f"missing: {described(info).partition('. ')[0].rstrip('.') if info else 'it has no default'}"
        else:
            for theirs, ours in _WORDS.items():
                what = re.sub(theirs, ours, what)
            if at in problems:  # the value may have one of several types
                what = f"{problems[at].what} or {what.removeprefix('expected ')}"
            known = re.findall(r"'([^']*)'", facts.get("expected", ""))
            if value in ("none", "off", "no", False) and "disabled" in known:
                remedy = "did you mean disabled?"
            elif near := get_close_matches(str(value), known, n=1):
                remedy = f"did you mean {near[0]}?"
        problems[at] = Problem(keys, value, what, remedy)
    return list(problems.values())


def _keys(loc: Keys, tree: Any) -> Keys:
    """The keys in pydantic's location, without its names for the types of a union."""
    keys: Keys = ()
    for key in loc:
        if isinstance(tree, dict) and key != "[key]":
            keys, tree = (*keys, key), tree.get(key)
        elif isinstance(key, int):
            keys, tree = (*keys, key), tree[key] if isinstance(tree, list) and key < len(tree) else None
    return keys


def _nearest_key(keys: Keys, parent: str, fields: dict[str, FieldInfo]) -> str:
    """The same name in another section, else the nearest spelling in the section `parent`."""
    name = str(keys[-1])
    elsewhere = [path for path in fields if path.rpartition(".")[2] == name and not section_of(fields[path].annotation)]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    beside = [path.rpartition(".")[2] for path in fields if path.rpartition(".")[0] == parent]
    if near := get_close_matches(name, beside, n=1):
        return f"did you mean {'.'.join(map(str, (*keys[:-1], near[0])))}?"
    return f"known here: {', '.join(beside)}"


def described(info: FieldInfo) -> str:
    """The description of a setting on one line; for a section, that of its class."""
    return " ".join((info.description or (section_of(info.annotation) or object).__doc__ or "").split())


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as `HubSettings | None` or `list[LayerSettings]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for a in get_args(annotation) if (section := section_of(a))), None)


def all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path without indices, field) of every section and setting."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        if section := section_of(info.annotation):
            yield from all_fields(section, f"{prefix}{name}.")
