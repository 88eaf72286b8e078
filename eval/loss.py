"""How well a model reads: bits per byte, loss by position, loss by available context.

    python -m eval.loss MODEL [--out DIR]

* **Bits per byte**: the sum of -ln p over held-out tokens / ln 2 / UTF-8 bytes of the scored text. Each token is
  scored once, and with the whole context that can matter to it: windows of text overlap by the reach R (or
  `--context`), and only what follows the overlap is scored, except at the start of a document.
* **By position**: rows cut anywhere, every token scored with what precedes it in its row, as in training.
* **By context**: the *same* tokens, given only the last c tokens, for c = 1, 2, 4 ... Paired, so that the
  differences are those of the context alone.

Legend: B batch, T positions, V vocabulary.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval import plots
from eval.haystack import Haystack, HeldOutDocument, open_haystack
from eval.models import Examined, load_model
from model.errors import UserError, cli

FloatArray = NDArray[np.float64]
BATCH_TOKENS = 4096  # stays in the cache of a CPU


@dataclass(frozen=True)
class Stretch:
    """Tokens start..end of a document are fed; those from `scored` on are scored."""

    start: int
    scored: int
    end: int


def stretches(n_tokens: int, length: int, context: int) -> Iterator[Stretch]:
    """Cover tokens 1..n-1 of a document exactly once, each with `context` tokens before it where there are so many.

    >>> [(s.start, s.scored, s.end) for s in stretches(10, 6, 3)]
    [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    """
    scored = 1
    while scored < n_tokens:
        start = max(0, scored - context)
        end = min(n_tokens, start + length)
        yield Stretch(start, scored, end)
        scored = end


@torch.inference_mode()
def token_nats(examined: Examined, input_ids: Tensor) -> FloatArray:
    """-ln p of each token but the first, (B, T-1), given what precedes it in its row."""
    ids = input_ids.to(examined.device)
    logits = examined.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(ids.shape[0], -1).double().cpu().numpy()


def document_nats(examined: Examined, document: HeldOutDocument, length: int, context: int) -> float:
    """Sum of -ln p over tokens 1..n-1 of a document; stretches of equal shape run as one batch."""
    by_shape: dict[int, list[Stretch]] = {}
    for stretch in stretches(len(document.tokens), length, context):
        by_shape.setdefault(stretch.end - stretch.start, []).append(stretch)
    total = 0.0
    for size, group in by_shape.items():
        rows = max(1, BATCH_TOKENS // size)
        for i in range(0, len(group), rows):
            batch = group[i : i + rows]
            ids = torch.from_numpy(np.stack([document.tokens[s.start : s.end] for s in batch]))
            for stretch, nats in zip(batch, token_nats(examined, ids), strict=True):
                total += float(nats[stretch.scored - stretch.start - 1 :].sum())
    return total


def bits_per_byte(examined: Examined, haystack: Haystack, length: int, context: int) -> dict[str, Any]:
    """Over every document of the haystack. The first token of a document has no context: its bytes don't count."""
    nats = n_tokens = n_bytes = 0.0
    for document in haystack.documents:
        nats += document_nats(examined, document, length, context)
        n_tokens += len(document.tokens) - 1
        n_bytes += document.n_bytes - first_token_bytes(examined, document)
    return {
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "nats_per_token": nats / n_tokens,
        "perplexity": math.exp(min(700.0, nats / n_tokens)),
        "bytes_per_token": n_bytes / n_tokens,
        "tokens": int(n_tokens),
        "bytes": int(n_bytes),
        "context": context,
    }


def first_token_bytes(examined: Examined, document: HeldOutDocument) -> int:
    """Bytes of the unscored first token: none when it is the begin-of-text mark."""
    first = int(document.tokens[0])
    if first == getattr(examined.tokenizer, "bos_id", None):
        return 0
    return len(examined.tokenizer.decode([first]).encode())


def by_position(examined: Examined, haystack: Haystack, length: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Loss in bits a token over buckets of the position in a row, each bucket half as long again as the last."""
    sample = haystack.rows(rows, length, seed)
    nats = np.concatenate([token_nats(examined, part) for part in sample.split(max(1, BATCH_TOKENS // length))], axis=0)
    bits = nats / math.log(2)
    edges = sorted({1, *(round(1.5**i) for i in range(64) if 1.5**i < length), length})
    table = []
    for low, high in itertools.pairwise(edges):
        bucket = bits[:, low - 1 : high - 1].mean(axis=1)
        label = str(low) if high == low + 1 else f"{low}–{high - 1}"
        table.append(_row(bucket, bits.shape[0] * (high - low), label) | {"middle": math.sqrt(low * (high - 1))})
    return table


def _row(values: FloatArray, n: int, label: str) -> dict[str, Any]:
    """Mean over rows with its standard error; rows of text are the independent units, tokens are not."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"label": label, "n": n, "bits_per_token": float(values.mean()), "standard_error": error}


def contexts(length: int) -> list[int]:
    """1, 2, 4 ... up to the length of a row."""
    return [2**i for i in range(32) if 2**i < length]


def by_context(
    examined: Examined, haystack: Haystack, length: int, rows: int, seed: int, targets: int = 4
) -> list[dict[str, Any]]:
    """The last `targets` tokens of each row, each given exactly c tokens before it."""
    sample = haystack.rows(rows, length + targets, seed + 1)
    table = []
    for context in contexts(length):
        views = [sample[:, -t - context - 1 : sample.shape[1] - t] for t in range(targets)]
        parts = torch.cat(views).split(max(1, BATCH_TOKENS // (context + 1)))
        nats = np.concatenate([_last_nats(examined, part) for part in parts])
        bits = nats.reshape(targets, rows).mean(axis=0) / math.log(2)
        table.append(_row(bits, targets * rows, str(context)) | {"context": context})
    return table


@torch.inference_mode()
def _last_nats(examined: Examined, ids: Tensor) -> FloatArray:
    """-ln p of the last token of each row (B,): only the logits that predict it are made."""
    ids = ids.to(examined.device)
    logits = examined.model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return F.cross_entropy(logits, ids[:, -1], reduction="none").double().cpu().numpy()


def measure(
    examined: Examined, haystack: Haystack, context: int | None = None, rows: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Everything loss.json holds."""
    context, length = row_shape(examined, context)
    return (
        examined.header()
        | {"seed": seed, "haystack": haystack.name}
        | bits_per_byte(examined, haystack, length, context)
        | {
            "by_position": by_position(examined, haystack, length, rows, seed),
            "by_context": by_context(examined, haystack, length, rows, seed),
        }
    )


def row_shape(examined: Examined, context: int | None) -> tuple[int, int]:
    """(context, length of a row) in tokens: context R, up to 1,024, and rows of twice that where the model allows."""
    longest = examined.max_tokens or 1 << 40
    context = context or min(examined.reach or 1024, 1024)
    if context + 2 > longest:
        context = longest // 2
    return context, min(longest, 2 * context + 64)


def print_result(result: dict[str, Any], console: Console) -> None:
    console.print(
        f"[bold]{result['model']}: {result['bits_per_byte']:.3f} bits per byte[/] on {result['haystack']} "
        f"({result['tokens']:,} tokens, {result['bytes']:,} bytes; {result['nats_per_token']:.3f} nats a token, "
        f"perplexity {result['perplexity']:.1f}; each token with {result['context']:,} tokens of context)"
    )
    table = Table(title="The same tokens with more and more context", title_justify="left")
    for name in ("context, tokens", "bits a token", "± 95 %", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    worst = max(row["bits_per_token"] for row in result["by_context"])
    for row in result["by_context"]:
        bar = "█" * round(24 * row["bits_per_token"] / worst)
        table.add_row(row["label"], f"{row['bits_per_token']:.3f}", f"{1.96 * row['standard_error']:.3f}", bar)
    console.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.loss", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where loss.json goes; default: the run folder, or here")
    parser.add_argument("--context", type=int, help="tokens before each scored token; default: R, up to 1,024")
    parser.add_argument("--max-tokens", type=int, default=200_000, help="held-out tokens to score; default %(default)s")
    parser.add_argument("--rows", type=int, default=64, help="rows for the curves by position and context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="CONFIG.yaml", help="take the held-out text of this config")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to read")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    for name in ("context", "max_tokens", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    console = Console()
    examined = load_model(args.model, args.device)
    text = open_haystack(examined, args.text, args.data, args.max_tokens)
    result = measure(examined, text, args.context, args.rows, args.seed)
    out = examined.out_dir(args.out)
    (out / "loss.json").write_text(json.dumps(result, indent=1))
    plots.save(plots.loss_figure([result]), out / "loss.png")
    print_result(result, console)
    console.print(f"Written: {out / 'loss.json'}, {out / 'loss.png'}")


if __name__ == "__main__":
    sys.exit(cli(main))
