"""Generation beside the caches of `transformers`: decoding, the prompt (prefill), and a long stream."""

from collections.abc import Callable, Sequence
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
from model.decoding import GPU_BLOCK, Sampler, token_blocks
from model.errors import UserError
from scripts.benchmarks.timing import OURS, Row, Setup, Work, compare
from scripts.benchmarks.train import mistral_twin, plain_config
from scripts.generate import stream

PEERS = ("transformers, dynamic cache", "transformers, static cache")
SDPA = "transformers sdpa"
PREFILL_WINDOW, PREFILL_LAYERS = 256, 4  # with more layers transformers takes minutes at n = 16,384
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
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


@dataclass
class Loop(Generation):
    """The same by our own loop, which reads the tokens in blocks."""

    def __call__(self) -> None:
        self.cache = self.new_cache()
        blocks = token_blocks(self.model, self.prompt, Sampler(), self.cache, GPU_BLOCK, self.new_tokens)
        self.tokens = torch.cat((self.prompt, torch.cat(list(blocks), 1).to(self.prompt)), 1)


def bench_decode(
    setup: Setup, prompt_tokens: int, new_tokens: int, batches: Sequence[int], only: str = ""
) -> list[Row]:  # fmt: skip
    """Greedy tokens of the same weights: our ring against the caches of transformers. All use `generate` on a CPU.

    On a GPU ours is the loop of `model.decoding`, and our other ways to decode stand beside it. `only` names the one
    peer to keep.
    """
    settings, config, dtype = setup.settings, plain_config(setup.settings), dtype_of(setup)
    compiled, recorded, plain = (build_model(config, seed=settings.seed) for _ in range(3))
    peer: Any = mistral_twin(compiled, "sdpa")
    for model in (compiled, recorded, plain, peer):
        model.to(setup.device, dtype).eval()
    compiled.compile_decoding()
    ring = partial(RingCache, config)
    contestants: dict[str, tuple[type[Generation], Any, Callable[[], Any]]] = {
        OURS: (Loop if setup.on_gpu else Generation, compiled, ring),
        PEERS[0]: (Generation, peer, lambda: DynamicCache(config=peer.config)),
        PEERS[1]: (Generation, peer, lambda: StaticCache(config=peer.config, max_cache_len=prompt_tokens + new_tokens)),
        "ours, not compiled": (Generation, plain, ring),
    }
    if setup.on_gpu:
        contestants["ours, recorded, not compiled"] = Loop, recorded, ring
        contestants["ours, by generate"] = Generation, compiled, ring
    contestants = {name: contestant for name, contestant in contestants.items() if only in ("", name) or name == OURS}
    rows, limits = list[Row](), {PEERS[0]: 10.0} if setup.on_gpu else dict.fromkeys(PEERS, 3.0)
    for batch in batches:
        prompt = _ids(setup, config.vocab_size, batch, prompt_tokens)
        runs = {name: way(m, cache, prompt, new_tokens) for name, (way, m, cache) in contestants.items()}
        case = f"{settings.name}: {batch} x {new_tokens} tokens after {prompt_tokens}, W {config.sliding_window}"
        for row in compare("decode", case, runs, setup.rounds, PRECISIONS[dtype], limits, Generation.cache_bytes):
            same = row.peer_s and torch.equal(runs[OURS].tokens, runs[row.peer].tokens)
            rows.append(replace(row, case=case if row.note else f"{case}, {'same' if same else 'OTHER'} tokens"))
    return rows


def dtype_of(setup: Setup) -> torch.dtype:
    """That of the weights: float32 on a CPU, the chosen precision on a GPU."""
    return torch.bfloat16 if setup.on_gpu and setup.precision == "bf16" else torch.float32


def _ids(setup: Setup, vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(setup.device)


def bench_prefill(setup: Setup, lengths: Sequence[int], beside: int) -> list[Row]:
    """A prompt read into the cache, W = 256: ours alone at several lengths, with sdpa at `beside` tokens."""
    settings, smaller = setup.settings, {"sliding_window": PREFILL_WINDOW, "num_hidden_layers": PREFILL_LAYERS}
    config = plain_config(settings.model_copy(update={"model": settings.model.model_copy(update=smaller)}))
    ours, dtype = build_model(config, seed=settings.seed), dtype_of(setup)
    peer: Any = mistral_twin(ours, "sdpa")
    for model in (ours, peer):
        model.to(setup.device, dtype).eval()
    rows: list[Row] = []
    for n in lengths:
        ids = _ids(setup, config.vocab_size, 1, n)
        works: dict[str, Work] = {OURS: partial(_prefill, ours, lambda: RingCache(config), ids)}
        if n == beside:
            works[SDPA] = partial(_prefill, peer, lambda: DynamicCache(config=peer.config), ids)
        case = f"{settings.name} with {PREFILL_LAYERS} layers, W {PREFILL_WINDOW}, n={n}"
        rows += compare("prefill", case, works, setup.rounds, PRECISIONS[dtype], {SDPA: 5.0}, setup.peak_bytes)
    return rows


@torch.inference_mode()
def _prefill(model: Any, new_cache: Callable[[], Any], ids: Tensor) -> None:
    model(input_ids=ids, past_key_values=new_cache(), use_cache=True, logits_to_keep=1)


def bench_stream(setup: Setup, tokens: int) -> list[Row]:
    """Tokens after `tokens` tokens of one text, in turns with tokens of another text from token 2W on.

    Bytes are the memory of the process, on a GPU that of the device: the most while the first text is written, and
    after its first tokens.
    """
    settings, config = setup.settings, plain_config(setup.settings)
    first = 2 * (config.sliding_window or 0)
    end = first + THOUSAND
    if tokens < end + THOUSAND:
        raise UserError(f"--tokens {tokens}: give at least {end + THOUSAND:,}, to compare late tokens with early ones")
    model, dtype = build_model(config, seed=settings.seed).to(setup.device, dtype_of(setup)).eval(), dtype_of(setup)
    model.compile_decoding()
    cache, held = RingCache(config), []
    text, other = (stream(model, [1], Sampler(), c) for c in (cache, RingCache(config)))
    for n, _ in enumerate(islice(text, tokens), 1):
        if n >= end and (n - end) % THOUSAND == 0:
            held.append(held_bytes(setup.device))
    next(islice(other, first - 1, None))
    case = f"{settings.name}: token {tokens:,}, W {config.sliding_window}, cache {cache.bytes:,} bytes"
    peer = f"tokens {first} to {end} of another text"
    works: dict[str, Work] = {OURS: partial(next, text), peer: partial(next, other)}
    (row,) = compare("stream", case, works, THOUSAND, PRECISIONS[dtype], {peer: 1 / 1.05})
    return [replace(row, ours_bytes=max(held), peer_bytes=held[0])]


def held_bytes(device: torch.device) -> int:
    """Bytes that the process holds: on a GPU those of its memory, else the resident ones."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
