"""What was found, in words: headline figures, verdicts, controls."""

from dataclasses import dataclass

from eval.report.runs import Result, Run


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    note: str


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
