"""Everything that receipt.json holds: recall, bits per byte, relay, cache and speed of each state.

All states read the same items and the same text. A difference is paired: it is taken item by item, or token by token,
from the first state, the original.

Legend: N scored tokens, S states, C contexts.
"""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.tasks.vocabulary import recall_vocabulary
from eval import relay, streams
from eval.command import progress
from eval.haystack import Haystack
from eval.models import Examined
from eval.needs.measure import (
    bootstrap,
    draw_excerpts,
    interval,
    nats_with_context,
    units_of,
    windows_of,
)
from eval.receipt import recall
from eval.receipt.recall import Probe, Right
from model import windows
from model.cache import RingCache
from model.flops import cache_bytes
from model.windows import LayerSpec

EXCERPTS = 10  # of the text, at least: the longest context is read once for each
CACHE_TOKENS = 4096, 32_768, 131_072
RELAY_TEXTS, RELAY_VALUES = 48, 4  # a probe is fitted on half of the texts
RELAY_LONGEST, RELAY_COLUMNS = 256, 16  # tokens behind the value
ROUNDS, ROUND_TOKENS = 5, 16  # of decoding; the median round counts


def facts(examined: Examined) -> dict[str, Any]:
    """What a state is, and what its cache takes."""
    kinds = Counter(kind_of(spec) for spec in examined.specs)
    return {
        "model": examined.name, "sha256": examined.sha256, "window": examined.window, "reach": examined.reach,
        "kinds": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "cache_bytes": [cache_bytes(examined.model.config, length=n) for n in CACHE_TOKENS],
    }  # fmt: skip


def kind_of(spec: LayerSpec) -> str:
    """
    >>> kind_of(LayerSpec("sliding", window=64, global_tokens=4))
    'sliding W = 64 with 4 global tokens'
    """
    text = spec.kind + (f" W = {spec.window:,}" if spec.window else "")
    extras = [f"{spec.global_tokens:,} global tokens"] * bool(spec.global_tokens) + ["a sink"] * spec.sink
    return text + (f" with {' and '.join(extras)}" if extras else "")


def measure_recall(states: Mapping[str, Examined], probes: Sequence[Probe], most: int) -> dict[str, Any]:
    """For each task its chance and a row for each distance with `recall.row_of` and the difference of each state."""
    read = sum((recall.LEAD + p.distances[-1]) * min(most, recall.FIRST) for p in probes) * len(states)
    tasks = {}
    with progress("recall", read) as advance:
        for probe in probes:
            right = {name: recall.measure(examined, probe, most, advance) for name, examined in states.items()}
            tasks[probe.name] = {"chance": probe.chance, "rows": recall_rows(right)}
    return tasks


def recall_rows(right: Mapping[str, Right]) -> list[dict[str, Any]]:
    """One row for each distance: n, correct, accuracy, low, high and the paired difference of each state."""
    original = next(iter(right.values()))
    return [
        {
            "distance": distance,
            "states": {
                name: recall.row_of(of[distance]) | {"difference": recall.paired(first, of[distance])}
                for name, of in right.items()
            },
        }
        for distance, first in original.items()
    ]


