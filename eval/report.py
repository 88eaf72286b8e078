"""One page that says what was measured: a self-contained report.html, read offline and on a phone.

    python -m eval.report RUN [RUN ...] [--out FILE]

A RUN is a folder with recall.json, reach.json and loss.json (what is missing is left out and said), metrics.jsonl and
settings.yaml. One run: its report, written into it. Several: a comparison, written into the present folder, in which
the first run is the one in question and the others stand beside it.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from eval import plots
from eval.recall import read_result
from model.errors import UserError, cli

TEMPLATES = Path(__file__).parent / "templates"
RESULTS = ("recall", "reach", "loss")
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a table cell shows, and the number it is sorted by (None: by its text)."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Sheet:
    """A sortable table."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Picture:
    """An SVG for wide screens and one for phones, and what to see in it."""

    wide: Markup
    narrow: Markup
    caption: str


@dataclass
class Run:
    """A run folder as far as it has been measured."""

    folder: Path
    recall: Result | None = None
    reach: Result | None = None
    loss: Result | None = None
    metrics: list[Result] = field(default_factory=list)
    settings: str = ""

    @property
    def any(self) -> Result:
        """One of the results; all begin with the same fields."""
        return self.recall or self.reach or self.loss or {}

    @property
    def name(self) -> str:
        return str(self.any["model"])

    @property
    def missing(self) -> list[str]:
        return [f"python -m eval.{kind} {self.folder}" for kind in RESULTS if getattr(self, kind) is None]


def read_run(name: str) -> Run:
    """Raises UserError when the folder is not there, holds no result, or holds a broken one."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"RUN {name!r}: no such folder; give the folder of a run, such as runs/quickstart")
    recall, reach, loss = (
        read_result(file) if (file := folder / f"{kind}.json").exists() else None for kind in RESULTS
    )
    if recall is reach is loss is None:
        raise UserError(f"RUN {name!r}: nothing measured yet; run `python -m eval.recall {name}` first")
    settings = folder / "settings.yaml"
    text = settings.read_text() if settings.exists() else ""
    return Run(folder, recall, reach, loss, read_metrics(folder / "metrics.jsonl"), text)


def read_metrics(file: Path) -> list[Result]:
    """Rows of metrics.jsonl; the last line may have been cut by a killed run and is then left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{file}, line {number}: not JSON ({error}); mend or remove that line") from error
    return rows


def tell_apart(runs: list[Run]) -> list[Run]:
    """Runs whose model has the name of another's are called by their folder."""
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        for result in (run.recall, run.reach, run.loss):
            if names.count(name) > 1 and result is not None:
                result["model"] = str(run.folder)
    return runs


# ------------------------------------------------------------------------------------------------------- sentences


def tokens(count: float | None, window: int | None = None) -> str:
    if count is None:
        return "unbounded"
    share = f" ({count / window:.1f} W)" if window else ""
    return f"{count:,.0f} {'token' if count == 1 else 'tokens'}{share}"


def shape(run: Run) -> str:
    """The model in one line."""
    r = run.any
    window = f"W = {r['window']:,}" if r["window"] else "no window"
    reach = "reach unbounded" if r["reach"] is None else f"exact reach R = {r['reach']:,}"
    return f"{r['layers']} layers, {window}, {reach}, {r['parameters']:,} parameters"


def finding(run: Run) -> str:
    """What the first task says, in a sentence or two."""
    if run.recall is None:
        return "Recall has not been measured yet."
    task, entry = next(iter(run.recall["tasks"].items()))
    window, reach, h90 = run.recall["window"], run.recall["reach"], entry["h90"]
    if not h90:
        nearest = entry["rows"][0]
        return (
            f"No distance is recalled at 90 % ({task}): at {tokens(nearest['distance'])} it is "
            f"{nearest['accuracy']:.0%}, with chance at {entry['chance']:.0%}."
        )
    text = f"It recalls a value from up to {tokens(h90, window)} back in at least 90 % of cases ({task})"
    if reach:
        text += f": {entry['u90']:.0%} of all that its windows can pass on (R = {tokens(reach)})"
    end = ", the farthest distance measured" if entry["h90_censored"] else ""
    if window and h90 > 1.5 * window:
        return text + end + ". Published claims for stacked windows stop near 1.5 W."
    return text + end + "."


