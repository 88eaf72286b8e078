"""The tables of the report."""

from dataclasses import dataclass

from eval.report.runs import Result, Run


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
    return Sheet(caption, ["moment", "energy", "within, tokens", "in W", "% of R"], rows)


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


def position_sheet(loss: Result) -> Sheet:
    rows = [
        [
            Cell(row["label"], row["middle"]),
            _number(row["bits_per_token"], ".3f"),
            _number(1.96 * row["standard_error"], ".3f"),
        ]
        for row in loss["by_position"]
    ]
    return Sheet("Every token with what precedes it in its row.", ["position, tokens", "bits a token", "± 95 %"], rows)


def relay_sheet(relay: Result) -> Sheet:
    """Per layer, how far the value has come and how far it can have come."""
    rows = [
        [
            Cell("embedding" if layer == 0 else str(layer), layer),
            _number(front, ",d"),
            _number(limit, ",d"),
            _number(front / limit if limit else None, ".2f"),
        ]
        for layer, (front, limit) in enumerate(zip(relay["front"], relay["frontier"], strict=True))
    ]
    caption = "Farthest offset at which half of the rows still give the value; frontier: the farthest possible."
    return Sheet(caption, ["after layer", "front, tokens", "frontier, tokens", "share"], rows)


def heat_sheet(heat: Result) -> Sheet:
    rows = [
        [
            _number(cell["length"], ",d"),
            _number(cell["depth"], ".0%"),
            _number(cell["distance"], ",d"),
            _number(cell["n"], ",d"),
            _number(cell["accuracy"], ".0%"),
            _number(cell["low"], ".0%"),
            _number(cell["high"], ".0%"),
        ]
        for cell in heat["cells"]
    ]
    columns = ["length, tokens", "depth", "distance", "n", "recall", "95 % low", "high"]
    return Sheet(f"Heat map, task {heat['task']}: depth 0 % is the farthest place from the question.", columns, rows)


def predictions_sheet(reach: Result) -> Sheet | None:
    """What others predict for this stack, beside what it is built for."""
    said, window = reach["predictions"], reach["window"]
    if not said:
        return None
    alpha = reach["alpha"]["residual_share"]
    figures = [
        (f"Xiao's bound at the measured α = {alpha:.3f}", said["xiao_bound"]),
        ("Xiao's bound at his α = 0.95", said["xiao_bound_at_alpha_0.95"]),
        ("Exact mixture, his recurrence iterated: mean distance", said["mixture_mean"]),
        ("Exact mixture: 1 % of the influence lies beyond", said["mixture_horizon"]),
        ("Exact reach R", reach["reach"]),
        ("Headline W·k", reach["window_times_layers"]),
    ]
    rows = [[Cell(label), _number(value, ",.0f"), _number(value / window, ".2f")] for label, value in figures]
    return Sheet("Predictions, from the layers and the residual share α.", ["prediction", "tokens", "in W"], rows)


def comparison_sheet(runs: list[Run]) -> Sheet:
    columns = ["run", "task", "seed", "layers", "W", "R", "H90", "H90 in W", "U90", "H50", "bits per byte"]
    rows = []
    for run in runs:
        r, bits = run.any, run.loss["bits_per_byte"] if run.loss else None
        seed = r["settings"].get("seed") if r["settings"] else None
        start = [_number(seed, "d"), _number(r["layers"], ",d"), _number(r["window"], ",d"), _number(r["reach"], ",d")]
        for task, entry in (run.recall or {"tasks": {"": {}}})["tasks"].items():
            h90 = entry.get("h90")
            in_windows = h90 / r["window"] if r["window"] and h90 is not None else None
            middle = [_number(h90, ",.0f"), _number(in_windows, ".1f"), _number(entry.get("u90"), ".2f")]
            end = [_number(entry.get("h50"), ",.0f"), _number(bits, ".3f")]
            rows.append([Cell(run.name), Cell(task), *start, *middle, *end])
    return Sheet("A heading sorts its column.", columns, rows)


def of_run(run: Run) -> dict[str, Sheet]:
    """All tables of one run, by their names in a tracker."""
    found: dict[str, Sheet | None] = {}
    if run.recall:
        found |= {
            f"recall_{task}": recall_sheet(task, entry, run.recall["reach"])
            for task, entry in run.recall["tasks"].items()
        }
    if run.relay:
        found["relay_fronts"] = relay_sheet(run.relay)
    if run.heat:
        found["heat"] = heat_sheet(run.heat)
    if run.reach:
        found |= {
            "gradient": gradient_sheet(run.reach),
            "cliff": cliff_sheet(run.reach) if run.reach["cliff"] else None,
            "predictions": predictions_sheet(run.reach),
        }
    if run.loss:
        found |= {"loss_by_context": context_sheet(run.loss), "loss_by_position": position_sheet(run.loss)}
    return {name: sheet for name, sheet in found.items() if sheet is not None}
