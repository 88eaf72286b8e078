"""Claims about the house: arrows between packages, rooms that are not crowded, and commands that answer at once."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "model": {"model"},
    "data": {"model", "data"},
    "training": {"model", "data", "training"},
    "eval": {"model", "data", "training", "eval"},
    "scripts": {"model", "data", "training", "eval", "scripts"},
    "train": {"model", "data", "training"},
}
FILES = sorted([*(p for package in MAY_IMPORT for p in (ROOT / package).rglob("*.py")), ROOT / "train.py"])
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
EVALUATIONS = (
    "recall", "reach", "reach.masks", "proof", "relay", "heat", "loss", "needs", "law", "receipt", "receipt.retrieval",
    "report", "conformance", "conformance.served", "conformance.architectures",
)  # fmt: skip
COMMANDS = [
    ["train.py"], *(["-m", f"eval.{name}"] for name in EVALUATIONS),
    *([str(p.relative_to(ROOT))] for p in sorted((ROOT / "scripts").glob("*.py")) if p.name != "__init__.py"),
]  # fmt: skip


def imports_of(path: Path) -> Iterator[str]:
    """Our modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] in MAY_IMPORT:
                yield name if name in MODULES else name.rpartition(".")[0]


def test_no_arrow_points_up() -> None:
    arrows = [(module, name) for module, path in MODULES.items() for name in imports_of(path)]
    assert len(arrows) > 300
    assert not [a for a in arrows if a[1].split(".")[0] not in MAY_IMPORT[a[0].split(".")[0]]]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: {name for name in imports_of(path) if name != module} for module, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_no_room_is_crowded() -> None:
    folders = {path.parent for path in FILES}
    assert not [str(folder) for folder in folders if len(list(folder.glob("*.py"))) > 14]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[-1])
def test_help_is_answered_before_anything_heavy_is_imported(command: list[str]) -> None:
    run = [sys.executable, "-X", "importtime", *command, "--help"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0
    assert result.stdout.startswith("usage:")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "accelerate", "datasets", "matplotlib", "scipy", "wandb"}


def test_a_mistake_in_the_settings_is_answered_without_torch() -> None:
    run = [sys.executable, "-X", "importtime", "train.py", "configs/tiny.yaml", "training.max_step=3"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert "did you mean training.max_steps?" in result.stderr
    assert not [line for line in result.stderr.splitlines() if line.rpartition("|")[2].strip() == "torch"]
