"""The shell scripts where they must refuse. That they work is shown by running them: this suite is run by one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"scripts/{script}", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A clone without a .venv: what bootstrap reads."""
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.txt", "requirements-dev.txt", "scripts/bootstrap.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_no_python_of_the_right_age_is_said(bare: Path) -> None:
    done = run(bare, "bootstrap.sh", PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no Python 3.11 or newer found (looked for: no-such-python)" in done.stderr
    assert "PYTHON=/path/to/python3.12 bash scripts/bootstrap.sh" in done.stderr


def test_no_package_index_is_said(bare: Path) -> None:
    done = run(bare, "bootstrap.sh", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 2
    assert "a package index must be reachable" in done.stderr
    assert not list((bare / ".venv").glob("installed-*"))


def test_unknown_argument_is_refused(bare: Path) -> None:
    (bare / ".venv/bin").mkdir(parents=True)
    (bare / ".venv/bin/python").symlink_to(shutil.which("true") or "/bin/true")
    done = run(bare, "bootstrap.sh", "--devel")
    assert (done.returncode, done.stderr) == (2, "error: unknown argument '--devel'; the only one is --dev\n")


def test_every_package_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[A-Za-z0-9_-]+==[0-9a-z.]+", line), f"{name}: {line}"