def identity(result: Result) -> tuple[str, bool | None]:
    """The sentence on pairs beyond R, worked out from the rows, and whether all were identical (None: none there)."""
    reach = result["reach"]
    if reach is None:
        return (
            "This stack has no bound on its reach, so there is no distance beyond which pairs must be identical.",
            None,
        )
    rows = [r for entry in result["tasks"].values() for r in entry["rows"] if r["distance"] > reach]
    if not rows:
        return f"No distance beyond R = {reach:,} was measured.", None
    pairs, same = sum(r["n"] for r in rows), sum(round(r["identical_pairs"] * r["n"]) for r in rows)
    where = ", ".join(f"{d:,}" for d in sorted({r["distance"] for r in rows}))
    if same < pairs:
        return (
            f"Beyond R = {reach:,} only {same:,} of {pairs:,} pairs are bit-identical (distances {where}): "
            "the model sees farther than its windows allow. This is a fault.",
            False,
        )
    best = max(r["pair_accuracy"] for r in rows)
    return (
        f"Beyond R = {reach:,} tokens all {pairs:,} counterfactual pairs are bit-identical (distances {where}): the "
        f"logits after value v and after v′ are equal in every bit, so nothing of the value arrives, and both "
        f"members of a pair are right in {best:.0%} of cases.",
        True,
    )


def cards(run: Run) -> list[Card]:
    out = []
    if run.recall:
        task, entry = next(iter(run.recall["tasks"].items()))
        window = run.recall["window"]
        more = " or more" if entry["h90_censored"] else ""
        out.append(Card("H90, recall horizon", tokens(entry["h90"]), _in_windows(entry["h90"], window) + more))
        if entry["u90"] is not None:
            low, high = entry["u90_interval"]
            out.append(Card("U90 = H90 / R", f"{entry['u90']:.2f}", f"95 % interval {low:.2f} to {high:.2f}; {task}"))
    if run.loss:
        note = f"{run.loss['nats_per_token']:.2f} nats a token, {run.loss['tokens']:,} held-out tokens"
        out.append(Card("Bits per byte", f"{run.loss['bits_per_byte']:.2f}", note))
    headline = run.any["window_times_layers"]
    note = "no bound" if headline is None else f"headline W·k = {headline:,}"
    reach = run.any["reach"]
    out.append(Card("R = k(W−1), exact reach", "∞" if reach is None else tokens(reach), note))
    return out


def _in_windows(count: float, window: int | None) -> str:
    return f"{count / window:.1f} windows of {window:,}" if window else "in tokens"


# ---------------------------------------------------------------------------------------------------------- tables


def _number(value: float | None, form: str) -> Cell:
    return Cell("", None) if value is None else Cell(format(value, form), float(value))


def recall_sheet(task: str, entry: Result, reach: int | None) -> Sheet:
    columns = ["distance", "in W", "n", "recall", "95 % low", "high", "pair", "identical", "bits gained", "no needle"]
    rows = [
        [
            _number(r["distance"], ",d"),
            _number(r["distance_in_windows"], ".1f"),
            _number(r["n"], ",d"),
            _number(r["accuracy"], ".1%"),
            _number(r["low"], ".1%"),
            _number(r["high"], ".1%"),
            _number(r["pair_accuracy"], ".1%"),
            _number(r["identical_pairs"], ".0%"),
            _number(r["delta_nll_bits"], "+.2f"),
            _number(r["accuracy_without_needle"], ".1%"),
        ]
        for r in entry["rows"]
    ]
    caption = f"Task {task}: all items are {entry['total_length']:,} tokens long; chance is {entry['chance']:.1%}."
    return Sheet(caption + ("" if reach is None else f" R = {reach:,}."), columns, rows)


def gradient_sheet(reach: Result) -> Sheet:
    rows = [
        [
            Cell(f"{moment} training"),
            _number(row["share"], ".0%"),
            _number(row["distance"], ",d"),
            _number(row["in_windows"], ".2f"),
            _number(row["percent_of_reach"], ".1f"),
        ]
        for moment in ("before", "after")
        for row in reach["gradient"][moment]["quantiles"]
    ]
    caption = "Within which distance so much of the input gradient's energy lies."
    return Sheet(caption, ["", "energy", "within, tokens", "in W", "% of R"], rows)


