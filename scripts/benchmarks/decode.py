"""Generation against the caches of `transformers`: decoding, prefill, and a stream without end.

Legend: B batch, T tokens.
"""

import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from model.cache import RingCache
from model.config import WindreachConfig
from model.decoder import build_model
from model.errors import UserError
from scripts.benchmarks.peers import mistral_twin, plain_config
from scripts.benchmarks.timing import OURS, Row, Work, alternate, peak_bytes, rows_of, why_not
from scripts.generate import Sampling, stream
from training.settings.schema import Settings

PEERS = ("transformers, dynamic cache", "transformers, static cache")
UNCOMPILED = "ours, not compiled"
PREFILL_WINDOW, PREFILL_LAYERS = 256, 4  # of transformers' sdpa at n = 16,384, four layers take what one can wait for
PREFILL_BESIDE, PREFILL_ALONE = 16_384, (4096, 8192, 16_384, 32_768, 65_536)
THOUSAND = 1000  # tokens, of which the median is taken

# -- decode ------------------------------------------------------------------------------------------------------------


def bench_decode(
    settings: Settings, rounds: int, prompt_tokens: int, new_tokens: int, batches: tuple[int, ...]
) -> list[Row]:
    """`generate` of the same weights, greedy, in float32: our ring against the caches of transformers."""
    config = plain_config(settings)
    ours, uncompiled = (build_model(config, seed=settings.seed).eval() for _ in range(2))
    peer = mistral_twin(ours, "sdpa").eval()
    ours.compile_decoding()
    makers: dict[str, tuple[Any, Callable[[], Any]]] = {
        OURS: (ours, lambda: RingCache(config)),
        PEERS[0]: (peer, lambda: DynamicCache(config=peer.config)),
        PEERS[1]: (peer, lambda: StaticCache(config=peer.config, max_cache_len=prompt_tokens + new_tokens)),
        UNCOMPILED: (uncompiled, lambda: RingCache(config)),
    }
    rows: list[Row] = []
    for batch in batches:
        prompt = _ids(config, batch, prompt_tokens)
        runs = {name: _Generation(*maker, prompt, new_tokens) for name, maker in makers.items()}
        able = {name: run for name, run in runs.items() if not why_not(run)}
        case = f"{settings.name}: {batch} x {new_tokens} tokens after {prompt_tokens}, W {config.sliding_window}"
        found = rows_of(
            "decode", case, runs, rounds, "fp32", limits=dict.fromkeys(PEERS, 3.0),
            held={name: run.held for name, run in able.items()},
        )  # fmt: skip
        rows += [_with_tokens(row, runs) for row in found]
    return rows


def _ids(config: WindreachConfig, *shape: int) -> Tensor:
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


class _Generation:
    """One call of `generate` with a new cache; keeps the tokens and the cache."""

    def __init__(self, model: Any, make: Callable[[], Any], prompt: Tensor, new_tokens: int) -> None:
        self.model, self.make, self.prompt, self.new_tokens = model, make, prompt, new_tokens
        self.tokens: Tensor | None = None

    def __call__(self) -> None:
        self.cache = self.make()
        self.tokens = self.model.generate(
            self.prompt, attention_mask=torch.ones_like(self.prompt), past_key_values=self.cache, do_sample=False,
            min_new_tokens=self.new_tokens, max_new_tokens=self.new_tokens, pad_token_id=0,
        )  # fmt: skip

    @property
    def held(self) -> int:
        """Bytes of keys and values in the cache."""
        both = (x for layer in self.cache.layers for x in (layer.keys, layer.values))
        return sum(x.numel() * x.element_size() for x in both if isinstance(x, Tensor))


def _with_tokens(row: Row, runs: dict[str, _Generation]) -> Row:
    """The row, and whether the peer wrote what we wrote."""
    ours, theirs = runs[OURS].tokens, runs[row.peer].tokens
    if ours is None or theirs is None:
        return row
    return replace(row, case=f"{row.case}, {'same' if torch.equal(ours, theirs) else 'OTHER'} tokens")


# -- prefill -----------------------------------------------------------------------------------------------------------


