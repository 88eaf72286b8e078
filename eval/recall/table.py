"""What `eval.recall` says on the terminal: a table and a paragraph for each task."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_result(result: dict[str, Any], console: Console) -> None:
    for task, entry in result["tasks"].items():
        console.print(recall_table(task, entry, result, console))
        console.print(headline(task, entry, result))


def recall_table(task: str, entry: dict[str, Any], result: dict[str, Any], console: Console) -> Table:
    """Right answers by distance; pair: both of a pair right; equal: pairs of equal bits; bits: gained by the needle;
    blind: right answers without a needle; older: with older needles before."""
    table = Table(title=f"Recall by distance: {task} ({result['model']})", title_justify="left", box=box.SIMPLE_HEAD)
    bars = console.width >= 100
    older = ["older"] if "accuracy_with_distractors" in entry["rows"][0] else []
    for name in (
        "tokens",
        "W",
        "n",
        "recall",
        *([""] if bars else []),
        "95 %",
        "pair",
        "equal",
        "bits",
        "blind",
        *older,
    ):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in entry["rows"]:
        windows = row["distance_in_windows"]
        table.add_row(
            f"{row['distance']:,}",
            "" if windows is None else f"{windows:.1f}",
            str(row["n"]),
            f"{row['accuracy']:.3f}",
            *(["█" * round(12 * row["accuracy"])] if bars else []),
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['pair_accuracy']:.2f}",
            f"{row['identical_pairs']:.0%}",
            f"{row['delta_nll_bits']:+.2f}",
            f"{row['accuracy_without_needle']:.2f}",
            *([f"{row['accuracy_with_distractors']:.2f}"] if older else []),
            style="dim" if result["reach"] is not None and row["distance"] > result["reach"] else None,
        )
    return table


def headline(task: str, entry: dict[str, Any], result: dict[str, Any]) -> str:
    """One paragraph that says what was found."""
    window = result["window"]
    in_w = f" = {entry['h90'] / window:.1f} W" if window else ""
    text = f"[bold]{task}: H90 = {entry['h90']:,} tokens{in_w}"
    if entry["u90"] is not None:
        text += f", U90 = {entry['u90']:.2f} of R = {result['reach']:,}"
    text += f"[/]; H50 = {entry['h50']:.0f} tokens; chance {entry['chance']:.3f}"
    text += f" (any answer in sight: {entry['chance_in_context']:.2f})." if entry["chance_in_context"] < 1 else "."
    if entry["identical_beyond_reach"] is not None:
        verdict = "all bit-identical" if entry["identical_beyond_reach"] else "[red]NOT all bit-identical[/]"
        text += f" Beyond R, {entry['pairs_beyond_reach']:,} pairs: {verdict}."
    paths = entry["paths"]
    text += (
        f" Full forward and ring agree on {paths['agree']} of {paths['n']} answers"
        f" (logits within {paths['max_abs_logit_difference']:.1e}),"
        f" generation on {paths['generated_agree']} of {paths['generated_n']}."
    )
    if "untrained" in entry:
        right, n = (sum(row[key] for row in entry["untrained"]) for key in ("correct", "n"))
        text += f" Untrained: {right / n:.3f} of {n:,}."
    return text