def measure_text(
    states: Mapping[str, Examined], haystack: Haystack, contexts: Sequence[int], budget: int, seed: int
) -> dict[str, Any]:
    """Bits per byte of the same tokens with each context, and the difference from the original, with 95 % intervals."""
    length = max(1, min(contexts[-1] // 8, budget // EXCERPTS))
    excerpts = draw_excerpts(haystack.documents, length, budget, [seed, 23])
    unit, units = units_of(haystack.name, excerpts)
    read = len(states) * sum(w.end - w.start for c in contexts for w in windows_of(excerpts, c))
    with progress("bits per byte", read) as advance:
        nats_sc = [[nats_with_context(e, excerpts, c, advance) for c in contexts] for e in states.values()]
    sizes = next(iter(states.values())).tokenizer.token_bytes()
    n_bytes = np.concatenate([sizes[e.tokens[e.first : e.end]] for e in excerpts]).astype(float)
    columns = np.concatenate([np.array(nats_sc).reshape(-1, len(n_bytes)) / np.log(2), n_bytes[None]]).T
    sums = bootstrap(columns, units, [seed, 23])  # (1 + resamples, S C + 1)
    bits = (sums[:, :-1] / sums[:, -1:]).reshape(len(sums), len(states), len(contexts))
    return {
        "tokens": len(n_bytes), "bytes": int(n_bytes.sum()), "unit": unit, "units": len(np.unique(units)),
        "contexts": list(contexts),
        "states": {name: text_row(bits[:, s], bits[:, 0]) for s, name in enumerate(states)},
    }  # fmt: skip


def text_row(bits: NDArray[np.float64], original: NDArray[np.float64]) -> dict[str, Any]:
    """[value, low, high] of each context, from statistics (1 + resamples, C); `ratio` is to the original.

    `gain` is what the longest context saves over the shortest. Training on similar text lowers all contexts alike, but
    not the gain.
    """
    gain, gain_before = (of[:, 0] - of[:, -1] for of in (bits, original))
    return {
        "bits_per_byte": [interval(column) for column in bits.T],
        "difference": [interval(column) for column in (bits - original).T],
        "ratio": [interval(column) for column in (bits / original).T],
        "gain": interval(gain),
        "gain_difference": interval(gain - gain_before),
    }


def measure_relay(states: Mapping[str, Examined], haystack: Haystack, longest: int, seed: int) -> dict[str, Any]:
    """After which layer, and how far behind it, a linear probe reads the value; the same texts for all states."""
    first = next(iter(states.values()))
    vocabulary, longest = recall_vocabulary(first.tokenizer, RELAY_VALUES), min(longest, RELAY_LONGEST)
    offsets = sorted({max(1, round(longest * i / RELAY_COLUMNS)) for i in range(RELAY_COLUMNS + 1)})
    texts = streams.make_texts(haystack, vocabulary, RELAY_TEXTS, recall.LEAD, longest, seed)
    read = streams.linear_probe(texts.labels, RELAY_VALUES)
    at, maps = [texts.value_at + offset for offset in offsets], {}
    with progress("relay", len(states)) as advance:
        for name, examined in states.items():
            hidden = streams.streams(examined, texts.first, at, range(examined.layers + 1))
            read_kdn = torch.stack([read(hidden[:, d]) for d in range(len(at))], dim=1)
            shares = (read_kdn == texts.labels[-read_kdn.shape[-1] :]).float().mean(-1).tolist()
            limits = [0, *(windows.reach(examined.specs[:layers]) for layers in range(1, examined.layers + 1))]
            maps[name] = {"accuracy": shares, "frontier": limits, "front": relay.front(shares, offsets)}
            advance(1)
    return {"offsets": offsets, "n": RELAY_TEXTS // 2, "chance": 1 / RELAY_VALUES, "states": maps}


@torch.inference_mode()
def measure_decoding(states: Mapping[str, Examined], haystack: Haystack, length: int, seed: int) -> dict[str, Any]:
    """Tokens a second behind a text of `length` tokens: the median of rounds, which the states run in turn."""
    caches, seconds = {}, {name: list[float]() for name in states}
    newest = torch.tensor([[1]])
    for name, examined in states.items():
        ids = haystack.rows(1, length, seed).to(examined.device)
        caches[name] = RingCache(examined.model.config)
        examined.model(input_ids=ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
    for _ in range(ROUNDS):
        for name, examined in states.items():
            start = time.perf_counter()
            for _ in range(ROUND_TOKENS):
                logits = examined.model(
                    input_ids=newest, past_key_values=caches[name], use_cache=True, logits_to_keep=1
                ).logits
                newest = logits[:, -1].argmax(-1)[:, None]
            seconds[name].append((time.perf_counter() - start) / ROUND_TOKENS)
    speeds = {name: sorted(1 / s for s in of) for name, of in seconds.items()}
    return {
        "length": length, "rounds": ROUNDS, "tokens": ROUND_TOKENS,
        "states": {name: [statistics.median(of), of[0], of[-1]] for name, of in speeds.items()},
    }  # fmt: skip
