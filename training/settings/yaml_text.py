"""YAML as people mean it: the core schema of YAML 1.2, with the line of every key.

PyYAML reads YAML 1.1, where `3e-4` is text, `off` is false, `010` is eight and `12:30` is 750. Here `3e-4` and `1e9`
are numbers (one without a fraction is a whole number), only `true` and `false` are booleans, and `on`, `off`, `yes`,
`no` and dates stay text. A key twice in one section, aliases and tags are refused: `extends` is how files share.
"""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

Keys = tuple[str | int, ...]
_UNSPEAKABLE = re.compile("[\0\ud800-\udfff]")  # escapes can write them; no path and no terminal takes them


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers of the 1.2 core schema; keys are the text as written."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read; use extends", mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"remove the tag {event.tag}", mark)
        if unspeakable := _UNSPEAKABLE.search(getattr(event, "value", "")):
            what = f"text holds the character {unspeakable[0]!r}"
            raise yaml.composer.ComposerError(None, None, what, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is here twice", key.start_mark)
            found[key.value] = self.construct_object(value, deep=True)
        return found


def _whole(loader: _Loader, node: Any) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _number(loader: _Loader, node: Any) -> float | int:
    value = float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return int(value) if value.is_integer() else value


_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN\0", None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", None),
    ("int", r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", "-+0123456789", _whole),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789.", _number),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.", _number),
)
for _name, _pattern, _first, _construct in _CORE:
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), [c.strip("\0") for c in _first])
    if _construct is not None:
        _Loader.add_constructor(_tag, _construct)


def parse(text: str | bytes) -> tuple[Any, dict[Keys, int]]:
    """The value of a YAML text, and the line of every key and list item by its path.

    Raises yaml.YAMLError, of which `reason` makes a sentence.

    >>> parse("lr: 3e-4\\nswitch: off\\nsteps: 1e3")
    ({'lr': 0.0003, 'switch': 'off', 'steps': 1000}, {('lr',): 1, ('switch',): 2, ('steps',): 3})
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return (None, {}) if node is None else (loader.construct_document(node), _lines(node, ()))
    except RecursionError as problem:
        raise yaml.YAMLError("nested too deeply") from problem
    finally:
        loader.dispose()


def reason(problem: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong, and the line."""
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        return problem.problem or "not YAML", problem.problem_mark.line + 1
    return str(problem).splitlines()[0], None


def _lines(node: Any, path: Keys) -> dict[Keys, int]:
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(i, item, item) for i, item in enumerate(node.value)]
    else:
        return {}
    found: dict[Keys, int] = {}
    for name, mark, value in children:
        found[*path, name] = mark.start_mark.line + 1
        found |= _lines(value, (*path, name))
    return found
