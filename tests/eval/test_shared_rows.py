"""Evaluations that two processes share give the figures of one, and only the first process writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny_run import launch


def evaluated(name: str, run: Path, out: Path, *options: str, processes: int) -> dict[str, Any]:
    """The result file, and the streams of all processes under "said"."""
    started, said = launch([f"eval.{name}", str(run), "--out", str(out), *options], processes), []
    for process in started:
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        said.append(printed)
    return json.loads((out / f"{name.split('.')[0]}.json").read_text()) | {"said": said}


def test_bits_per_byte_of_long_rows_that_two_processes_share(untrained_run: Path, tmp_path: Path) -> None:
    options = ("--context", "1000", "--rows", "1", "--max-tokens", "4000")
    one, two = (evaluated("loss", untrained_run, tmp_path / str(n), *options, processes=n) for n in (1, 2))
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-6)
    by_position = [[bucket["bits_per_token"] for bucket in result["by_position"]] for result in (one, two)]
    assert by_position[1] == pytest.approx(by_position[0], rel=1e-5)
    first, second = two["said"]
    assert "bits per byte on held-out text of the run" in first
    assert second == ""


def test_cliff_across_processes(untrained_run: Path, tmp_path: Path) -> None:
    result = evaluated("reach.__main__", untrained_run, tmp_path, "--texts", "1", processes=2)
    across = [row for row in result["cliff"] if row["path"] == "row shared by 2 processes"]
    assert [row["equal"] for row in across] == [row["expected"] for row in across]
    assert {row["expected"] for row in across} == {True, False}
