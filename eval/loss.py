"""How well a model predicts held-out text: bits per byte, loss by position, and loss by available context.

    python -m eval.loss MODEL [--out DIR]

* **Bits per byte**: the sum of -ln p over held-out tokens / ln 2 / UTF-8 bytes of these tokens. Stretches of text
  overlap by the reach R (or `--context`), and the overlap is not scored again: each token is scored once, in context.
* **By position**: stretches cut anywhere, every token scored with what precedes it in its stretch, as in training.
* **By context**: the *same* tokens, given only the last c tokens, for c = 1, 2, 4 ... so that only the context differs.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.command import at_least, new_parser, prepare, progress
from eval.haystack import Haystack, HeldOutDocument
from eval.models import Examined
from eval.results import write_result
from model.errors import cli
from training.processes.signals import end_process

BATCH_TOKENS = 4096  # fits into the cache of a CPU
TARGETS = 4  # tokens per stretch that are scored by context


def stretches(n_tokens: int, length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, scored, end): tokens [start, end) of a document go into the model, and [scored, end) are scored.

    Tokens 1..n-1 are scored exactly once, each with `context` tokens before it, or all that there are.

    >>> list(stretches(10, length=6, context=3))
    [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    """
    scored = 1
    while scored < n_tokens:
        start = max(0, scored - context)
        end = min(n_tokens, start + length)
        yield start, scored, end
        scored = end


