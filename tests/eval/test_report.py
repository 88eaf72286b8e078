"""Claims about the report: it stands alone, says what was measured, and refuses what is not there."""

import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from html import unescape

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from eval import heat, loss, relay
from eval.haystack import open_haystack
from eval.models import load_model
from eval.plots.canvas import marks, svg
from eval.reach import __main__ as reach
from eval.recall import measure as recall
from eval.recall.order import Order
from eval.report import __main__ as report
from eval.report.page import identity, shared, title
from eval.report.page import page as page_of
from eval.report.runs import read_metrics, read_run, tell_apart
from eval.report.tables import settings_table, table
from model.errors import UserError, cli
from tests.eval.browser import look, needs_browser


@pytest.fixture(scope="module")
def run(untrained_run, tmp_path_factory):
    """A measured run whose settings hold markup and an address."""
    folder = shutil.copytree(untrained_run, tmp_path_factory.mktemp("measured") / "run")
    examined = load_model(str(folder), "cpu")
    text = open_haystack(examined)
    order = Order(("needle",), (1, 8, 21, 22, 30), 20, 0, "fp32")
    results = {
        "recall": recall.measure(examined, text, order),
        "relay": relay.measure(examined, text, n=16),
        "heat": heat.measure(examined, text, replace(order, n=4), [32, 64], 3),
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
    return page_of([read_run(str(run))])


@pytest.fixture(scope="module")
def twin(run, tmp_path_factory):
    """The same results under another window, seed and name."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("twin") / "run")
    for file in (file for file in folder.glob("*.json") if file.name != "run.json"):
        result = json.loads(file.read_text())
        result["settings"]["seed"] = 7
        result["settings"]["model"]["layers"] = [{"kind": "full"}]
        file.write_text(json.dumps(result | {"model": "the-twin"}))
    return folder


@pytest.fixture(scope="module")
def comparison(run, twin):
    return page_of([read_run(str(run)), read_run(str(twin))])


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return cli(report.main)


def test_a_report_fetches_nothing(page, comparison):
    for html in (page, comparison):
        assert not re.search(r"https?:|//[a-z]|@import|<link|<img", html)
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
    for said in ("H90", "U90", f"{bits:.2f}", "21 tokens", "usually quoted: W·k = 24", "all 40 counterfactual pairs"):
        assert said in page


def test_a_pair_that_differs_beyond_the_reach_is_called_a_fault():
    rows = [
        {"distance": 21, "n": 10, "identical_pairs": 0.0, "pair_accuracy": 0.0},
        {"distance": 22, "n": 10, "identical_pairs": 0.9, "pair_accuracy": 0.1},
    ]
    sentence, holds = identity({"reach": 21, "tasks": {"needle": {"rows": rows}}})
    assert holds is False
    assert "only 9 of 10 pairs" in sentence
    sentence, holds = identity({"reach": 21, "tasks": {"needle": {"rows": rows[:1]}}})
    assert holds is None


def test_what_is_not_measured_is_left_out_and_said(run, tmp_path, monkeypatch, capsys):
    part = shutil.copytree(run, tmp_path / "run")
    (part / "reach.json").unlink()
    (part / "loss.json").unlink()
    assert call(monkeypatch, part) == 0
    assert f"Written: {part / 'report.html'}" in capsys.readouterr().out
    page = (part / "report.html").read_text()
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


def test_a_page_that_can_not_be_written_whole_leaves_the_old_one(run, tmp_path, monkeypatch, capsys):
    old = shutil.copytree(run, tmp_path / "run")
    (old / "report.html").write_text("old")
    monkeypatch.setattr("eval.report.page.page", lambda runs: "x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # then writing fails with EFBIG
    try:
        assert call(monkeypatch, old) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "report.html' can't be written: File too large; name another file" in capsys.readouterr().err
    assert (old / "report.html").read_text() == "old"


def test_a_name_with_markup_or_commands_is_printed_as_it_is(capsys):
    table("gradient", [{"moment": "[/b] \x1b[2J", "share": 0.5}]).print(Console(width=120))
    assert r"[/b] \x1b[2J" in capsys.readouterr().out


def test_a_broken_line_in_the_middle_of_metrics_is_refused(tmp_path):
    for line in (b'{"st', b'{"kind": "\xff"}', b"[" * 100_000):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
            read_metrics(tmp_path / "metrics.jsonl")


def test_the_recall_curve_marks_h90_and_only_where_there_is_one(run):
    measured = read_run(str(run))
    assert "H90" not in svg(shared([measured])[1]["recall"](True), "recall")
    measured.results["recall"]["tasks"]["needle"]["h90"] = 21
    drawing = svg(shared([measured])[1]["recall"](True), "recall")
    assert 'data-tip="needle: H90 = 21 tokens, the farthest distance' in drawing
    assert "◇ H90 = 21</text>" in drawing
    assert "recalls a value from up to 21 tokens (2.6 W) back in at least 90 % of cases" in page_of([measured])


def test_the_page_says_when_and_how_it_was_measured(run, page):
    for name in ("recall", "reach", "loss", "relay", "heat"):
        assert f"<code>python -m eval.{name} {run}</code>" in page
    day = datetime.fromtimestamp((run / "loss.json").stat().st_mtime).strftime("%Y-%m-%d")
    assert f"Measured on {day}" in page
    assert re.search(r"eval\.heat \S+</code> in \d+ (s|minutes)\. On \d+ CPU cores, \w+\.</li>", page)
    assert f"torch {torch.__version__}" in page
    assert f"python train.py {run}/settings.yaml" in page


def test_hover_texts_keep_their_digits_and_quotes():
    drawn = Figure()
    marks(drawn.subplots(), [1, 2], [1, 2], ['a "b" <c>: 0.12345', "plain: 1.23456"], "red")
    drawing = svg(drawn, "x")
    assert [unescape(tip) for tip in re.findall(r"data-tip=['\"](.*?)['\"]>", drawing)] == [
        'a "b" <c>: 0.12345',
        "plain: 1.23456",
    ]
    assert not re.search(r' d="[^"]*\.\d{3}', drawing)
    assert not re.search(r"<a |</a>|xlink", drawing)


# ------------------------------------------------------------------------------------------------------- comparison


def test_settings_that_differ_are_shown_and_no_others(run, twin):
    table = settings_table([read_run(str(run)), read_run(str(twin))])
    assert table.rows == [["model.layers", "not set", '[{"kind": "full"}]'], ["seed", "not set", "7"]]


def test_the_same_settings_are_said_to_be_the_same(run):
    table = settings_table([read_run(str(run)), read_run(str(run))])
    assert table.rows == []
    assert table.caption.startswith("All settings are the same")


def test_many_runs_are_compared_in_more_colours_than_there_are(run):
    runs = tell_apart([read_run(str(run)) for _ in range(9)])
    assert title(runs).endswith("and 8 others")
    drawing = svg(shared(runs)[1]["recall"](False), "recall")
    tips = re.findall(r'data-tip="(.*?): (distance|99 %)', drawing)
    assert [kind for _, kind in tips] == ["distance"] * 9 * 5 + ["99 %"] * 2
    assert {name for name, kind in tips if kind == "distance"} == {run.name for run in runs}


# ---------------------------------------------------------------------------------------------------------- browser

LOOK = """(page, view) => {
  const table = page.querySelector("table"), bodies = [...page.querySelectorAll("tbody")];
  const column = i => [...table.tBodies[0].rows].map(row => Number(row.cells[i].dataset.n));
  const before = column(0), heading = table.querySelector("th button");
  heading.click(); heading.click();
  const mark = [...page.querySelectorAll("[data-tip]")].find(m => m.getBoundingClientRect().width);
  mark.dispatchEvent(new view.PointerEvent("pointerover", {bubbles: true, clientX: 40, clientY: 40}));
  const tip = page.getElementById("tip");
  const shown = figures => [...figures].filter(f => f.getBoundingClientRect().height > 50).length;
  return {
    width: view.innerWidth, content: page.documentElement.scrollWidth,
    before, after: column(0), sorted: heading.parentElement.getAttribute("aria-sort"),
    tip: tip.hidden ? null : tip.textContent, expected: mark.dataset.tip,
    tip_inside: tip.getBoundingClientRect().right <= view.innerWidth,
    wide: shown(page.querySelectorAll(".wide")), narrow: shown(page.querySelectorAll(".narrow")),
    figures: page.querySelectorAll("figure").length, rows: bodies.map(body => body.rows.length),
    text: page.body.innerText,
  };
}"""


@needs_browser
@pytest.mark.parametrize(("width", "seen", "hidden"), [(1200, "wide", "narrow"), (390, "narrow", "wide")])
def test_a_browser_shows_the_report_sorts_its_tables_and_tells_numbers_on_hover(
    run, page, tmp_path, width, seen, hidden
):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    found, complaints = look(file, LOOK, width, tmp_path)
    assert complaints == []
    assert "failed" not in found, found
    assert found["width"] == width
    assert found["content"] <= width, "the page scrolls sideways"
    assert found["before"] == [1, 8, 21, 22, 30]
    assert (found["after"], found["sorted"]) == ([30, 22, 21, 8, 1], "descending")
    assert found["tip"] == found["expected"] != ""
    assert found["tip_inside"]
    assert (found[seen], found[hidden]) == (found["figures"], 0)
    assert found["figures"] == 6
    for said in (
        "Relay map",
        "Needle heat map",
        "Loss by position",
        "Gradient field",
        "bit-identical",
        "A heading",
        "Measured on",
    ):
        assert said in found["text"]
    assert "NaN" not in found["text"]
    assert "undefined" not in found["text"]


@needs_browser
def test_a_browser_shows_a_comparison_on_a_phone(comparison, tmp_path):
    file = tmp_path / "comparison.html"
    file.write_text(comparison, encoding="utf-8")
    script = LOOK.replace("Number(row.cells[i].dataset.n)", "row.cells[i].innerText")
    found, complaints = look(file, script, 390, tmp_path)
    assert complaints == []
    assert found["content"] <= 390
    assert found["after"] == sorted(found["before"], reverse=True)
    assert {"the-twin", "Settings that differ."} <= set(re.split(r"\n|\t", found["text"]))


@needs_browser
def test_the_report_holds_the_explorer_with_the_layers_of_the_run(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    script = """page => {
      const explorer = page.querySelector("iframe").contentDocument;
      return [explorer.querySelector("[aria-pressed=true]").textContent, explorer.getElementById("reach").textContent];
    }"""
    assert look(file, script, 900, tmp_path) == (["This run", "21 tokens"], [])


def test_a_run_without_its_model_has_no_explorer(run, tmp_path):
    results = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("hf"))
    assert "<iframe" not in page_of([read_run(str(results))])


@needs_browser
def test_complaints_of_the_browser_are_heard(tmp_path):
    file = tmp_path / "broken.html"
    file.write_text("<p>text</p><script>missing.call()</script>")
    found, complaints = look(file, "page => page.body.innerText", 390, tmp_path)
    assert found == "text"
    assert any("missing is not defined" in line for line in complaints)


def test_tables_can_be_read_without_scripts(page):
    assert "<button" not in page
    assert page.count("<th ") > 20
    assert re.search(r'<td data-n="21">21</td>', page)


# ------------------------------------------------------------------------------------------------------------ wandb


@pytest.fixture
def wandb_ends() -> Iterator[None]:
    """wandb leaves a service behind, and its address in the environment, where later tests would meet it."""
    import wandb

    yield
    wandb.teardown()
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.usefixtures("wandb_ends")
def test_wandb_gets_the_same_tables_and_pictures_into_the_runs_own_page(monkeypatch, capsys, run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    (own / "run.json").write_text(json.dumps({"wandb_id": "abcd1234"}))
    assert call(monkeypatch, own, "--wandb") == 0
    (logged,) = (own / "wandb").glob("offline-run-*-abcd1234")
    assert str(logged) in capsys.readouterr().out
    media = logged / "files" / "media"
    pictures = {re.sub(r"_\d+_\w+\.png$", "", file.name) for file in media.rglob("*.png")}
    tables = {re.sub(r"_\d+_\w+\.table\.json$", "", file.name) for file in media.rglob("*.table.json")}
    assert pictures == {"recall", "loss", "training", "relay_map", "heat_map", "gradient_field"}
    assert {"recall_needle", "relay_fronts", "heat", "cliff", "predictions", "loss_by_context"} <= tables
    (file,) = media.rglob("recall_needle_*.table.json")
    assert [row[0] for row in json.loads(file.read_text())["data"]] == [1, 8, 21, 22, 30]
