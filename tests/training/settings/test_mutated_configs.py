"""Whatever is written into a config, `train.py CONFIG --dry-run` ends with a plan (0) or a sentence (2).

MUTATED_CONFIGS=1000 sets the number of files tried; 200 otherwise.
"""

import io
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train
from model.errors import cli
from tests.bounded import bounded
from training.settings.generate import ROOT
from training.settings.problems import all_fields, section_of
from training.settings.schema import Settings

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
Draw = Callable[[st.SearchStrategy[Any]], Any]

numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 16, 64, 1000, 4096, 2**31, 2**53, 2**63, 10**30, 0.0, 0.5, 1.0, 1e-30, 1e30]),
    st.integers(),
    st.floats(),
)
words = st.one_of(
    st.sampled_from(
        ["", "true", "off", "~", "null", "3e-4", "1_000", "0x10", "full", "hub", "files", "../..", "a b", "*", "\0"]
    ),
    st.text(max_size=8),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All shipped configs, so that `extends` finds them."""
    return Path(shutil.copytree(ROOT / "configs", tmp_path_factory.mktemp("mutated") / "configs"))


@hypothesis_settings(
    max_examples=int(os.environ.get("MUTATED_CONFIGS", 200)),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_mutated_config_gives_a_plan_or_a_sentence(folder: Path, data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(CONFIGS))
    mutate = data.draw(st.sampled_from([mutated_tree, mutated_lines, mutated_bytes]))
    path = folder / "mutated.yaml"
    path.write_bytes(mutate(original.read_bytes(), data.draw))
    with bounded():
        code, said = dry_run(path)
    event(f"exit code {code}")
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert said.startswith("error: ") if code else "nothing was trained" in said


@pytest.mark.parametrize(
    "value", ["9007199254740992", "2147483648", "1e308", "5e-324", "-1", "''", '"\\0"', '"\\ud800"']
)
def test_every_setting_at_the_end_of_what_numbers_can_be_gives_a_plan_or_a_sentence(value: str) -> None:
    paths = [path for path, info in all_fields(Settings) if section_of(info.annotation) is None]
    for name in [*paths, "model.layers.0.window", "model.layers.0.dilation", "model.layers.0.kind"]:
        code, said = dry_run(ROOT / "configs/quickstart.yaml", f"{name}={value}")
        assert code in (0, 2), f"{name}={value}: {said}"


def dry_run(path: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output; an exception that is no sentence goes through."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["train.py", str(path), *overrides, "--dry-run"]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return cli(train.main), said.getvalue()
    finally:
        sys.argv = before


# -- what is done to a file -------------------------------------------------------------------------------------------


def mutated_tree(text: bytes, draw: Draw) -> bytes:
    """Keys renamed, removed or moved to other sections; values of any kind; the file is YAML still."""
    tree = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 4))):
        section, key = draw(st.sampled_from(places(tree)))
        action = draw(st.sampled_from(["value", "value", "value", "rename", "remove", "move", "wrap"]))
        if action == "value":
            section[key] = draw(near(section[key]))
        elif action == "wrap":
            section[key] = draw(st.sampled_from([[section[key]], {"x": section[key]}, str(section[key])]))
        elif action == "move":
            other, name = draw(st.sampled_from(places(tree)))
            other[name] = section[key] if not isinstance(section[key], dict | list) else None
        elif isinstance(section, dict):
            value = section.pop(key)
            if action == "rename":
                section[draw(words | st.just(key[:-1]))] = value
        if not tree:
            break
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (section, key) and (list, index) of the tree."""
    if not isinstance(tree, dict | list):
        return []
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    return [(tree, key) for key, _ in items] + [place for _, value in items for place in places(value)]


def near(value: Any) -> st.SearchStrategy[Any]:
    """Anything, and for a number often another number: such settings come farther than the first check."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        scaled = [value * 2, value // 2, value + 1, value - 1, value * 1000, -value, float(value), value / 3]
        return st.sampled_from(scaled) | numbers | values
    return values


def mutated_lines(text: bytes, draw: Draw) -> bytes:
    """Lines removed, doubled, swapped, indented, cut in two, joined."""
    lines = text.decode().split("\n")
    for _ in range(draw(st.integers(1, 5))):
        i, j = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        action = draw(st.sampled_from(["remove", "double", "swap", "indent", "outdent", "cut", "join", "tab"]))
        if action == "remove" and len(lines) > 1:
            del lines[i]
        elif action == "double":
            lines.insert(j, lines[i])
        elif action == "swap":
            lines[i], lines[j] = lines[j], lines[i]
        elif action in ("indent", "tab"):
            lines[i] = ("\t" if action == "tab" else " " * draw(st.integers(1, 4))) + lines[i]
        elif action == "outdent":
            lines[i] = lines[i].removeprefix("  ")
        elif action == "cut":
            at = draw(st.integers(0, len(lines[i])))
            lines[i : i + 1] = [lines[i][:at], lines[i][at:]]
        elif action == "join" and i + 1 < len(lines):
            lines[i : i + 2] = [lines[i] + lines[i + 1]]
    return "\n".join(lines).encode()


def mutated_bytes(text: bytes, draw: Draw) -> bytes:
    """Bytes replaced, inserted and removed; the file cut short."""
    changed = bytearray(text)
    snippets = [
        b"{",
        b"[",
        b"]",
        b": ",
        b"\n",
        b"*a",
        b"&a ",
        b"!!int ",
        b"<<: ",
        b"1e99",
        b"#",
        b"%",
        b"---\n",
        b"\x00",
    ]
    for _ in range(draw(st.integers(1, 6))):
        at, length = draw(st.integers(0, len(changed))), draw(st.integers(0, 3))
        changed[at : at + length] = draw(st.binary(max_size=3) | st.sampled_from(snippets))
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.integers(0, 9)) == 0 else changed)
