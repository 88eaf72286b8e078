"""The tables of the results: for the report's page, for a tracker and for the terminal."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from rich.console import Console

    from eval.report.runs import Result, Run


@dataclass(frozen=True)
class Table:
    """A caption, columns {heading: format of its numbers}, and rows of numbers, texts or None for an empty cell."""

    caption: str
    columns: dict[str, str]
    rows: list[list[Any]]

    def texts(self, row: list[Any]) -> list[str]:
        """What the cells of a row show."""
        pairs = zip(row, self.columns.values(), strict=True)
        return [
            "" if v is None else v if isinstance(v, str) else format(v, number_format) for v, number_format in pairs
        ]

    def print(self, console: "Console") -> None:
        """Print the table on a terminal."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        printed = RichTable(title=self.caption, title_justify="left")
        for i, heading in enumerate(self.columns):
            text = bool(self.rows) and isinstance(self.rows[0][i], str)
            printed.add_column(heading, justify="left" if text else "right")
        for row in self.rows:
            printed.add_row(*map(escape, self.texts(row)))
        console.print(printed)


def _table(caption: str, results: Iterable["Result"], columns: dict[str, tuple[str, str]]) -> Table:
    """One row for each result; `columns` are {heading: (key of a result, format)}."""
    formats = {heading: number_format for heading, (_, number_format) in columns.items()}
    return Table(caption, formats, [[result[key] for key, _ in columns.values()] for result in results])


def tables_of(run: "Run") -> dict[str, Table]:
    """All tables of one run, by their names in a tracker."""
    results, tables = run.results, {}
    for task, entry in results.get("recall", {"tasks": {}})["tasks"].items():
        tables[f"recall_{task}"] = recall_table(task, entry)
    if "relay" in results:
        tables["relay_fronts"] = relay_table(results["relay"])
    if "heat" in results:
        tables["heat"] = heat_table(results["heat"])
    if "reach" in results:
        tables |= reach_tables(results["reach"])
    for word, key in (("context", "context"), ("position", "label")):
        if "loss" in results:
            tables[f"loss_by_{word}"] = loss_table(results["loss"], word, key)
    return tables


def recall_table(task: str, entry: "Result") -> Table:
    """Right answers, pairs and controls of one task by distance."""
    caption = (
        f"Task {task}: recall by distance. Every text has {entry['total_length']:,} tokens. "
        f"Chance is {entry['chance']:.1%}."
    )
    return _table(caption, entry["rows"], {
        "distance, tokens": ("distance", ",d"),
        "in W": ("distance_in_windows", ".1f"),
        "n": ("n", ",d"),
        "recall": ("accuracy", ".1%"),
        "95 % low": ("low", ".1%"),
        "high": ("high", ".1%"),
        "both right": ("pair_accuracy", ".1%"),
        "identical": ("identical_pairs", ".0%"),
        "bits gained": ("delta_nll_bits", "+.2f"),
        "without needle": ("accuracy_without_needle", ".1%"),
    })  # fmt: skip


def reach_tables(reach: "Result") -> dict[str, Table]:
    """The gradient field, the cliff test and the predictions, as far as reach.json has them."""
    tables = {"gradient": gradient_table(reach)}
    if reach["cliff"]:
        tables["cliff"] = cliff_table(reach["cliff"])
    if reach["predictions"]:
        tables["predictions"] = predictions_table(reach)
    return tables


def gradient_table(reach: "Result") -> Table:
    moments = ("before", "after")
    rows = [{"moment": f"{m} training"} | row for m in moments for row in reach["gradient"][m]["quantiles"]]
    caption = "Gradient field: the distance within which a share of the input gradient's energy lies."
    return _table(caption, rows, {
        "": ("moment", ""),
        "share of the energy": ("share", ".0%"),
        "within, tokens": ("distance", ",d"),
        "in W": ("in_windows", ".2f"),
        "% of R": ("percent_of_reach", ".1f"),
    })  # fmt: skip


def cliff_table(cliff: list["Result"]) -> Table:
    """One row for each path: how many changes that can't reach the query left every bit of the logits as it was."""
    rows: list[list[Any]] = []
    for path in dict.fromkeys(row["path"] for row in cliff):
        tests = [row for row in cliff if row["path"] == path]
        if "unavailable" in tests[0]:
            rows.append([path, f"not available: {tests[0]['unavailable']}", None])
            continue
        beyond = [row["equal"] for row in tests if row["expected"]]
        seen = [row["distance"] for row in tests if not row["expected"] and not row["equal"]]
        verdict = "identical" if all(beyond) else "DIFFERENT"
        rows.append([path, f"{verdict} ({sum(beyond)} of {len(beyond)})", max(seen, default=None)])
    caption = (
        "Cliff test: tokens beyond R or in another document are changed. Are the logits identical in every bit? "
        "The last column is the farthest change within R that altered them."
    )
    return Table(caption, {"path": "", "logits after the change": "", "farthest change seen, tokens": ",d"}, rows)


