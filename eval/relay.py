"""How a value travels: after which layer, and how far behind a needle, can it be read?

    python -m eval.relay MODEL [--out DIR] [--n 400] [--read auto|head|probe] [--max-offset N] [--text FILE]

The texts are `haystack <needle> VALUE haystack ...`, without a query. The **relay map** says for each layer, and each
offset behind the value, in which share of the texts the value can be read from the residual stream (`eval.streams`).
After l layers the stream can depend on the value up to the reach of these layers: the frontier. Every text is also run
with another value, and beyond the frontier both runs must give the same bits.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.tasks.vocabulary import recall_vocabulary
from eval.command import at_least, new_parser, prepare
from eval.haystack import Haystack
from eval.models import Examined, nominal_reach
from eval.recall.order import VALUES
from eval.results import write_result
from model import windows
from model.errors import UserError, cli

COLUMNS = 48  # offsets of the map, evenly spaced from 1 to a window beyond the reach


def front(accuracy: Sequence[Sequence[float]], offsets: Sequence[int]) -> list[int]:
    """For each stream the farthest offset at which at least half of the texts give their value; 0 if none does.

    >>> front([[0.1, 0.0, 0.0], [0.9, 0.6, 0.2]], [1, 8, 16])
    [0, 8]
    """
    return [max((d for d, share in zip(offsets, row, strict=True) if share >= 0.5), default=0) for row in accuracy]


def pace(fronts: Sequence[int]) -> float | None:
    """Tokens per layer by which the front advances, by least squares up to its farthest point; None if it does not.

    >>> pace([0, 5, 10, 15, 15])
    5.0
    """
    last = int(np.argmax(fronts))
    if last < 1:
        return None
    return float(round(np.polyfit(np.arange(last + 1), fronts[: last + 1], 1)[0], 3))


def measure(
    examined: Examined, haystack: Haystack, n: int = 400, seed: int = 0, how: str = "auto", max_offset: int = 4096
) -> dict[str, Any]:
    """Everything that relay.json holds. Raises UserError if `how` is `head` and the run has none."""
    from eval import streams  # imports torch

    n_values = examined.recall.get("values", VALUES)
    vocabulary = recall_vocabulary(examined.tokenizer, n_values)
    window, lead = examined.window or 64, examined.window or 16
    longest = min(max_offset, (examined.max_tokens or 1 << 40) - lead - len(vocabulary.needle) - 1)
    last = max(1, min(nominal_reach(examined.specs, window) + window, longest))
    offsets = sorted({max(1, round(last * i / COLUMNS)) for i in range(1, COLUMNS + 1)} | {1})
    texts = streams.make_texts(haystack, vocabulary, n, lead, offsets[-1], seed)
    head = None if how == "probe" else streams.head_reader(examined, n_values)
    if how == "head" and head is None:
        raise UserError(
            f"--read head: {examined.name!r} has no checkpoint with a relay head for {n_values} values; "
            "use --read probe, or train with recall.relay_loss_weight"
        )
    read = head or streams.linear_probe(texts.labels, n_values)
    limits = [0, *(windows.reach(examined.specs[:layers]) for layers in range(1, examined.layers + 1))]
    shares, same, beyond = streams.read_map(examined, texts, offsets, limits, read)
    fronts = front(shares.tolist(), offsets)
    return examined.header() | {
        "seed": seed,
        "haystack": haystack.name,
        "read_by": "linear probe" if head is None else "relay head",
        "n": n - n // 2 if head is None else n,
        "chance": 1 / n_values,
        "offsets": offsets,
        "accuracy": [[round(share, 4) for share in row] for row in shares.tolist()],
        "frontier": limits,
        "front": fronts,
        "tokens_per_layer": pace(fronts),
        "pairs_beyond_frontier": beyond,
        "identical_beyond_frontier": same == beyond if beyond else None,
    }


def finding(result: dict[str, Any]) -> str:
    """The result in two or three sentences."""
    text = f"Read with the {result['read_by']}, the value can be found in at least half of the texts "
    text += f"up to {max(result['front']):,} tokens behind it."
    speed, window = result["tokens_per_layer"], result["window"]
    if speed and window and result["reach"] is not None:
        text += f" It advances by {speed:.1f} tokens per layer; at most W − 1 = {window - 1:,} are possible."
    if result["identical_beyond_frontier"] is not None:
        what = "none changes" if result["identical_beyond_frontier"] else "some CHANGE, which is a fault,"
        text += f" Beyond the frontier nothing can arrive: of the {result['pairs_beyond_frontier']:,} streams there "
        text += f"{what} with the value."
    return text


def main() -> None:
    parser = new_parser("relay", __doc__)
    parser.add_argument("--n", type=at_least(4), default=400, help="texts; a probe is fitted on half of them")
    parser.add_argument("--read", choices=("auto", "head", "probe"), default="auto", help="auto: head if there is one")
    parser.add_argument("--max-offset", type=at_least(1), default=4096, help="longest offset; default 4096 tokens")
    args = parser.parse_args()
    examined, out, text = prepare(args)
    result = measure(examined, text, args.n, args.seed, args.read, args.max_offset)
    write_result("relay", result, out, lambda plots: plots.relay_figure(result))
    print(finding(result))
    if result["identical_beyond_frontier"] is False:
        raise SystemExit("a stream beyond its frontier changed with the value: the attention sees too far")


if __name__ == "__main__":
    sys.exit(cli(main))