def bench_prefill(settings: Settings, rounds: int, beside: int, alone: tuple[int, ...]) -> list[Row]:
    """A prompt into the cache, W = 256: beside transformers' sdpa, and ours against n with the peak of bytes alive."""
    config = plain_config(
        settings.model_copy(
            update={
                "model": settings.model.model_copy(
                    update={"sliding_window": PREFILL_WINDOW, "num_hidden_layers": PREFILL_LAYERS}
                )
            }
        )
    )
    ours = build_model(config, seed=settings.seed).eval()
    peer = mistral_twin(ours, "sdpa").eval()
    case = f"{settings.name} with {PREFILL_LAYERS} layers, W {PREFILL_WINDOW}, n="
    ids = _ids(config, 1, beside)
    works = {
        OURS: _prefill(ours, lambda: RingCache(config), ids),
        "transformers sdpa": _prefill(peer, lambda: DynamicCache(config=peer.config), ids),
    }
    rows = rows_of("prefill", f"{case}{beside}", works, rounds, "fp32", limits={"transformers sdpa": 5.0})
    for n in alone:
        work = _prefill(ours, lambda: RingCache(config), _ids(config, 1, n))
        seconds, _ = alternate({OURS: work}, rounds)
        rows.append(
            Row("prefill", f"{case}{n}", "–", seconds[OURS], None, None, None, peak_bytes(work), None, "fp32",
                torch.get_num_threads(), "alone")
        )  # fmt: skip
    return rows


def _prefill(model: Any, make: Callable[[], Any], ids: Tensor) -> Work:
    @torch.inference_mode()
    def work() -> None:
        model(input_ids=ids, past_key_values=make(), use_cache=True, logits_to_keep=1)

    return work


def prefill_growth(rows: list[Row]) -> str:
    """Exponents of our seconds and bytes against n, from the rows that stand alone."""
    alone = [row for row in rows if row.note == "alone"]
    n = np.log([float(row.case.split("n=")[1]) for row in alone])
    columns = [row.ours_s for row in alone], [float(row.ours_bytes or 1) for row in alone]
    time_, held = (np.polyfit(n, np.log(column), 1)[0] for column in columns)
    return f"  ours, prefill: time ~ n^{time_:.2f}, peak bytes ~ n^{held:.2f}"


# -- stream ------------------------------------------------------------------------------------------------------------


def bench_stream(settings: Settings, tokens: int) -> list[Row]:
    """One text of `tokens`: time of a late token beside that of an early one, resident memory beside that at the start.

    Early are the thousand from 2W on, late the last thousand; bytes are those of the process, the most after the
    early ones, and then. The second row has late tokens in turns with the early ones of another text, so that a
    machine that got slower or faster in between hits both alike.
    """
    config = plain_config(settings)
    window = config.sliding_window or 0
    first, end = 2 * window, 2 * window + THOUSAND
    if tokens < end + THOUSAND:
        raise UserError(f"--tokens {tokens}: give at least {end + THOUSAND:,}, to tell late ones from early ones")
    model = build_model(config, seed=settings.seed).eval()
    model.compile_decoding()
    cache = RingCache(config)
    text, other = (
        stream(model, [1], Sampling(0.0, 1.0, torch.Generator()), ring) for ring in (cache, RingCache(config))
    )
    seconds, resident = _times(islice(text, tokens), warm=end)
    row = Row(
        bench="stream",
        case=f"{settings.name}: token {tokens:,}, W {window}, cache {cache.bytes:,} bytes",
        peer=f"tokens {first} to {end}",
        ours_s=statistics.median(seconds[-THOUSAND:]),
        peer_s=statistics.median(seconds[first:end]),
        ratio=None,
        limit=1 / 1.05,
        ours_bytes=max(resident),
        peer_bytes=resident[0],
        dtype="fp32",
        threads=torch.get_num_threads(),
    )
    late, early = _in_turns(text, islice(other, first, None))
    in_turns = replace(
        row, peer=f"{row.peer} of another text, in turns", ours_s=late, peer_s=early, ours_bytes=None, peer_bytes=None
    )
    return [replace(r, ratio=(r.peer_s or 0.0) / r.ours_s) for r in (row, in_turns)]


def _times(tokens: Iterator[int], warm: int) -> tuple[array, list[int]]:
    """Seconds of each token, and the resident bytes at token `warm` and after each thousand from then on."""
    process, seconds, resident = psutil.Process(), array("d"), []
    before = time.perf_counter()
    for index, _ in enumerate(tokens, 1):
        now = time.perf_counter()
        seconds.append(now - before)
        if index >= warm and (index - warm) % THOUSAND == 0:
            resident.append(process.memory_info().rss)
        before = time.perf_counter()
    return seconds, resident


def _in_turns(*texts: Iterator[int]) -> list[float]:
    """Median seconds of the next thousand tokens of each text, one of each in turn."""
    seconds: list[list[float]] = [[] for _ in texts]
    for text in texts:
        next(text)
    for _ in range(THOUSAND):
        for text, past in zip(texts, seconds, strict=True):
            before = time.perf_counter()
            next(text)
            past.append(time.perf_counter() - before)
    return [statistics.median(past) for past in seconds]