def predictions_table(reach: "Result") -> Table:
    """What theory predicts for this stack, beside its exact reach."""
    predictions, alpha = reach["predictions"], reach["alpha"]["residual_share"]
    distances = {
        f"Xiao's bound at the measured α = {alpha:.3f}": predictions["xiao_bound"],
        "Xiao's bound at α = 0.95": predictions["xiao_bound_at_alpha_0.95"],
        "Mixture: mean distance of the influence": predictions["mixture_mean"],
        "Mixture: 1 % of the influence comes from beyond": predictions["mixture_horizon"],
        "Exact reach R": reach["reach"],
        "W·k": reach["window_times_layers"],
    }
    rows: list[list[Any]] = [[label, tokens, tokens / reach["window"]] for label, tokens in distances.items()]
    caption = "Predictions from the windows and from α, the share of the residual stream that a layer leaves as it is."
    return Table(caption, {"prediction": "", "tokens": ",.0f", "in W": ".2f"}, rows)


def loss_table(loss: "Result", word: str, key: str) -> Table:
    captions = {
        "context": "Loss by context: the same tokens, predicted from more and more tokens before them.",
        "position": "Loss by position: every token, predicted from all tokens before it.",
    }
    rows = [row | {"margin": 1.96 * row["standard_error"]} for row in loss[f"by_{word}"]]
    columns = {"bits per token": ("bits_per_token", ".3f"), "± 95 %": ("margin", ".3f")}
    return _table(captions[word], rows, {f"{word}, tokens": (key, ",d"), **columns})


def relay_table(relay: "Result") -> Table:
    """How far the value has come after each layer, and how far it can come."""
    fronts = zip(relay["front"], relay["frontier"], strict=True)
    rows = [[layer, front, limit, front / limit if limit else None] for layer, (front, limit) in enumerate(fronts)]
    caption = (
        "Relay: the farthest distance behind the value at which at least half of the texts still give it, and the "
        "farthest possible distance (frontier). Layer 0 is the embedding."
    )
    return Table(caption, {"after layer": "d", "front, tokens": ",d", "frontier, tokens": ",d", "share": ".2f"}, rows)


def heat_table(heat: "Result") -> Table:
    caption = f"Heat map, task {heat['task']}: at depth 0 % the needle is farthest from the question."
    return _table(caption, heat["cells"], {
        "length, tokens": ("length", ",d"),
        "depth": ("depth", ".0%"),
        "distance, tokens": ("distance", ",d"),
        "n": ("n", ",d"),
        "recall": ("accuracy", ".0%"),
        "95 % low": ("low", ".0%"),
        "high": ("high", ".0%"),
    })  # fmt: skip


def comparison(runs: list["Run"]) -> dict[str, Table]:
    """The tables that compare several runs, by their names in a tracker."""
    tables = {"comparison": horizons_table(runs)}
    if sum(bool(run.header["settings"]) for run in runs) > 1:
        tables["settings"] = settings_table(runs)
    return tables


def horizons_table(runs: list["Run"]) -> Table:
    """One row for each run and task: shape and horizons."""
    rows = []
    for run in runs:
        header, bits = run.header, run.results.get("loss", {}).get("bits_per_byte")
        shape = [(header["settings"] or {}).get("seed"), header["layers"], header["window"], header["reach"]]
        for task, entry in run.results.get("recall", {"tasks": {"": {}}})["tasks"].items():
            h90 = entry.get("h90")
            in_windows = h90 / header["window"] if header["window"] and h90 is not None else None
            rows.append([run.name, task, *shape, h90, in_windows, entry.get("u90"), entry.get("h50"), bits])
    columns = {"run": "", "task": "", "seed": "d", "layers": ",d", "W": ",d", "R": ",d", "H90": ",.0f"}
    columns |= {"H90 in W": ".1f", "U90": ".2f", "H50": ",.0f", "bits per byte": ".3f"}
    return Table("Shape and horizons of each run. A heading sorts its column.", columns, rows)


def settings_table(runs: list["Run"]) -> Table:
    """One row for each setting that is not the same in all runs."""
    settings = [flat(run.header["settings"] or {}) for run in runs]
    paths = dict.fromkeys(path for each in settings for path in each if path not in ("", "name", "run_dir"))
    rows = [
        [path, *(_shown(each, path) for each in settings)]
        for path in paths
        if any(each.get(path) != settings[0].get(path) for each in settings)
    ]
    caption = "Settings that differ." if rows else "All settings are the same, except the run's name and folder."
    return Table(caption, {"setting": ""} | {run.name: ",.12g" for run in runs}, rows)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted path.

    >>> flat({"model": {"sliding_window": 16, "layers": [{"kind": "full"}]}, "seed": 0})
    {'model.sliding_window': 16, 'model.layers': [{'kind': 'full'}], 'seed': 0}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {path: value for key, part in tree.items() for path, value in flat(part, f"{prefix}{key}.").items()}


def _shown(settings: dict[str, Any], path: str) -> Any:
    """A setting as a number, or as YAML."""
    value = settings.get(path)
    if value is None:
        return "" if path in settings else "not set"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
