"""Generation beside the caches of `transformers`: decoding, the prompt (prefill), and a long stream."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from model.cache import RingCache
from model.decoder import build_model
from model.errors import UserError
from scripts.benchmarks.timing import OURS, Row, Setup, Work, compare, peak_bytes
from scripts.benchmarks.train import mistral_twin, plain_config
from scripts.generate import stream

PEERS = ("transformers, dynamic cache", "transformers, static cache")
SDPA = "transformers sdpa"
PREFILL_WINDOW, PREFILL_LAYERS = 256, 4  # with more layers transformers takes minutes at n = 16,384
THOUSAND = 1000  # tokens whose median time is reported


@dataclass
class Generation:
    """A call of `generate` with a new cache; keeps the tokens and the cache of the last call."""

    model: Any
    new_cache: Callable[[], Any]
    prompt: Tensor  # (batch, tokens)
    new_tokens: int

    def __call__(self) -> None:
        self.cache = self.new_cache()
        self.tokens = self.model.generate(
            self.prompt, attention_mask=torch.ones_like(self.prompt), past_key_values=self.cache, do_sample=False,
            min_new_tokens=self.new_tokens, max_new_tokens=self.new_tokens, pad_token_id=0,
        )  # fmt: skip

    def cache_bytes(self) -> int:
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))


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
        "ours, not compiled": (uncompiled, lambda: RingCache(config)),
    }
    rows, limits = list[Row](), dict.fromkeys(PEERS, 3.0)
    for batch in batches:
        prompt = _ids(setup, config.vocab_size, batch, prompt_tokens)
        runs = {name: Generation(*contestant, prompt, new_tokens) for name, contestant in contestants.items()}
        case = f"{settings.name}: {batch} x {new_tokens} tokens after {prompt_tokens}, W {config.sliding_window}"
        for row in compare("decode", case, runs, setup.rounds, "fp32", limits, Generation.cache_bytes):
            same = row.peer_s and torch.equal(runs[OURS].tokens, runs[row.peer].tokens)
            rows.append(replace(row, case=case if row.note else f"{case}, {'same' if same else 'OTHER'} tokens"))
    return rows


def _ids(setup: Setup, vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(setup.device)


def bench_prefill(setup: Setup, lengths: list[int], beside: int) -> list[Row]:
    """A prompt read into the cache, W = 256: ours alone at several lengths, with sdpa at `beside` tokens."""
    settings, smaller = setup.settings, {"sliding_window": PREFILL_WINDOW, "num_hidden_layers": PREFILL_LAYERS}
    config = plain_config(settings.model_copy(update={"model": settings.model.model_copy(update=smaller)}))
    ours = build_model(config, seed=settings.seed).to(setup.device).eval()
    peer = mistral_twin(ours, "sdpa").eval()
    rows: list[Row] = []
    for n in lengths:
        ids = _ids(setup, config.vocab_size, 1, n)
        works: dict[str, Work] = {OURS: partial(_prefill, ours, lambda: RingCache(config), ids)}
        if n == beside:
            works[SDPA] = partial(_prefill, peer, lambda: DynamicCache(config=peer.config), ids)
        case = f"{settings.name} with {PREFILL_LAYERS} layers, W {PREFILL_WINDOW}, n={n}"
        rows += compare("prefill", case, works, setup.rounds, "fp32", {SDPA: 5.0}, peak_bytes)
    return rows


@torch.inference_mode()
def _prefill(model: Any, new_cache: Callable[[], Any], ids: Tensor) -> None:
    model(input_ids=ids, past_key_values=new_cache(), use_cache=True, logits_to_keep=1)


def bench_stream(setup: Setup, tokens: int) -> list[Row]:
    """Tokens after `tokens` tokens of one text, in turns with tokens of another text from token 2W on.

    Bytes are the resident memory of the process: the most while the first text is written, and after its first tokens.
    """
    settings, config = setup.settings, plain_config(setup.settings)
    first = 2 * (config.sliding_window or 0)
    end = first + THOUSAND
    if tokens < end + THOUSAND:
        raise UserError(f"--tokens {tokens}: give at least {end + THOUSAND:,}, to compare late tokens with early ones")
    model = build_model(config, seed=settings.seed).to(setup.device).eval()
    model.compile_decoding()
    cache, process, resident = RingCache(config), psutil.Process(), []
    text, other = (stream(model, [1], lambda logits: int(logits.argmax()), c) for c in (cache, RingCache(config)))
    for n, _ in enumerate(islice(text, tokens), 1):
        if n >= end and (n - end) % THOUSAND == 0:
            resident.append(process.memory_info().rss)
    next(islice(other, first - 1, None))
    case = f"{settings.name}: token {tokens:,}, W {config.sliding_window}, cache {cache.bytes:,} bytes"
    peer = f"tokens {first} to {end} of another text"
    works: dict[str, Work] = {OURS: partial(next, text), peer: partial(next, other)}
    (row,) = compare("stream", case, works, THOUSAND, "fp32", {peer: 1 / 1.05})
    return [replace(row, ours_bytes=max(resident), peer_bytes=resident[0])]
