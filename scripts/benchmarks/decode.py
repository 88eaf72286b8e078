"""Generation beside the caches of `transformers`: decoding, the prompt (prefill), and a long stream.

Legend: B batch, T tokens.
"""

import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from model.cache import RingCache
from model.config import WindreachConfig
from model.decoder import build_model
from model.errors import UserError
from scripts.benchmarks.peers import mistral_twin, plain_config
from scripts.benchmarks.timing import OURS, Row, Setup, Work, compare, peak_bytes
from scripts.generate import Sampling, stream

PEERS = ("transformers, dynamic cache", "transformers, static cache")
UNCOMPILED = "ours, not compiled"
SDPA = "transformers sdpa"
PREFILL_WINDOW, PREFILL_LAYERS = 256, 4  # with more layers transformers takes minutes at n = 16,384
THOUSAND = 1000  # tokens whose median time is reported


def bench_decode(setup: Setup, prompt_tokens: int, new_tokens: int, batches: list[int]) -> list[Row]:
    """Greedy `generate` of the same weights in float32: our ring against the caches of transformers."""
    settings, config = setup.settings, plain_config(setup.settings)
    ours, uncompiled = (build_model(config, seed=settings.seed).to(setup.device).eval() for _ in range(2))
    peer = mistral_twin(ours, "sdpa").eval()
    ours.compile_decoding()
    contestants: dict[str, tuple[Any, Callable[[], Any]]] = {
        OURS: (ours, lambda: RingCache(config)),
        PEERS[0]: (peer, lambda: DynamicCache(config=peer.config)),
        PEERS[1]: (peer, lambda: StaticCache(config=peer.config, max_cache_len=prompt_tokens + new_tokens)),
        UNCOMPILED: (uncompiled, lambda: RingCache(config)),
    }
    rows: list[Row] = []
    for batch in batches:
        prompt = _ids(setup, config, batch, prompt_tokens)
        runs = {name: Generation(*contestant, prompt, new_tokens) for name, contestant in contestants.items()}
        case = f"{settings.name}: {batch} x {new_tokens} tokens after {prompt_tokens}, W {config.sliding_window}"
        limits = dict.fromkeys(PEERS, 3.0)
        timed = compare("decode", case, runs, setup.rounds, "fp32", limits, Generation.cache_bytes)
        rows += [replace(row, case=f"{case}{_agreement(runs[OURS], runs[row.peer])}") for row in timed]
    return rows


def _ids(setup: Setup, config: WindreachConfig, *shape: int) -> Tensor:
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(setup.device)


class Generation:
    """A call of `generate` with a new cache; keeps the tokens and the cache of the last call."""

    def __init__(self, model: Any, new_cache: Callable[[], Any], prompt: Tensor, new_tokens: int) -> None:
        self.model, self.new_cache, self.prompt, self.new_tokens = model, new_cache, prompt, new_tokens
        self.tokens: Tensor | None = None

    def __call__(self) -> None:
        self.cache = self.new_cache()
        self.tokens = self.model.generate(
            self.prompt, attention_mask=torch.ones_like(self.prompt), past_key_values=self.cache, do_sample=False,
            min_new_tokens=self.new_tokens, max_new_tokens=self.new_tokens, pad_token_id=0,
        )  # fmt: skip

    def cache_bytes(self) -> int:
        """Bytes of the keys and values in the cache."""
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def _agreement(ours: Generation, peer: Generation) -> str:
    if ours.tokens is None or peer.tokens is None:
        return ""
    return ", same tokens" if torch.equal(ours.tokens, peer.tokens) else ", OTHER tokens"


