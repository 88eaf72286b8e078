"""Checks the architectures of transformers that have windows, small and with random weights, in all modes.

    python -m eval.conformance.architectures [NAME ...] [--out FOLDER]

Without NAME it checks all that are listed here. Writes architectures.json and architectures.md. The latter is the table
of docs/instruments.md.
"""

import sys
import time
from argparse import ArgumentParser
from typing import Any

from eval.conformance.__main__ import ATTENTION, runs_of_windows
from eval.models import out_folder
from model.errors import UserError, cli
from training.run.checkpoint import write_json

WINDOWED = {"sliding_window": 8}
QWEN = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
SHARED_KEYS = {"num_hidden_layers": 10, "num_kv_shared_layers": 5}  # the last five use the keys of earlier layers
# What differs from the default config of each model type, where that has no window or can't be made small.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {}, "beam": {}, "cohere2": {}, "cohere2_moe": {}, "cohere_compass_text": ALTERNATING, "cwm": {},
    "doge": WINDOWED, "dots1": ALTERNATING, "dots3_note_text": {}, "exaone4": {}, "exaone_moe": {}, "flint": {},
    "gemma2": {}, "gemma3_text": {}, "gemma3n_text": SHARED_KEYS, "gemma4_text": {}, "gemma4_unified_text": {},
    "gpt_neo": {}, "gpt_oss": {}, "granite_swa": {}, "granitemoe_swa": {}, "kolibri1": {}, "laguna": ALTERNATING,
    "lfm3": {}, "llama4_text": {}, "mellum": ALTERNATING, "mimo_v2_flash": {}, "ministral": {"head_dim": 8},
    "ministral3": WINDOWED, "mistral": {}, "mixtral": WINDOWED, "modernbert-decoder": {}, "moshi": {}, "olmo3": {},
    "phi3": WINDOWED, "phi4_multimodal": WINDOWED, "phimoe": WINDOWED, "qwen2": QWEN, "qwen2_moe": QWEN,
    "qwen3": QWEN, "qwen3_moe": QWEN, "recurrent_gemma": {"num_hidden_layers": 3},
    "smollm3": QWEN | {"num_hidden_layers": 4}, "starcoder2": WINDOWED, "vaultgemma": {},
}  # fmt: skip


def examine(name: str) -> dict[str, Any]:
    """What architectures.json holds of one model type."""
    from eval.conformance.build import build
    from eval.conformance.check import check

    start = time.monotonic()
    try:
        report = check(build(name, ARCHITECTURES[name]), ATTENTION)
    except Exception as error:  # of any architecture: the others are examined all the same
        return {"not_examined": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    rows = [
        {k: v for k, v in row.items() if k not in ("ways", "refusals")}
        | {"largest_error": max((w["largest_layer_error"] for w in row.get("ways", [])), default=None)}
        for row in report["rows"]
    ]
    return report | {"rows": rows, "seconds": round(time.monotonic() - start, 1)}


def cell(report: dict[str, Any], attention: str) -> str:
    """One cell of the table: what is not as asked under an attention implementation.

    >>> fault = {"mode": "packed", "attention": "sdpa", "faults": [{"name": "documents leak"}]}
    >>> cell({"rows": [fault, {"mode": "train", "attention": "sdpa", "refused": "why", "faults": []}]}, "sdpa")
    'packed: documents leak; refuses train'
    """
    rows = [row for row in report["rows"] if row["attention"] == attention]
    by_fault: dict[str, list[str]] = {}
    for row in rows:
        for name in dict.fromkeys(fault["name"] for fault in row["faults"]):
            by_fault.setdefault(name, []).append(row["mode"])
    parts = [f"{', '.join(modes)}: {name}" for name, modes in by_fault.items()]
    refused = [row["mode"] for row in rows if "refused" in row]
    if len(refused) == len(rows):
        return "not offered" if refused == ["all"] else "refused"
    return "; ".join(parts + ([f"refuses {', '.join(refused)}"] if refused else [])) or "as asked"


def table(results: dict[str, Any]) -> str:
    lines = [f"| model type | windows asked for | {' | '.join(ATTENTION)} |", "|---" * (2 + len(ATTENTION)) + "|"]
    for name, report in results.items():
        if "not_examined" not in report:
            cells = " | ".join(cell(report, attention) for attention in ATTENTION)
            lines.append(f"| {name} | {runs_of_windows(report['asked'])} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(
        prog="python -m eval.conformance.architectures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="model types of transformers; default: all known here")
    parser.add_argument("--out", metavar="FOLDER", default=".", help="folder for the results; default: this one")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ARCHITECTURES]:
        raise UserError(f"unknown model type {unknown[0]!r}; known: {', '.join(ARCHITECTURES)}")
    results, out = {}, out_folder(args.out)
    for name in args.names or ARCHITECTURES:
        results[name] = examine(name)
        print(
            f"{name}: {results[name].get('not_examined') or table({name: results[name]}).splitlines()[-1]}", flush=True
        )
        write_json(out / "architectures.json", results)
        (out / "architectures.md").write_text(table(results))


if __name__ == "__main__":
    sys.exit(cli(main))
