"""Mistakes in settings as sentences: dotted path, value, where it was written, what is expected, remedy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from training.settings.schema import Settings

Keys = tuple[str | int, ...]
ABSENT = object()  # the value of a setting that is missing


@dataclass(frozen=True)
class Problem:
    """`keys` lead to the setting; `rests_on` are the dotted paths of the settings that it contradicts."""

    keys: Keys
    value: Any
    what: str
    remedy: str
    rests_on: tuple[str, ...] = ()
    origin: str = "command line"

    def at(self, origin: str) -> "Problem":
        return replace(self, origin=origin)

    def __str__(self) -> str:
        value = "" if self.value is ABSENT else f" = {_short(self.value)}"
        name = dotted(self.keys) + value if self.keys else _short(self.value)
        return f"  {name}  ({self.origin})\n    {self.what}; {self.remedy}"


def dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- pydantic's errors ------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "string_pattern_mismatch": "a name of letters, digits and . _ -",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a pair of numbers such as [0.5, 1.0]",
    "model_type": "a section",
    "dict_type": "a section",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "too_short": "at least {min_length} of them",
    "too_long": "{max_length} of them, not {actual_length}",
    "finite_number": "a finite number",
}


def explain(errors: ValidationError, tree: Any, root: type[BaseModel] = Settings) -> list[Problem]:
    """One problem for each wrong key of `tree`, from pydantic's errors; `root` is the class that raised them."""
    problems: dict[Keys, Problem] = {}
    for error in errors.errors(include_url=False):
        keys = _keys(error["loc"], tree)
        at = error["loc"] if "[key]" in error["loc"] else keys  # a wrong key of a dict and its wrong value are two
        kind, value, facts = error["type"], error["input"], error.get("ctx", {})
        beside = _section_at(keys[:-1], root)
        if kind == "extra_forbidden":
            problems[at] = Problem(keys, value, "unknown key", _nearest_key(keys, beside, root))
        elif kind == "missing":
            info = beside.get(str(keys[-1]))
            what = described(info).partition(". ")[0].rstrip(".") if info else "it has no default"
            problems[at] = Problem(keys, ABSENT, f"missing: {what}", "add it")
        else:
            expected = _EXPECTED.get(kind, error["msg"]).format(**facts)
            before = f"{problems[at].what} or " if at in problems else "expected "  # one of several types
            problems[at] = Problem(keys, value, before + expected, _remedy(kind, value, facts))
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


def _remedy(kind: str, value: Any, facts: dict[str, Any]) -> str:
    if kind == "literal_error":
        near = get_close_matches(str(value), re.findall(r"'([^']*)'", facts["expected"]), n=1)
        return f"did you mean {near[0]}?" if near else "choose one of these"
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        return _number_hint(value)
    if isinstance(value, str) and kind == "bool_type":
        return "only true and false are read as switches: write one of them"
    if kind == "string_type":
        return f'quote it: "{value}"' if isinstance(value, int | float) else "give text"
    if kind in ("model_type", "dict_type"):
        return "write it as key: value on lines of its own"
    if kind == "list_type":
        return "write it as [a, b]"
    return "give such a value, or remove the line to take the default"


def _number_hint(value: str) -> str:
    """The remedy for text in place of a number.

    >>> _number_hint("1_000"), _number_hint("3e-4"), _number_hint("many")
    ('write it as 1000', 'it is quoted: write 3e-4 without quotes', 'it is text: write digits')
    """
    plain = value.replace("_", "").replace(",", "").strip()
    if not re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", plain):
        return "it is text: write digits"
    return f"write it as {plain}" if plain != value else f"it is quoted: write {plain} without quotes"


def _nearest_key(keys: Keys, beside: dict[str, FieldInfo], root: type[BaseModel]) -> str:
    """The nearest spelling in the same section, else the same name in another section."""
    *parents, name = keys
    if near := get_close_matches(str(name), beside, n=1):
        return f"did you mean {dotted((*parents, near[0]))}?"
    elsewhere = [path for path in all_paths(root) if path.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known here: {', '.join(beside)}"


# -- the settings classes ---------------------------------------------------------------------------------------------


def described(info: FieldInfo) -> str:
    """The description of a setting on one line; for a section, that of its class."""
    return " ".join((info.description or (section_of(info.annotation) or object).__doc__ or "").split())


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as `HubSettings | None` or `list[LayerSettings]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for a in get_args(annotation) if (section := section_of(a))), None)


def _section_at(keys: Keys, root: type[BaseModel]) -> dict[str, FieldInfo]:
    """The settings of the section that `keys` lead to."""
    section: type[BaseModel] | None = root
    for key in keys:
        if section is not None and isinstance(key, str):
            info = section.model_fields.get(key)
            section = section_of(info.annotation) if info else None
    return section.model_fields if section else {}


def all_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of every section and setting; items of a list have the index N."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        if section := section_of(info.annotation):
            yield from all_fields(section, f"{prefix}{name}." + ("N." if get_origin(info.annotation) is list else ""))


def all_paths(model: type[BaseModel]) -> Iterator[str]:
    """Dotted paths of all settings, without indices."""
    for path, info in all_fields(model):
        if section_of(info.annotation) is None:
            yield path.replace(".N.", ".")
