"""What a receipt says in words and tables, computed from its figures alone."""

from collections.abc import Iterator, Sequence
from typing import Any

from data.tasks.distance import last_distance_holding
from eval.receipt.states import ADAPTED, ORIGINAL, WINDOWED
from eval.report.tables import Table

KEPT = 0.9  # share of the original's recall
Receipt = dict[str, Any]


def kept_up_to(receipt: Receipt, state: str) -> int:
    """The farthest distance such that in every task recall is at least KEPT of the original's at each one up to it."""
    ends = []
    for task in receipt["recall"].values():
        pairs = [(row["distance"], row["states"][state], row["states"][ORIGINAL]) for row in task["rows"]]
        distances, after, before = zip(*pairs, strict=True)
        shares = [a["accuracy"] - KEPT * b["accuracy"] for a, b in zip(after, before, strict=True)]
        ends.append(last_distance_holding(distances, shares, -1e-9))  # .72 - .9 x .8 is not 0
    return min(ends)


def finding(receipt: Receipt) -> str:
    """What the windows cost, and for an adapted model what came back, in one sentence."""
    if ADAPTED in receipt["states"]:
        return (
            f"With the windows alone the model {outcome(receipt, WINDOWED)}; after training it "
            f"{outcome(receipt, ADAPTED)}."
        )
    others = (f"{name} {outcome(receipt, name)}" for name in receipt["states"] if name != ORIGINAL)
    return f"Nothing was trained: {'; '.join(others)}."


def outcome(receipt: Receipt, state: str) -> str:
    """Bits per byte with the longest context, and recall, compared with the original."""
    text, longest = receipt["text"]["states"][state], receipt["distances"][-1]
    bits, ratio = text["difference"][-1][0], text["ratio"][-1][0] - 1
    more, kept = "less" if bits < 0 else "more", kept_up_to(receipt, state)
    where = f"up to {kept:,} tokens" if kept else "at no distance"
    return (
        f"needs {abs(bits):.3f} bits per byte {more} ({abs(100 * ratio):.1f} %) and keeps recall {where}"
        f"{', the farthest measured' if kept == longest else ''}"
    )


def tables(receipt: Receipt) -> Iterator[tuple[str, Table]]:
    """The name and the table of each part that was measured."""
    names, others = list(receipt["states"]), list(receipt["states"])[1:]
    rows = [[name, *state_row(receipt, name)] for name in names]
    columns = {"state": "", "layers": "", "R, tokens": ",d"}
    columns |= {f"cache at {n:,} tokens, MiB": ",.1f" for n in receipt["cache_tokens"]} | {"tokens/s [min, max]": ""}
    speed = receipt["decoding"]
    caption = f"Each state: keys and values in 2 bytes a number, and decoding behind {speed['length']:,} tokens."
    yield "states", Table(caption, columns, rows)
    for task, entry in receipt["recall"].items():
        columns = {"distance, tokens": ",d"} | dict.fromkeys(names, "") | {f"{n} − {ORIGINAL}": "" for n in others}
        rows = [
            [row["distance"], *(_share(row["states"][name]) for name in names)]
            + [_signed(row["states"][name]["difference"], "+z.2f") for name in others]
            for row in entry["rows"]
        ]
        caption = (
            f"Task {task}: share of right answers by distance, and paired differences. Chance is {entry['chance']:.1%}."
        )
        yield f"recall_{task}", Table(caption + " In brackets 95 % intervals; n is the number of items.", columns, rows)
    text = receipt["text"]
    columns = {"context, tokens": ""} | dict.fromkeys(names, "") | {f"{n} − {ORIGINAL}": "" for n in others}
    rows = [
        [f"{context:,}", *(_signed(text["states"][name]["bits_per_byte"][i], ".3f") for name in names)]
        + [_signed(text["states"][name]["difference"][i], "+z.3f") for name in others]
        for i, context in enumerate(text["contexts"])
    ]
    rows.append(
        [f"gain, {text['contexts'][0]:,} to {text['contexts'][-1]:,}"]
        + [_signed(text["states"][name]["gain"], ".3f") for name in names]
        + [_signed(text["states"][name]["gain_difference"], "+z.3f") for name in others]
    )
    caption = f"Bits per byte of the same {text['tokens']:,} tokens by available context. In brackets 95 % intervals "
    yield "text", Table(caption + f"over {text['units']:,} {text['unit']}.", columns, rows)


def state_row(receipt: Receipt, name: str) -> list[Any]:
    state, speed = receipt["states"][name], receipt["decoding"]["states"][name]
    return [state["kinds"], state["reach"], *(n / 2**20 for n in state["cache_bytes"]), _signed(speed, ",.1f")]


def _share(row: Receipt) -> str:
    return f"{row['accuracy']:.0%} [{row['low']:.0%}, {row['high']:.0%}], n = {row['n']}"


def _signed(figures: Sequence[float], style: str) -> str:
    value, low, high = (format(figure, style) for figure in figures)
    return f"{value} [{low}, {high}]"
