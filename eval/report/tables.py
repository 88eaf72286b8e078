"""The tables of the results: for the report's page, for a tracker and for the terminal."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich import table as rich_table
from rich.console import Console
from rich.markup import escape

from eval.report.runs import Result, Run
from model.errors import printable

TABLES = {  # name: caption, columns "heading = key of a row : format of a number"
    "recall": (
        "Task {task}: recall by distance. Every text has {total_length:,} tokens. Chance is {chance:.1%}.",
        "distance, tokens = distance : ,d | in W = distance_in_windows : .1f | n = n : ,d | recall = accuracy : .1% | "
        "95 % low = low : .1% | high = high : .1% | both right = pair_accuracy : .1% | "
        "identical = identical_pairs : .0% | bits gained = delta_nll_bits : +.2f | "
        "without needle = accuracy_without_needle : .1%",
    ),
    "relay_fronts": (
        "Relay: the farthest distance behind the value at which at least half of the texts still give it, and the "
        "farthest possible distance (frontier). Layer 0 is the embedding.",
        "after layer = layer : d | front, tokens = front : ,d | frontier, tokens = frontier : ,d | share = share : .2f",
    ),
    "heat": (
        "Heat map, task {task}: at depth 0 % the needle is farthest from the question.",
        "length, tokens = length : ,d | depth = depth : .0% | distance, tokens = distance : ,d | n = n : ,d | "
        "recall = accuracy : .0% | 95 % low = low : .0% | high = high : .0%",
    ),
    "gradient": (
        "Gradient field: the distance within which a share of the input gradient's energy lies.",
        " = moment : | share of the energy = share : .0% | within, tokens = distance : ,d | in W = in_windows : .2f | "
        "% of R = percent_of_reach : .1f",
    ),
    "cliff": (
        "Cliff test: tokens beyond R or in another document are changed. Are the logits identical in every bit? "
        "The last column is the farthest change within R that altered them.",
        "path = path : | logits after the change = verdict : | farthest change seen, tokens = farthest : ,d",
    ),
    "predictions": (
        "Predictions from the windows and from α, the share of the residual stream that a layer leaves as it is.",
        "prediction = label : | tokens = tokens : ,.0f | in W = in_windows : .2f",
    ),
    "loss_by_context": (
        "Loss by context: the same tokens, predicted from more and more tokens before them.",
        "context, tokens = context : ,d | bits per token = bits_per_token : .3f | ± 95 % = margin : .3f",
    ),
    "loss_by_position": (
        "Loss by position: every token, predicted from all tokens before it.",
        "position, tokens = label : | bits per token = bits_per_token : .3f | ± 95 % = margin : .3f",
    ),
    "needs": (
        "{text}: {tokens:,} tokens, predicted from fewer and from more tokens before them. Documents: {documents:,}. "
        "95 % intervals are over {units:,} {unit}.",
        "context = context : ,d | bits per token = bits : | bits gained = gain : | share of gain = share : | "
        "need more = need : | by chance = by_chance :",
    ),
    "needs_advice": (
        "Patterns of layers, for {serve_tokens:,} tokens and the shape of {shape}. The shares are of the measured gain "
        "from {first:,} to {last:,} tokens. No pattern costs less than a ● and sees as much.",
        " = front : | W = window : ,d | full layers = full_layers : d | R, tokens = reach : ,d | "
        "in W = in_window : .0% | in one hop = in_one_hop : .0% | in R = in_reach : .0% | cache, MiB = cache : ,.1f | "
        "MFLOPs a token = mflops : ,.0f",
    ),
    "comparison": (
        "Shape and horizons of each run. A heading sorts its column.",
        "run = run : | task = task : | seed = seed : d | layers = layers : ,d | W = window : ,d | R = reach : ,d | "
        "H90 = h90 : ,.0f | H90 in W = h90_in_windows : .1f | U90 = u90 : .2f | H50 = h50 : ,.0f | "
        "bits per byte = bits_per_byte : .3f",
    ),
}


@dataclass(frozen=True)
class Table:
    """A caption, columns {heading: format of its numbers, "" for text}, and rows of values; None is an empty cell."""

    caption: str
    columns: dict[str, str]
    rows: list[list[Any]]

    def texts(self, row: list[Any]) -> list[str]:
        """What the cells of a row show."""
        return ["" if v is None else format(v, style) for v, style in zip(row, self.columns.values(), strict=True)]

    def print(self, console: Console) -> None:
        """Print the table on a terminal."""
        printed = rich_table.Table(title=escape(printable(self.caption)), title_justify="left")
        for heading, style in self.columns.items():
            printed.add_column(escape(printable(heading)), justify="right" if style else "left")
        for row in self.rows:
            printed.add_row(*(escape(printable(text)) for text in self.texts(row)))
        console.print(printed)


def table(name: str, rows: Iterable[Result], facts: Result | None = None) -> Table:
    """The table `name` of `TABLES` with one row for each result; `facts` fill the caption."""
    caption, described = TABLES[name]
    columns = [map(str.strip, re.split(" = | :", column)) for column in described.split("| ")]
    headings, keys, styles = zip(*columns, strict=True)
    cells = [[row.get(key) for key in keys] for row in rows]
    return Table(caption.format(**facts or {}), dict(zip(headings, styles, strict=True)), cells)


def tables_of(run: Run) -> dict[str, Table]:
    """All tables of one run, by their names in a tracker."""
    results, tables = run.results, {}
    for task, entry in results.get("recall", {"tasks": {}})["tasks"].items():
        tables[f"recall_{task}"] = table("recall", entry["rows"], entry | {"task": task})
    if relay := results.get("relay"):
        fronts = enumerate(zip(relay["front"], relay["frontier"], strict=True))
        rows = [{"layer": i, "front": a, "frontier": b, "share": a / b if b else None} for i, (a, b) in fronts]
        tables["relay_fronts"] = table("relay_fronts", rows)
    if heat := results.get("heat"):
        tables["heat"] = table("heat", heat["cells"], heat)
    if "reach" in results:
        tables |= reach_tables(results["reach"])
    for name in ("by_context", "by_position") if "loss" in results else ():
        rows = [row | {"margin": (e := row["standard_error"]) and 1.96 * e} for row in results["loss"][name]]
        tables[f"loss_{name}"] = table(f"loss_{name}", rows)
    if "needs" in results:
        tables |= needs_tables(results["needs"])
    return tables


def needs_tables(needs: Result) -> dict[str, Table]:
    """What each text gains from context, and the patterns of layers with their costs."""
    texts = needs["texts"] + [needs["together"]] * (len(needs["texts"]) > 1)
    tables = {f"needs_{i}": table("needs", map(with_intervals, t["contexts"]), t) for i, t in enumerate(texts)}
    rows = [
        row
        | {"front": "●" * row["pareto"], "cache": row["cache_bytes"] / 2**20, "mflops": row["flops_per_token"] / 1e6}
        for row in needs["advice"]
    ]
    ends = {"first": texts[0]["contexts"][0]["context"], "last": texts[0]["contexts"][-1]["context"]}
    return tables | ({"needs_advice": table("needs_advice", rows, needs | ends)} if rows else {})


def with_intervals(row: Result) -> Result:
    """The row with each [value, low, high] as text, shares of tokens in per cent."""
    styles = {"bits": ".2f", "gain": ".3f", "share": ".0%", "need": ".1%", "by_chance": ".1%"}
    texts = {key: "{:{s}} [{:{s}}, {:{s}}]".format(*row[key], s=style) for key, style in styles.items() if row[key]}
    return {"context": row["context"]} | texts


def reach_tables(reach: Result) -> dict[str, Table]:
    """The gradient field, the cliff test and the predictions, as far as reach.json has them."""
    field = reach["gradient"]
    rows = [{"moment": f"{m} training"} | row for m in ("before", "after") for row in field[m]["quantiles"]]
    tables = {"gradient": table("gradient", rows)}
    if reach["cliff"]:
        by_path = groupby(reach["cliff"], itemgetter("path"))
        tables["cliff"] = table("cliff", [verdict(path, list(tests)) for path, tests in by_path])
    if predicted := reach["predictions"]:
        distances = {
            f"Xiao's bound at the measured α = {reach['alpha']['residual_share']:.3f}": predicted["xiao_bound"],
            "Xiao's bound at α = 0.95": predicted["xiao_bound_at_alpha_0.95"],
            "Mixture: mean distance of the influence": predicted["mixture_mean"],
            "Mixture: 1 % of the influence comes from beyond": predicted["mixture_horizon"],
            "Exact reach R": reach["reach"],
            "W·k": reach["window_times_layers"],
        }
        rows = [{"label": k, "tokens": d, "in_windows": d / reach["window"]} for k, d in distances.items()]
        tables["predictions"] = table("predictions", rows)
    return tables


def verdict(path: str, tests: list[Result]) -> Result:
    """The row of one path: how many changes that can't reach the query left every bit of the logits as it was."""
    if reason := tests[0].get("unavailable"):
        return {"path": path, "verdict": f"not available: {reason}"}
    beyond = [test["equal"] for test in tests if test["expected"]]
    seen = [test["distance"] for test in tests if not test["expected"] and not test["equal"]]
    word = "identical" if all(beyond) else "DIFFERENT"
    return {"path": path, "verdict": f"{word} ({sum(beyond)} of {len(beyond)})", "farthest": max(seen, default=None)}


