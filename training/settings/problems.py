"""What is wrong with a setting, as a sentence: dotted path, value, where it was written, what is expected, remedy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from training.settings.schema import Settings

Keys = tuple[str | int, ...]


class _Absent:
    """The value of a setting that is not there."""


ABSENT = _Absent()


@dataclass(frozen=True)
class Problem:
    """`keys` lead to the setting; `rests_on` are the dotted paths of the other settings it was judged by."""

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


def explain(errors: ValidationError, tree: Any, root: type[BaseModel] = Settings) -> Iterator[Problem]:
    """One problem for each of pydantic's errors; `root` is the class that found them."""
    for error in errors.errors(include_url=False):
        keys = tuple(k for k in error["loc"] if k != "[key]")
        kind, value, facts = error["type"], error["input"], error.get("ctx", {})
        if kind == "extra_forbidden":
            yield Problem(keys, value, "unknown key", _nearest_key(keys, root))
        elif kind == "missing":
            yield Problem(keys, ABSENT, f"missing: {_described(keys, root)}", "add it")
        else:
            expected = _EXPECTED.get(kind, error["msg"]).format(**facts)
            yield Problem(keys, value, f"expected {expected}", _remedy(kind, value, facts))


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
_FORMS = {"list": "[a, b]", "model": "key: value on lines of its own", "dict": "key: value on lines of its own"}


def _remedy(kind: str, value: Any, facts: dict[str, Any]) -> str:
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", facts["expected"])
        near = get_close_matches(str(value), choices, n=1)
        return f"did you mean {near[0]}?" if near else "choose one of these"
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        return _number_hint(value)
    if isinstance(value, str) and kind == "bool_type":
        return "only true and false are read as switches: write one of them"
    if kind == "string_type":
        return f'quote it: "{value}"' if isinstance(value, int | float) else "give text"
    form = _FORMS.get(kind.removesuffix("_type"))
    return f"write it as {form}" if form else "give such a value, or remove the line to take the default"


def _number_hint(value: str) -> str:
    """For text where a number is wanted.

    >>> _number_hint("1_000"), _number_hint("3e-4"), _number_hint("many")
    ('write it as 1000', 'it is quoted: write 3e-4 without quotes', 'it is text: write digits')
    """
    plain = value.replace("_", "").replace(",", "").strip()
    if not re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", plain):
        return "it is text: write digits"
    return f"write it as {plain}" if plain != value else f"it is quoted: write {plain} without quotes"


def _nearest_key(keys: Keys, root: type[BaseModel]) -> str:
    """Nearest right spelling beside the key, else the same name in another section."""
    *parents, name = keys
    beside = _model_at(tuple(parents), root)
    names = list(beside.model_fields) if beside else []
    if near := get_close_matches(str(name), names, n=1):
        return f"did you mean {dotted((*parents, near[0]))}?"
    elsewhere = [path for path in all_paths(root) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(names)}"


def _described(keys: Keys, root: type[BaseModel]) -> str:
    *parents, name = keys
    beside = _model_at(tuple(parents), root)
    info = beside.model_fields.get(str(name)) if beside else None
    return (info and info.description) or "it has no default"


def _model_at(keys: Keys, root: type[BaseModel]) -> type[BaseModel] | None:
    """The settings class of the section that `keys` lead to."""
    found: type[BaseModel] | None = root
    for key in keys:
        if found is None:
            return None
        if not isinstance(key, int):
            info = found.model_fields.get(key)
            found = section_of(info.annotation) if info else None
    return found


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as `HubSettings | None` or `list[LayerSettings]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := section_of(a))), None)


def all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings, those in a list without their index."""
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        yield from all_paths(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
