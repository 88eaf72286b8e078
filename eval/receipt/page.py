"""The receipt as one HTML page that fetches nothing."""

from functools import partial
from typing import Any

from eval import plots
from eval.receipt.findings import Receipt, finding, tables
from eval.report.page import template


def page(receipt: Receipt) -> str:
    """The whole page. Its sentences are in `eval/report/templates/receipt.html`."""
    from training.planning.dry_run import duration

    relayed = receipt["relay"]["states"] if receipt["relay"] else {}
    return template("receipt.html").render(
        receipt=receipt, finding=finding(receipt), tables=list(tables(receipt)),
        figure=partial(plots.receipt_figure, receipt), svg=plots.svg, duration=duration, dict=dict,
        relays={name: partial(plots.relay_figure, relay_of(receipt, name)) for name in relayed},
    )  # fmt: skip


def relay_of(receipt: Receipt, state: str) -> dict[str, Any]:
    """The relay map of one state in the form of relay.json."""
    return receipt["relay"]["states"][state] | {
        "offsets": receipt["relay"]["offsets"], "window": receipt["states"][state]["window"],
    }  # fmt: skip