def bench_prefill(setup: Setup, beside: int, alone: list[int]) -> tuple[list[Row], list[Row]]:
    """A prompt read into the cache, W = 256: `beside` tokens beside sdpa; and ours alone at several lengths."""
    settings, smaller = setup.settings, {"sliding_window": PREFILL_WINDOW, "num_hidden_layers": PREFILL_LAYERS}
    config = plain_config(settings.model_copy(update={"model": settings.model.model_copy(update=smaller)}))
    ours = build_model(config, seed=settings.seed).to(setup.device).eval()
    peer = mistral_twin(ours, "sdpa").eval()
    case = f"{settings.name} with {PREFILL_LAYERS} layers, W {PREFILL_WINDOW}, n="

    def ours_on(n: int) -> Work:
        return partial(_prefill, ours, lambda: RingCache(config), _ids(setup, config, 1, n))

    theirs: Work = partial(_prefill, peer, lambda: DynamicCache(config=peer.config), _ids(setup, config, 1, beside))
    works = {OURS: ours_on(beside), SDPA: theirs}
    compared = compare("prefill", f"{case}{beside}", works, setup.rounds, "fp32", {SDPA: 5.0})
    single: list[Row] = []
    for n in alone:
        single += compare("prefill", f"{case}{n}", {OURS: ours_on(n)}, setup.rounds, "fp32", bytes_of=peak_bytes)
    return compared, single


@torch.inference_mode()
def _prefill(model: Any, new_cache: Callable[[], Any], ids: Tensor) -> None:
    model(input_ids=ids, past_key_values=new_cache(), use_cache=True, logits_to_keep=1)


def bench_stream(setup: Setup, tokens: int) -> list[Row]:
    """One text of `tokens` tokens: time of the last thousand beside the thousand from token 2W on, and memory.

    Bytes are the resident memory of the process: the most after the early tokens, and right after them. The second
    row times late tokens in turns with early tokens of another text, because the machine's speed drifts in between.
    """
    settings, config = setup.settings, plain_config(setup.settings)
    window = config.sliding_window or 0
    first, end = 2 * window, 2 * window + THOUSAND
    if tokens < end + THOUSAND:
        raise UserError(f"--tokens {tokens}: give at least {end + THOUSAND:,}, to compare late tokens with early ones")
    model = build_model(config, seed=settings.seed).to(setup.device).eval()
    model.compile_decoding()
    cache, sampling = RingCache(config), Sampling(0.0, 1.0, torch.Generator())
    text, other = (stream(model, [1], sampling, ring) for ring in (cache, RingCache(config)))
    process, resident = psutil.Process(), array("q")

    def watch(n: int) -> None:
        if n >= end and (n - end) % THOUSAND == 0:
            resident.append(process.memory_info().rss)

    (seconds,) = token_times(text, tokens=tokens, after_each=watch)
    deque(islice(other, first), maxlen=0)
    case = f"{settings.name}: token {tokens:,}, W {window}, cache {cache.bytes:,} bytes"

    def row(peer: str, late: Sequence[float], early: Sequence[float], most: int | None, least: int | None) -> Row:
        ours, theirs, threads = statistics.median(late), statistics.median(early), torch.get_num_threads()
        return Row("stream", case, peer, ours, theirs, theirs / ours, 1 / 1.05, most, least, "fp32", threads)

    late, early = token_times(text, other, tokens=THOUSAND + 1)
    peer = f"tokens {first} to {end}"
    return [
        row(peer, seconds[-THOUSAND:], seconds[first:end], max(resident), resident[0]),
        row(f"{peer} of another text, in turns", late[1:], early[1:], None, None),
    ]


def token_times(*texts: Iterator[int], tokens: int, after_each: Callable[[int], None] = lambda n: None) -> list[array]:
    """Seconds of each of the next `tokens` tokens of each text; the texts take turns, token by token.

    `after_each` is called with the number of tokens so far; its time is not counted.
    """
    seconds = [array("d") for _ in texts]
    for n in range(1, tokens + 1):
        for text, times in zip(texts, seconds, strict=True):
            before = time.perf_counter()
            next(text)
            times.append(time.perf_counter() - before)
        after_each(n)
    return seconds
