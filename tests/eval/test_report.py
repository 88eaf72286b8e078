"""Claims about the report: it stands alone, says what was measured, and refuses what is not there."""

import json
import re
import shutil
import sys

import pytest

from eval import loss, reach, recall, report
from eval.haystack import open_haystack
from eval.models import load_model
from model.errors import UserError, cli


@pytest.fixture(scope="module")
def run(untrained_run, tmp_path_factory):
    """A measured run whose settings hold markup and an address."""
    folder = shutil.copytree(untrained_run, tmp_path_factory.mktemp("measured") / "run")
    examined = load_model(str(folder), "cpu")
    text = open_haystack(examined)
    results = {
        "recall": recall.measure(
            examined, text, recall.Order("", "cpu", None, None, ("needle",), (1, 8, 21, 22, 30), 20, 0, "fp32")
        ),
        "reach": reach.measure(examined, text, texts=2),
        "loss": loss.measure(examined, open_haystack(examined, max_tokens=1000), rows=4),
    }
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    rows = [
        {"step": 1, "kind": "train", "loss_text": 3.0, "distance": 8},
        {"step": 2, "kind": "validation", "bits_per_byte": 2.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "ki')
    with (folder / "settings.yaml").open("a") as file:
        file.write("note: <script>alert(1)</script>\n")
    return folder


@pytest.fixture(scope="module")
def page(run):
    return report.page([report.read_run(str(run))])


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return cli(report.main)


def test_a_report_fetches_nothing(monkeypatch, run, page, tmp_path):
    assert call(monkeypatch, run, run, "--out", tmp_path / "page.html") == 0
    for html in (page, (tmp_path / "page.html").read_text()):
        assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|<img", html)
        assert not re.search(r"\bsrc=", html)
        assert not re.search(r"""href=["'](?!#)""", html)
        assert not re.search(r"url\((?!#)", html)


def test_every_reference_inside_the_pictures_is_kept(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    wanted = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted
    assert wanted <= set(ids)


def test_what_is_written_in_settings_is_escaped(page):
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_report_says_the_headline_figures_and_that_pairs_beyond_r_are_identical(run, page):
    bits = json.loads((run / "loss.json").read_text())["bits_per_byte"]
    for said in ("H90", "U90", f"{bits:.2f}", "21 tokens", "headline W·k = 24", "all 40 counterfactual pairs"):
        assert said in page


def test_a_pair_that_differs_beyond_the_reach_is_called_a_fault():
    rows = [
        {"distance": 21, "n": 10, "identical_pairs": 0.0, "pair_accuracy": 0.0},
        {"distance": 22, "n": 10, "identical_pairs": 0.9, "pair_accuracy": 0.1},
    ]
    sentence, holds = report.identity({"reach": 21, "tasks": {"needle": {"rows": rows}}})
    assert holds is False
    assert "only 9 of 10 pairs" in sentence
    sentence, holds = report.identity({"reach": 21, "tasks": {"needle": {"rows": rows[:1]}}})
    assert holds is None


def test_what_is_not_measured_is_left_out_and_said(run, tmp_path):
    part = shutil.copytree(run, tmp_path / "run")
    (part / "reach.json").unlink()
    (part / "loss.json").unlink()
    page = report.page([report.read_run(str(part))])
    assert f"python -m eval.loss {part}" in page
    assert "Loss by position" not in page


def test_refusals(monkeypatch, capsys, run, tmp_path):
    assert call(monkeypatch, tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path) == 2
    assert "nothing measured yet" in capsys.readouterr().err
    assert call(monkeypatch, run, "--out", tmp_path / "no" / "page.html") == 2
    assert "can't be written" in capsys.readouterr().err
    broken = shutil.copytree(run, tmp_path / "run")
    (broken / "recall.json").write_text('{"model": ')
    assert call(monkeypatch, broken) == 2
    assert "not whole JSON" in capsys.readouterr().err


def test_a_broken_line_in_the_middle_of_metrics_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        report.read_metrics(tmp_path / "metrics.jsonl")