def comparison(runs: list[Run]) -> dict[str, Table]:
    """The tables that compare several runs, by their names in a tracker."""
    rows = []
    for run in runs:
        facts = run.header | run.results.get("loss", {}) | {"run": run.name, "seed": run.header["settings"].get("seed")}
        for task, entry in run.results.get("recall", {"tasks": {"": {}}})["tasks"].items():
            h90, window = entry.get("h90"), facts["window"]
            in_windows = h90 / window if window and h90 is not None else None
            rows.append(facts | entry | {"task": task, "h90_in_windows": in_windows})
    tables = {"comparison": table("comparison", rows)}
    if sum(bool(run.header["settings"]) for run in runs) > 1:
        tables["settings"] = settings_table(runs)
    return tables


def settings_table(runs: list[Run]) -> Table:
    """One row for each setting that is not the same in all runs."""
    settings = [flat(run.header["settings"]) for run in runs]
    paths = dict.fromkeys(path for each in settings for path in each if path not in ("", "name", "run_dir"))
    rows = [[path, *(each.get(path, "not set") for each in settings)] for path in paths]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    caption = "Settings that differ." if rows else "All settings are the same, except the run's name and folder."
    return Table(caption, dict.fromkeys(["setting", *(run.name for run in runs)], ""), rows)


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Settings by their dotted path, as text.

    >>> flat({"model": {"sliding_window": 16, "layers": [{"kind": "full"}]}, "name": "twin"})
    {'model.sliding_window': '16', 'model.layers': '[{"kind": "full"}]', 'name': 'twin'}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree if isinstance(tree, str) else json.dumps(tree)}
    return {path: value for key, part in tree.items() for path, value in flat(part, f"{prefix}{key}.").items()}
