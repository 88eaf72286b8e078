"""The results in words: headline figures, verdicts and controls."""

from typing import NamedTuple

from eval.report.runs import Result, Run


class Card(NamedTuple):
    """One headline figure."""

    label: str
    value: str
    note: str


def tokens(count: float, window: int | None = None) -> str:
    """
    >>> tokens(480, 16), tokens(1)
    ('480 tokens (30.0 W)', '1 token')
    """
    share = f" ({count / window:.1f} W)" if window else ""
    return f"{count:,.0f} {'token' if count == 1 else 'tokens'}{share}"


def shape(run: Run) -> str:
    """The model in one line."""
    r = run.header
    window = f"W = {r['window']:,}" if r["window"] else "no window"
    reach = "unbounded reach" if r["reach"] is None else f"exact reach R = {r['reach']:,}"
    return f"{r['layers']} layers, {window}, {reach}, {r['parameters']:,} parameters"


def finding(run: Run) -> str:
    """What the first task shows, in one to three sentences."""
    recall = run.results.get("recall")
    if recall is None:
        return "Recall has not been measured yet."
    task, entry = next(iter(recall["tasks"].items()))
    window, h90 = recall["window"], entry["h90"]
    if not h90:
        nearest = entry["rows"][0]
        return (
            f"No distance is recalled in 90 % of cases (task {task}). At {tokens(nearest['distance'])} the model is "
            f"right in {nearest['accuracy']:.0%} of cases; chance is {entry['chance']:.0%}."
        )
    text = f"The model recalls a value from up to {tokens(h90, window)} back in at least 90 % of cases (task {task})."
    if recall["reach"]:
        text += f" That is {entry['u90']:.0%} of what its windows allow (R = {tokens(recall['reach'])})."
    if entry["h90_censored"]:
        text += " No farther distance was measured."
    if window and h90 > 1.5 * window:
        text += " Published claims for stacked windows end near 1.5 W."
    return text


def identity(recall: Result) -> tuple[str, bool | None]:
    """A sentence on the pairs beyond R, and whether all of them were identical (None: no such pairs)."""
    reach = recall["reach"]
    if reach is None:
        return "The reach of this stack is unbounded, so there is no distance at which pairs must be identical.", None
    rows = [row for entry in recall["tasks"].values() for row in entry["rows"] if row["distance"] > reach]
    if not rows:
        return f"No distance beyond R = {reach:,} was measured.", None
    pairs, same = sum(row["n"] for row in rows), sum(round(row["identical_pairs"] * row["n"]) for row in rows)
    where = ", ".join(f"{distance:,}" for distance in sorted({row["distance"] for row in rows}))
    if same < pairs:
        return (
            f"Beyond R = {reach:,} tokens only {same:,} of {pairs:,} pairs are bit-identical (distances {where}). "
            "The model sees farther than its windows allow. This is a fault.",
            False,
        )
    best = max(row["pair_accuracy"] for row in rows)
    return (
        f"Beyond R = {reach:,} tokens all {pairs:,} counterfactual pairs are bit-identical (distances {where}). The "
        f"logits after value v and after value v′ are equal in every bit: nothing of the value arrives. Both "
        f"answers of a pair are right in {best:.0%} of cases.",
        True,
    )


def cards(run: Run) -> list[Card]:
    """The headline figures: H90 and U90 of the first task, bits per byte, R."""
    cards, window, reach = [], run.header["window"], run.header["reach"]
    for task, entry in list(run.results.get("recall", {"tasks": {}})["tasks"].items())[:1]:
        note = f"{entry['h90'] / window:.1f} windows of {window:,}" if window else f"task {task}"
        note += ", the farthest measured" if entry["h90_censored"] else ""
        cards.append(Card("H90: recalled in 90 % of cases", tokens(entry["h90"]), note))
        if entry["u90"] is not None:
            low, high = entry["u90_interval"]
            note = f"95 % interval {low:.2f} to {high:.2f}; task {task}"
            cards.append(Card("U90 = H90 / R: share of the reach", f"{entry['u90']:.2f}", note))
    if loss := run.results.get("loss"):
        note = f"{loss['nats_per_token']:.2f} nats per token, {loss['tokens']:,} held-out tokens"
        cards.append(Card("Bits per byte", f"{loss['bits_per_byte']:.2f}", note))
    product = run.header["window_times_layers"]
    note = "a layer sees every earlier token" if reach is None else f"usually quoted: W·k = {product:,}"
    cards.append(Card("R: exact reach", "unbounded" if reach is None else tokens(reach), note))
    return cards


def controls(run: Run) -> list[str]:
    """The results of the controls, each of which could have shown an artefact."""
    lines = []
    for task, entry in run.results.get("recall", {"tasks": {}})["tasks"].items():
        blind = [row["accuracy_without_needle"] for row in entry["rows"]]
        paths = entry["paths"]
        lines.append(
            f"{task}, needle removed: right in {min(blind):.1%} to {max(blind):.1%} of cases; "
            f"chance is {entry['chance']:.1%}."
        )
        lines.append(
            f"{task}, two ways to the answer: one full forward pass and the ring cache agree on {paths['agree']} of "
            f"{paths['n']} answers (logits differ by at most {paths['max_abs_logit_difference']:.0e}), generated text "
            f"on {paths['generated_agree']} of {paths['generated_n']}."
        )
    holds = run.results.get("reach", {}).get("cliff_holds")
    if holds is not None:
        verdict = "no token beyond R or in another document changed a bit" if holds else "FAILED"
        lines.append(f"Cliff test on every path: {verdict}.")
    return lines
