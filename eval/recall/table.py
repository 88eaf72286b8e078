"""What `eval.recall` prints: a table and a paragraph for each task."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = {  # heading: cell
    "tokens": "{distance:,}",
    "in W": "{distance_in_windows:.1f}",
    "items": "{n}",
    "recall": "{accuracy:.3f}",
    "": "{bar}",
    "95 %": "{low:.2f}–{high:.2f}",
    "both": "{pair_accuracy:.2f}",
    "same": "{identical_pairs:.0%}",
    "gain": "{delta_nll_bits:+.2f}",
    "blind": "{accuracy_without_needle:.2f}",
    "older": "{accuracy_with_distractors:.2f}",
}
LEGEND = (
    "An item is a text with a planted value. It is run twice: with this value, and with another one in its place. "
    "recall: share of items answered right. both: both runs are right. same: both runs give the same logits, bit by "
    "bit. gain: bits by which the planted value raises the log-probability of the answer. blind: recall without a "
    "planted value. older: recall with four other values planted before."
)


def print_result(result: dict[str, Any], console: Console) -> None:
    for task, entry in result["tasks"].items():
        console.print(recall_table(task, entry, result, console))
        console.print(f"{paragraph(task, entry, result)}\n", highlight=False)
    console.print(f"[dim]{LEGEND}[/]", highlight=False)


def recall_table(task: str, entry: dict[str, Any], result: dict[str, Any], console: Console) -> Table:
    """One line per distance; distances beyond the reach are dim. `LEGEND` explains the headings."""
    table = Table(title=f"Recall by distance: {task} ({result['model']})", title_justify="left", box=box.SIMPLE_HEAD)
    older = "accuracy_with_distractors" in entry["rows"][0]
    shown = {"in W": result["window"] is not None, "": console.width >= 100, "older": older}
    columns = {heading: cell for heading, cell in COLUMNS.items() if shown.get(heading, True)}
    table.padding = (0, 1, 0, 0)
    for heading in columns:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in entry["rows"]:
        bar = "█" * round(12 * row["accuracy"])
        beyond = result["reach"] is not None and row["distance"] > result["reach"]
        table.add_row(*(cell.format(**row, bar=bar) for cell in columns.values()), style="dim" if beyond else None)
    return table


def paragraph(task: str, entry: dict[str, Any], result: dict[str, Any]) -> str:
    """The result of one task in sentences that need no other page."""
    window, reach, paths, h90 = result["window"], result["reach"], entry["paths"], entry["h90"]
    if h90:
        of_window = f", {h90 / window:.1f} windows of W = {window:,}" if window else ""
        of_reach = f", {100 * entry['u90']:.0f} % of the reach R = {reach:,}" if reach else ""
        text = f"[bold]{task}: the model recalls up to {h90:,} tokens back (H90){of_window}{of_reach}.[/]"
        text += " At every measured distance up to there, recall is at least 90 % with 95 % confidence."
    else:
        text = f"[bold]{task}: recall is not surely 90 % even at the shortest distance (H90 = 0).[/]"
    if entry["h50_censored"]:
        text += " Recall stays above 50 % at all measured distances."
    elif entry["h50"]:
        text += f" Recall falls to 50 % at {entry['h50']:.0f} tokens (H50)."
    else:
        text += " Recall is below 50 % at all measured distances (H50 = 0)."
    text += f" Chance is {100 * entry['chance']:.1f} %."
    if entry["chance_in_context"] < 1:
        text += f" Naming any of the values in the text would give {100 * entry['chance_in_context']:.0f} %."
    if entry["identical_beyond_reach"] is not None:
        verdict = "all gave" if entry["identical_beyond_reach"] else "[red]NOT all gave[/]"
        text += (
            f" Nothing farther back than R can reach the answer: of the {entry['pairs_beyond_reach']:,} items measured "
            f"there, {verdict} the same logits with another value."
        )
    text += (
        f" As a check, the key/value cache gave the answer of a full pass on {paths['agree']} of {paths['n']} items "
        f"(logits differ by at most {paths['max_abs_logit_difference']:.1e}), and generation on "
        f"{paths['generated_agree']} of {paths['generated_n']}."
    )
    if "untrained" in entry:
        right, n = (sum(row[key] for row in entry["untrained"]) for key in ("correct", "n"))
        text += f" Before training, the model answered {100 * right / n:.1f} % of {n:,} items right."
    return text