def document_nats(
    examined: Examined, document: HeldOutDocument, length: int, context: int, advance: Callable[[int], None]
) -> float:
    """Sum of -ln p over tokens 1..n-1 of a document, those of the answers in a conversation.

    Calls `advance` with the number of tokens just read.
    """
    import torch

    from eval.forward import token_nats

    total = 0.0
    for size, group in itertools.groupby(stretches(len(document.tokens), length, context), lambda s: s[2] - s[0]):
        while batch := list(itertools.islice(group, max(1, BATCH_TOKENS // size))):
            ids = torch.from_numpy(np.stack([document.tokens[start:end] for start, _, end in batch]))
            for (start, scored, end), nats in zip(batch, token_nats(examined, ids), strict=True):
                counted = slice(None) if document.scored is None else document.scored[scored:end]
                total += float(nats[scored - start - 1 :][counted].sum())
                advance(end - scored)
    return total


def bits_per_byte(examined: Examined, haystack: Haystack, length: int, context: int) -> dict[str, Any]:
    """Over all documents, and by source if there are several.

    The first token of a document has no context: neither it nor its bytes count.
    """
    decode, marker = examined.tokenizer.decode, examined.tokenizer.bos_id
    sums: dict[str, NDArray[np.float64]] = {}  # nats, tokens and bytes of each source
    with progress("bits per byte", sum(len(document.tokens) - 1 for document in haystack.documents)) as advance:
        for document in haystack.documents:
            nats, first = document_nats(examined, document, length, context, advance), int(document.tokens[0])
            n_bytes = document.n_bytes - (0 if first == marker else len(decode([first]).encode()))
            figures = np.array([nats, len(document.tokens) - 1, n_bytes])
            if document.scored is not None:
                figures = np.array([nats, document.scored[1:].sum(), document.n_bytes])
            sums[document.source] = sums.get(document.source, np.zeros(3)) + figures
    nats, n_tokens, n_bytes = sum(sums.values(), np.zeros(3)).tolist()
    by_source = {name: of[0] / math.log(2) / of[2] for name, of in sums.items()}
    return {
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "nats_per_token": nats / n_tokens,
        "perplexity": math.exp(min(700.0, nats / n_tokens)),
        "bytes_per_token": n_bytes / n_tokens,
        "tokens": int(n_tokens),
        "bytes": int(n_bytes),
        "context": context,
    } | ({"bits_per_byte_by_source": by_source} if len(by_source) > 1 else {})


def by_position(examined: Examined, haystack: Haystack, length: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Bits per token by position in a stretch, in buckets that end half as far again as the last.

    Empty for stretches of a single token.
    """
    if length < 2:
        return []
    from eval.forward import token_nats

    batches = haystack.rows(rows, length, seed).split(max(1, BATCH_TOKENS // length))
    bits = np.concatenate([token_nats(examined, batch) for batch in batches]) / math.log(2)
    edges = sorted({1, *(round(1.5**i) for i in range(64) if 1.5**i < length), length})
    table = []
    for low, high in itertools.pairwise(edges):
        label = str(low) if high == low + 1 else f"{low}–{high - 1}"
        bucket = _mean(bits[:, low - 1 : high - 1].mean(axis=1), rows * (high - low), label)
        table.append(bucket | {"middle": math.sqrt(low * (high - 1))})
    return table


def by_context(examined: Examined, haystack: Haystack, length: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Bits per token of the last TARGETS tokens of each stretch, each given exactly c = 1, 2, 4 ... tokens."""
    import torch

    from eval.forward import last_logits

    table: list[dict[str, Any]] = []
    if length < 2:
        return table
    sample = haystack.rows(rows, length + TARGETS, seed + 1)
    for context in (2**i for i in range(32) if 2**i < length):
        views = [sample[:, -t - context - 1 : sample.shape[1] - t] for t in range(TARGETS)]
        batches = torch.cat(views).split(max(1, BATCH_TOKENS // (context + 1)))
        logits = torch.cat([last_logits(examined, batch[:, :-1]) for batch in batches])
        nats = torch.nn.functional.cross_entropy(logits, torch.cat(views)[:, -1], reduction="none")
        bits = nats.double().numpy().reshape(TARGETS, rows).mean(axis=0) / math.log(2)
        table.append(_mean(bits, TARGETS * rows, str(context)) | {"context": context})
    return table


def _mean(bits: NDArray[np.float64], n: int, label: str) -> dict[str, Any]:
    """Mean of `bits` (stretches,) and its standard error: stretches are independent of each other, tokens are not."""
    error = float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else 0.0
    return {"label": label, "n": n, "bits_per_token": float(bits.mean()), "standard_error": error}


def measure(
    examined: Examined, haystack: Haystack, context: int | None = None, rows: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Everything that loss.json holds. The default context is R, at most 1,024 and half of what the model reads."""
    longest = examined.max_tokens or 1 << 40
    context = context or min(examined.reach or 1024, 1024)
    context = longest // 2 if context + 2 > longest else context
    length = min(longest, 2 * context + 64)
    result = {"seed": seed, "haystack": haystack.name} | bits_per_byte(examined, haystack, length, context)
    # The curves need stretches of one length, so the longest document decides. One of a few tokens allows none.
    curves = min(length, max(len(document.tokens) for document in haystack.documents) - TARGETS)
    result |= {f.__name__: f(examined, haystack, curves, rows, seed) for f in (by_position, by_context)}
    return examined.header() | result


def main() -> None:
    parser = new_parser("loss", __doc__)
    parser.add_argument("--context", type=at_least(1), help="tokens before each scored token; default: R, up to 1,024")
    parser.add_argument("--max-tokens", type=at_least(1), default=200_000, help="tokens to score; default %(default)s")
    parser.add_argument("--rows", type=at_least(1), default=64, help="stretches for both curves; default %(default)s")
    args = parser.parse_args()
    examined, out, text = prepare(args, args.max_tokens)
    result = measure(examined, text, args.context, args.rows, args.seed)
    write_result("loss", result, out, lambda plots: plots.loss_figure([result]))
    print(
        f"{result['bits_per_byte']:.3f} bits per byte on {result['haystack']} ({result['tokens']:,} tokens, "
        f"{result['bytes']:,} bytes). That is {result['nats_per_token']:.3f} nats per token, a perplexity of "
        f"{result['perplexity']:.1f}. Each token had {result['context']:,} tokens of context."
    )
    for name, figure in result.get("bits_per_byte_by_source", {}).items():
        print(f"{figure:.3f} bits per byte on source {name}")


if __name__ == "__main__":
    end_process(cli(main))
