import json
from pathlib import Path

import pytest

from training.settings.generate import ROOT, generated, json_schema
from training.settings.problems import all_fields, described
from training.settings.schema import Settings


@pytest.mark.parametrize("path", [p.relative_to(ROOT) for p in generated()], ids=str)
def test_generated_file_is_fresh(path: Path) -> None:
    text = generated()[ROOT / path]
    assert (ROOT / path).read_text(encoding="utf-8") == text, (
        f"{path} is stale: run python -m training.settings.generate"
    )


def test_every_setting_has_a_description() -> None:
    for path, info in all_fields(Settings):
        assert described(info).endswith("."), path
    schema = json.loads(json_schema())
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        assert all("description" in field or set(field) & {"$ref", "anyOf"} for field in section["properties"].values())


def test_schema_knows_extends_requires_nothing_and_refuses_unknown_keys() -> None:
    schema = json.loads(json_schema())
    sections = [schema, *schema["$defs"].values()]
    assert "extends" in schema["properties"]
    assert all("required" not in s and s["additionalProperties"] is False for s in sections)
