"""The report as one HTML page that fetches nothing; and the same tables and pictures by name, for trackers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.report import pictures, sentences, sheets
from eval.report.differences import differences_sheet
from eval.report.pictures import Picture
from eval.report.runs import Run
from eval.report.sheets import Sheet

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Contents:
    """All tables and pictures of a report, by the names they have in a tracker."""

    sheets: dict[str, Sheet]
    pictures: dict[str, Picture]


def shared(runs: list[Run]) -> Contents:
    """What is shown of all runs together."""
    drawn = {
        "recall": pictures.hero(runs),
        "loss": pictures.loss_picture(runs),
        "training": pictures.training_picture(runs),
    }
    tables = {}
    if len(runs) > 1:
        tables = {"comparison": sheets.comparison_sheet(runs), "settings": differences_sheet(runs)}
    return Contents(_there(tables), _there(drawn))


def of_one(run: Run, index: int = 0) -> Contents:
    """What is shown of one run alone; `index` keeps the ids of several runs on one page apart."""
    drawn = {
        "relay_map": pictures.relay_picture(run, f"relay{index}"),
        "heat_map": pictures.heat_picture(run, f"heat{index}"),
        "gradient_field": pictures.field_picture(run, f"field{index}"),
    }
    return Contents(sheets.of_run(run), _there(drawn))


def _there(found: dict[str, Any]) -> dict[str, Any]:
    return {name: thing for name, thing in found.items() if thing is not None}


def details(run: Run, index: int) -> dict[str, Any]:
    """Everything the page shows of one run alone."""
    sentence, holds = sentences.identity(run.recall) if run.recall else ("", None)
    contents = of_one(run, index)
    return {
        "name": run.name,
        "shape": sentences.shape(run),
        "finding": sentences.finding(run),
        "cards": sentences.cards(run),
        "identity": sentence,
        "holds": holds,
        "pictures": contents.pictures,
        "sheets": list(contents.sheets.values()),
        "controls": sentences.controls(run),
        "settings": run.settings,
        "sha256": run.any["checkpoint_sha256"],
        "versions": run.any["versions"],
        "seed": run.any["seed"],
        "haystack": run.any.get("haystack", ""),
        "missing": run.missing,
    }


def page(runs: list[Run]) -> str:
    """The whole report as HTML that fetches nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    together = shared(runs)
    return environment.get_template("report.html").render(
        title=title(runs),
        runs=[details(run, i) for i, run in enumerate(runs)],
        sheets=together.sheets,
        pictures=together.pictures,
    )


def title(runs: list[Run]) -> str:
    if len(runs) > 3:
        return f"{runs[0].name} and {len(runs) - 1} others"
    return " against ".join(run.name for run in runs)
