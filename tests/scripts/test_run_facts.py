import json
from pathlib import Path

import pytest

from model.errors import UserError
from scripts import run_facts


def write_results(run: Path, h90: int | None) -> None:
    task = {"h90": h90, "u90": None if h90 is None else h90 / 480}
    recall = {"window": 16, "reach": 480, "window_times_layers": 512, "tasks": {"needle": task}}
    (run / "recall.json").write_text(json.dumps(recall))
    (run / "loss.json").write_text(json.dumps({"bits_per_byte": 2.4321}))


def test_headline_gives_the_three_figures_and_the_report(tmp_path: Path) -> None:
    write_results(tmp_path, 256)
    assert run_facts.headline(tmp_path).splitlines() == [
        "recall (needle)        H90 = 256 tokens = 16.0 W, U90 = 0.53 of R",
        "held-out text          2.432 bits per byte",
        "exact reach            R = 480 tokens, headline W·k = 512 tokens",
        f"report                 {tmp_path / 'report.html'}",
    ]


def test_no_horizon_is_said_in_words(tmp_path: Path) -> None:
    write_results(tmp_path, None)
    assert "below 90 % at the shortest distance" in run_facts.headline(tmp_path)


def test_a_missing_or_half_written_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recall.json: no such result; run `python -m eval.recall"):
        run_facts.headline(tmp_path)
    (tmp_path / "recall.json").write_text('{"window"')
    with pytest.raises(UserError, match="is not whole JSON"):
        run_facts.headline(tmp_path)
