"""What windows cost a pretrained model, and what training brought back: one page, JSON, a picture and tables.

    python -m eval.receipt BEFORE AFTER [--out DIR]
    python -m eval.receipt BEFORE --layers '[{window: 64}, {window: 64}, {kind: full}]'

Three states of one model are compared: **original** (BEFORE), **windowed** (its weights under the layers of AFTER,
nothing trained) and **adapted** (AFTER). All answer the same questions and read the same held-out text. With --layers
and no AFTER the page says what windows would cost before any training. docs/finetune.md shows how to read it.
"""

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from eval.command import at_least, existing_file, numbers
from eval.models import Examined
from eval.receipt.states import open_states
from model.errors import cli

DISTANCES = (16, 32, 64, 128, 256, 512, 1024)


def arguments() -> Namespace:
    parser = ArgumentParser(prog="python -m eval.receipt", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("before", metavar="BEFORE", help="the pretrained model: folder, hub name, GGUF file or smollm2")
    add("after", metavar="AFTER", nargs="?", help="run folder of the adapted model")
    add("--layers", nargs="+", default=[], metavar="PATTERN", help="[NAME=] and a model.layers list; it is repeated")
    add(
        "--distances", type=numbers, default=DISTANCES, help="comma-separated, in tokens; default: 16 to 1024, doubling"
    )
    add("--n", type=at_least(1), default=40, help="largest number of items per distance; default %(default)s")
    add("--tokens", type=at_least(320), default=1280, help="tokens of text to score; default %(default)s")
    add("--out", metavar="DIR", help="folder for the receipt; default: AFTER, else this one")
    add("--text", type=existing_file, metavar="FILE", help="use this UTF-8 file as held-out text")
    add("--data", type=existing_file, metavar="CONFIG", help="use the held-out text of this YAML file")
    add("--seed", type=int, default=0, help="seed of all random draws; default %(default)s")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    return parser.parse_args()


def measure(states: dict[str, Examined], args: Namespace) -> dict[str, Any]:
    """Everything that receipt.json holds."""
    from eval.haystack import open_haystack
    from eval.receipt import measure as parts
    from eval.receipt import recall

    original, last = (list(states.values())[i] for i in (0, -1))
    haystack = open_haystack(last, args.text, args.data)
    probes = recall.open_probes(original.tokenizer, haystack, args.distances, args.seed)
    longest = max(args.distances)
    contexts = sorted({max(4, longest // 16), max(8, longest // 4), longest})
    result = {
        "name": original.name, "seed": args.seed, "haystack": haystack.name, "distances": sorted(args.distances),
        "n": args.n, "first": recall.FIRST, "step": recall.STEP, "sure": recall.SURE, "lead": recall.LEAD,
        "values": recall.VALUES, "command": shlex.join(["python", "-m", "eval.receipt", *sys.argv[1:]]),
        "cache_tokens": parts.CACHE_TOKENS, "states": {name: parts.facts(of) for name, of in states.items()},
        "recall": parts.measure_recall(states, probes, args.n),
        "text": parts.measure_text(states, haystack, contexts, args.tokens, args.seed),
        "relay": parts.measure_relay(states, haystack, longest, args.seed) if args.after else None,
        "decoding": parts.measure_decoding(states, haystack, longest, args.seed),
    }  # fmt: skip
    return last.header() | result


def main() -> None:
    args = arguments()
    states = open_states(args.before, args.after, args.layers, args.device)
    out = list(states.values())[-1].out_dir(args.out)
    result = measure(states, args)

    from rich.console import Console

    from data.folders import write_text
    from eval import plots
    from eval.receipt.findings import finding, tables
    from eval.receipt.page import page

    write_text(out / "receipt.json", json.dumps(result, indent=1))
    plots.save(plots.receipt_figure(result), out / "receipt.png")
    write_text(out / "receipt.html", page(result))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for _, table in tables(result):
        table.print(console)
    print(finding(result))
    print(f"Written: {out / 'receipt'}.json, receipt.png and receipt.html")


if __name__ == "__main__":
    sys.exit(cli(main))
