"""A training step beside that of `MistralForCausalLM`, and beside the step's matrix products with weights alone.

Legend: E hidden size, I intermediate size, T tokens of a sequence.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import WindreachConfig
from model.decoder import build_model
from model.flops import flops_per_token
from scripts.benchmarks import TRAINING_PEERS
from scripts.benchmarks.peers import mistral_twin, plain_config
from scripts.benchmarks.timing import OURS, Row, Setup, Work, check_scores, compare
from training.processes.precision import DTYPES, measure

PRODUCTS = "products with weights alone"
LIMITS = ((8192, 8.0), (1024, 3.0), (0, 2.0))  # from this T on, the least ratio to each peer that is aimed at
LIMIT_OF_RATE = 0.9  # the least share of its tokens/s that our step is to keep from short to long sequences
LONGEST = 8192  # T beyond which transformers is left out: its time grows with the square
SCORES_LIMIT = 8 << 30  # bytes of attention scores kept for the backward pass beyond which eager is left out


def bench_train(setup: Setup, rows: int | None = None, seq_len: int | None = None, only: str = "") -> list[Row]:
    """Forward, backward and AdamW on one batch; weights, batch, loss and optimizer are the same for all.

    `rows` is the batch size. `only` is the name of the one transformers peer to keep.
    """
    settings, config = setup.settings, plain_config(setup.settings)
    t = seq_len or settings.data.seq_len
    rows = rows or max(1, settings.training.tokens_per_step // t)
    ours = build_model(config, seed=settings.seed).to(setup.device)
    models: dict[str, nn.Module] = {OURS: ours}
    refusals: dict[str, Work] = {}
    for name, (attention, compiled) in TRAINING_PEERS.items():
        if t > LONGEST or (only and name != only):
            continue
        if attention == "eager" and (size := scores_kept(config, rows, t)) > SCORES_LIMIT:
            refusals[name] = partial(check_scores, size, SCORES_LIMIT)
            continue
        models[name] = twin = mistral_twin(ours, attention)
        if compiled:
            for layer in twin.model.layers:
                layer.compile()
    ours.compile_layers()
    batch = _batch(setup, config, rows, t)
    steps: dict[str, Work] = {name: training_step(model, batch, setup.precision) for name, model in models.items()}
    works = steps | refusals | {PRODUCTS: products(config, rows * t, setup)}
    case = f"{settings.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
    case += f"W {config.sliding_window}, {rows} x {t} tokens a step"
    limit = next(ratio for tokens, ratio in LIMITS if t >= tokens)
    return compare("train", case, works, setup.rounds, setup.precision, dict.fromkeys(TRAINING_PEERS, limit))


def bench_long_rows(setup: Setup, rows: int, lengths: list[int]) -> list[Row]:
    """One step with the longest sequences beside as many steps with the shortest as have the same number of tokens."""
    config, short, long = plain_config(setup.settings), min(lengths), max(lengths)
    model = build_model(config, seed=setup.settings.seed).to(setup.device)
    model.compile_layers()
    batches = [_batch(setup, config, rows, t) for t in (long, short)]
    long_step, short_step = (training_step(model, batch, setup.precision) for batch in batches)
    times = long // short
    peer = f"{times} steps of {rows} x {short} tokens"
    works: dict[str, Work] = {OURS: long_step, peer: lambda: [short_step() for _ in range(times)]}
    case = f"{setup.settings.name}: {rows} x {long} tokens a step"
    return compare("train, long rows", case, works, setup.rounds, setup.precision, {peer: LIMIT_OF_RATE})


def _batch(setup: Setup, config: WindreachConfig, rows: int, t: int) -> Tensor:
    return torch.randint(config.vocab_size, (rows, t + 1), generator=torch.Generator().manual_seed(0)).to(setup.device)


def scores_kept(config: WindreachConfig, rows: int, t: int) -> int:
    """Bytes of the float32 scores and probabilities that eager attention keeps for the backward pass in all layers."""
    return 2 * 4 * config.num_hidden_layers * rows * config.num_attention_heads * t**2


def training_step(model: Any, batch: Tensor, precision: str) -> Work:
    """One optimizer step on `batch` (rows, T + 1), as a function without arguments."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].flatten()

    def step() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def products(config: WindreachConfig, tokens: int, setup: Setup) -> Work:
    """All matrix products of a step with weights, forward and backward, into memory that is allocated beforehand.

    No step of this model can be faster: attention, norms, loss and optimizer add to it.
    """
    shapes, dtype, device = weight_shapes(config), DTYPES[setup.precision], setup.device
    widths = {n for shape in shapes for n in shape}
    x, out = ({n: torch.randn(tokens, n).to(device, dtype) for n in widths} for _ in range(2))
    weights, gradients = ({s: torch.randn(s).to(device, dtype) for s in set(shapes)} for _ in range(2))

    def work() -> None:
        for n, k in shapes:
            torch.mm(x[k], weights[n, k].T, out=out[n])
            torch.mm(x[n], weights[n, k], out=out[k])
            torch.mm(x[n].T, x[k], out=gradients[n, k])

    return work


def weight_shapes(config: WindreachConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every matrix; q, k, v are one matrix, and so are gate and up."""
    e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = [((heads + 2 * kv_heads) * d, e), (e, heads * d), (2 * i, e), (e, i)]
    return layer * config.num_hidden_layers + [(config.vocab_size, e)]


def speeds(rows: list[Row], setup: Setup) -> Iterator[str]:
    """A line for each side of one case with its tokens per second; for ours with the MFU."""
    batch, t = (int(number) for number in rows[0].case.split(", ")[-1].removesuffix(" tokens a step").split(" x "))
    tokens, ours = batch * t, rows[0].ours_s
    rate = measure(setup.device).rate(setup.precision)
    mfu = tokens * flops_per_token(plain_config(setup.settings), t) / ours / rate
    yield f"  {OURS}: {tokens / ours:,.0f} tokens/s, MFU {mfu:.1%} of a matmul measured here"
    for row in rows:
        if row.peer_s:
            yield f"  {row.peer}: {tokens / row.peer_s:,.0f} tokens/s"