def cliff_sheet(reach: Result) -> Sheet:
    """One row a path: how many changes beyond R left every bit as it was."""
    rows = []
    for path in dict.fromkeys(row["path"] for row in reach["cliff"]):
        seen = [row for row in reach["cliff"] if row["path"] == path]
        if "unavailable" in seen[0]:
            rows.append([Cell(path), Cell("not available on this machine"), Cell("")])
            continue
        beyond = [row["equal"] for row in seen if row["expected"]]
        within = [row["distance"] for row in seen if not row["expected"] and not row["equal"]]
        verdict = "identical" if all(beyond) else "DIFFERS"
        far = Cell(f"{max(within):,}", max(within)) if within else Cell("")
        rows.append([Cell(path), Cell(f"{verdict} ({sum(beyond)} of {len(beyond)})"), far])
    caption = "Cliff test: change tokens beyond R, or of another document, and compare the logits bit by bit."
    return Sheet(caption, ["path", "output when they change", "farthest change seen, tokens"], rows)


def context_sheet(loss: Result) -> Sheet:
    rows = [
        [
            _number(row["context"], ",d"),
            _number(row["bits_per_token"], ".3f"),
            _number(1.96 * row["standard_error"], ".3f"),
        ]
        for row in loss["by_context"]
    ]
    return Sheet("The same tokens, given more and more context.", ["context, tokens", "bits a token", "± 95 %"], rows)


def predictions_sheet(reach: Result) -> Sheet | None:
    """What others predict for this stack, beside what it is built for."""
    said, window = reach["predictions"], reach["window"]
    if not said:
        return None
    alpha = reach["alpha"]["residual_share"]
    figures = [
        (f"Xiao's bound at the measured α = {alpha:.3f}", said["xiao_bound"]),
        ("Xiao's bound at his α = 0.95", said["xiao_bound_at_alpha_0.95"]),
        ("His recurrence iterated: mean distance", said["mixture_mean"]),
        ("His recurrence iterated: 1 % of the influence lies beyond", said["mixture_horizon"]),
        ("Exact reach R", reach["reach"]),
        ("Headline W·k", reach["window_times_layers"]),
    ]
    rows = [[Cell(label), _number(value, ",.0f"), _number(value / window, ".2f")] for label, value in figures]
    return Sheet("Predictions, from the layers and the residual share α.", ["", "tokens", "in W"], rows)


def comparison_sheet(runs: list[Run]) -> Sheet:
    columns = ["run", "task", "layers", "W", "R", "H90", "H90 in W", "U90", "H50", "bits per byte"]
    rows = []
    for run in runs:
        r, bits = run.any, run.loss["bits_per_byte"] if run.loss else None
        start = [_number(r["layers"], ",d"), _number(r["window"], ",d"), _number(r["reach"], ",d")]
        for task, entry in (run.recall or {"tasks": {"": {}}})["tasks"].items():
            h90 = entry.get("h90")
            in_windows = h90 / r["window"] if r["window"] and h90 is not None else None
            middle = [_number(h90, ",.0f"), _number(in_windows, ".1f"), _number(entry.get("u90"), ".2f")]
            end = [_number(entry.get("h50"), ",.0f"), _number(bits, ".3f")]
            rows.append([Cell(run.name), Cell(task), *start, *middle, *end])
    return Sheet("A heading sorts its column.", columns, rows)


def controls(run: Run) -> list[str]:
    """What speaks against an artefact, with its numbers."""
    out = []
    for task, entry in (run.recall or {"tasks": {}})["tasks"].items():
        blind = [row["accuracy_without_needle"] for row in entry["rows"]]
        paths = entry["paths"]
        out.append(
            f"{task}, needle removed: right in {min(blind):.1%} to {max(blind):.1%} of cases, "
            f"with chance at {entry['chance']:.1%}."
        )
        out.append(
            f"{task}, two ways to the answer: one full forward pass and the ring cache agree on {paths['agree']} of "
            f"{paths['n']} answers (logits within {paths['max_abs_logit_difference']:.0e}), generated text on "
            f"{paths['generated_agree']} of {paths['generated_n']}."
        )
    if run.reach and run.reach["cliff_holds"] is not None:
        verdict = "no change beyond R, or in another document, altered a bit" if run.reach["cliff_holds"] else "FAILED"
        out.append(f"Cliff test on every path: {verdict}.")
    return out


