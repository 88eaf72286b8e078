"""Files that are generated from the settings classes. `python -m training.settings.generate` writes them.

configs/schema.json    JSON Schema, for completion and checks in editors
configs/base.yaml      every setting with its description and default
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from training.settings.problems import described, section_of
from training.settings.schema import Settings

ROOT = Path(__file__).resolve().parents[2]

BASE_HEAD = """\
# yaml-language-server: $schema=schema.json
#
# Every setting with its description and default. The file of a run gives only what differs: copy lines from here.
# Settings marked (example) have no default, so a run must give them. `null` stands for the default.
# Generated from the settings classes by `python -m training.settings.generate`; don't edit it.
#
#   python train.py configs/base.yaml --dry-run        checks these settings and prints their plan
#
# Expect a plan for an untrained model of 32 layers with windows of 64 tokens.

"""


def generated() -> dict[Path, str]:
    """Text of every generated file by its path."""
    base = BASE_HEAD + "\n".join(_base_lines(Settings)) + "\n"
    return {ROOT / "configs" / "schema.json": json_schema(), ROOT / "configs" / "base.yaml": base}


def json_schema() -> str:
    """The JSON Schema. It requires nothing, because `extends` may bring what is missing."""
    schema = Settings.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    types = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    schema["properties"]["extends"] = {"anyOf": types, "description": "files to start from, relative to this one"}
    return json.dumps(schema, indent=1) + "\n"


def _base_lines(model: type[BaseModel], depth: int = 0) -> Iterator[str]:
    """Lines of a section of configs/base.yaml: the description of each setting, then its default or example."""
    indent = "  " * depth
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        value = info.examples[0] if info.examples else info.get_default(call_default_factory=True)
        choices = f"{' | '.join(get_args(info.annotation))}. " if get_origin(info.annotation) is Literal else ""
        comment = f"{indent}# {'(example) ' if info.examples else ''}{choices}{described(info)}"
        yield from [""] if section and depth == 0 else []
        yield from textwrap.wrap(comment, 118, subsequent_indent=f"{indent}# ")
        if section is None or value in (None, []):  # a section that is absent
            yield f"{indent}{name}: " + json.dumps(value).replace('"', "")  # no default needs quotes in YAML
        elif get_origin(info.annotation) is list:
            first, *others = _base_lines(section, depth + 2)
            yield f"{indent}{name}:\n{indent}  - {first.strip()}"
            yield from others
        else:
            yield f"{indent}{name}:"
            yield from _base_lines(section, depth + 1)


if __name__ == "__main__":
    for file, text in generated().items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")