# -------------------------------------------------------------------------------------------------------- pictures


def picture(name: str, draw: Any, caption: str) -> Picture | None:
    """`draw(narrow)` makes a figure, or None when there is nothing to draw."""
    figures: list[Figure | None] = [draw(narrow) for narrow in (False, True)]
    if None in figures:
        return None
    wide, narrow = (Markup(plots.svg(f, f"{name}-{i}")) for i, f in enumerate(figures) if f)
    return Picture(wide, narrow, caption)


def hero(runs: list[Run]) -> Picture | None:
    recalls = [run.recall for run in runs if run.recall]
    if not recalls:
        return None
    caption = (
        "Share of right answers by the distance between value and question, with 95 % intervals. Left of W one "
        "layer sees the value; up to R it must be handed on from layer to layer; beyond R nothing can arrive. "
    )
    if runs[0].reach:
        caption += "Below, on the same axis: where the gradient of the output goes."
    return picture("hero", lambda narrow: plots.hero_figure(recalls, runs[0].reach, narrow=narrow), caption)


def field_picture(run: Run, name: str) -> Picture | None:
    if run.reach is None:
        return None
    caption = "Energy of the input gradient by distance; dashed: the share that Xiao's recurrence predicts."
    return picture(name, lambda narrow: plots.reach_figure(run.reach or {}, narrow), caption)


def loss_picture(runs: list[Run]) -> Picture | None:
    losses = [run.loss for run in runs if run.loss]
    if not losses:
        return None
    caption = (
        "Bits a token on held-out text. Left: by position in a row. Right: the same tokens, given only the last c "
        "tokens; where the curve is flat, more context no longer helps. Solid line: W; dashed: R."
    )
    return picture("loss", lambda narrow: plots.loss_figure(losses, narrow), caption)


def training_picture(runs: list[Run]) -> Picture | None:
    metrics = [(run.name, run.metrics) for run in runs if run.metrics]
    caption = "From metrics.jsonl, by step."
    return picture("training", lambda narrow: plots.training_figure(metrics, narrow), caption) if metrics else None


# ------------------------------------------------------------------------------------------------------------ page


def details(run: Run, index: int) -> dict[str, Any]:
    """Everything the page shows of one run alone."""
    sheets = []
    if run.recall:
        sheets += [recall_sheet(task, entry, run.recall["reach"]) for task, entry in run.recall["tasks"].items()]
    if run.reach:
        sheets += [gradient_sheet(run.reach)]
        sheets += [cliff_sheet(run.reach)] if run.reach["cliff"] else []
        sheets += [sheet for sheet in [predictions_sheet(run.reach)] if sheet]
    sheets += [context_sheet(run.loss)] if run.loss else []
    sentence, holds = identity(run.recall) if run.recall else ("", None)
    return {
        "name": run.name,
        "shape": shape(run),
        "finding": finding(run),
        "cards": cards(run),
        "identity": sentence,
        "holds": holds,
        "field": field_picture(run, f"field{index}"),
        "sheets": sheets,
        "controls": controls(run),
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
    return environment.get_template("report.html").render(
        title=" against ".join(run.name for run in runs),
        runs=[details(run, i) for i, run in enumerate(runs)],
        hero=hero(runs),
        comparison=comparison_sheet(runs) if len(runs) > 1 else None,
        loss=loss_picture(runs),
        training=training_picture(runs),
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that hold recall.json, reach.json, loss.json")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html; for several runs comparison.html here")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    runs = tell_apart([read_run(name) for name in args.runs])
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("comparison.html")
    out = Path(args.out) if args.out else default
    try:
        out.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {str(out)!r} can't be written: {error.strerror}; name another file") from error
    print(f"Written: {out}")


if __name__ == "__main__":
    sys.exit(cli(main))
