"""A training step beside `MistralForCausalLM`, and beside its products with weights alone.

Legend: E hidden size, I intermediate size, N tokens of a step, T tokens of a row, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import WindreachConfig
from model.decoder import build_model
from model.flops import flops_per_token
from scripts.benchmarks.peers import mistral_twin, plain_config
from scripts.benchmarks.timing import OURS, Row, Work, rows_of
from training.processes.precision import measure
from training.settings.schema import Settings

PEERS = (  # name, attention, compiled
    ("transformers sdpa", "sdpa", False),
    ("transformers sdpa, layers compiled", "sdpa", True),
    ("transformers eager", "eager", False),
    ("transformers eager, layers compiled", "eager", True),
)
PRODUCTS = "products with weights alone"
ASKED = ((8192, 8.0), (1024, 3.0), (0, 2.0))  # from so many tokens a row on, the least ratio to each peer
KEPT = 0.9  # the least share of the rate of short rows that long ones keep
LONGEST = 8192  # tokens a row of the peers: their time grows with the square
SCORES_KEPT = 8 << 30  # bytes of dense scores, kept for the backward pass, beyond which eager is left out


def bench_train(
    settings: Settings,
    precision: str,
    rounds: int,
    rows: int | None = None,
    seq_len: int | None = None,
    only: str | None = None,
) -> list[Row]:
    """Forward, backward and AdamW on one batch: same weights, batch, loss and optimizer for all.

    `only` leaves one peer, by its name in PEERS.
    """
    config, t = plain_config(settings), seq_len or settings.data.seq_len
    rows = rows or max(1, settings.training.tokens_per_step // t)
    batch = torch.randint(config.vocab_size, (rows, t + 1), generator=torch.Generator().manual_seed(0))
    peers = [peer for peer in PEERS if only in (None, peer[0])]
    works = _works(config, batch, precision, settings.seed, peers)
    case = f"{settings.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
    case += f"W {config.sliding_window}, {rows} x {t} tokens a step"
    least = next(ratio for tokens, ratio in ASKED if t >= tokens)
    return rows_of("train", case, works, rounds, precision, limits={name: least for name, _, _ in PEERS})


def bench_long_rows(settings: Settings, precision: str, rounds: int, rows: int, lengths: list[int]) -> list[Row]:
    """What our rate keeps from the shortest rows to the longest: steps over equally many tokens, in turns."""
    config, (short, *_, long) = plain_config(settings), sorted(lengths)
    model = build_model(config, seed=settings.seed).train()
    model.compile_layers()
    one_long, one_short = (
        _step(
            model,
            torch.randint(config.vocab_size, (rows, t + 1), generator=torch.Generator().manual_seed(0)),
            precision,
        )
        for t in (long, short)
    )
    times = long // short
    works = {OURS: one_long, f"{times} steps of {rows} x {short} tokens": lambda: [one_short() for _ in range(times)]}
    return rows_of("train, long rows", f"{settings.name}: {rows} x {long} tokens a step", works, rounds, precision,
                   limits=dict.fromkeys(works, KEPT))  # fmt: skip


def _works(
    config: WindreachConfig, batch: Tensor, precision: str, seed: int, peers: Iterable[tuple[str, str, bool]]
) -> dict[str, Work]:
    rows, t = len(batch), batch.shape[1] - 1
    ours = build_model(config, seed=seed)
    models: dict[str, Any] = {OURS: ours}
    works: dict[str, Work] = {}
    for name, attention, compiled in peers if t <= LONGEST else ():
        if attention == "eager" and (needed := scores_kept(config, rows, t)) > SCORES_KEPT:
            works[name] = _too_large(needed)
            continue
        models[name] = mistral_twin(ours, attention)
        if compiled:
            for layer in models[name].model.layers:
                layer.compile()
    ours.compile_layers()
    steps = {name: _step(model.train(), batch, precision) for name, model in models.items()}
    return steps | works | {PRODUCTS: products(config, rows * t, precision)}


def scores_kept(config: WindreachConfig, rows: int, t: int) -> int:
    """Bytes of the float32 scores and weights that eager attention keeps in all layers."""
    return 2 * 4 * config.num_hidden_layers * rows * config.num_attention_heads * t**2


def _too_large(needed: int) -> Work:
    def work() -> None:
        raise MemoryError(f"its dense scores need {needed / 2**30:.0f} GiB, more than this benchmark allows")

    return work


def _step(model: nn.Module, batch: Tensor, precision: str) -> Work:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].flatten()

    def step() -> None:
        with _autocast(precision):
            logits = model(input_ids=inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def products(config: WindreachConfig, tokens: int, precision: str) -> Work:
    """Every product of a step with a weight, forward and both of the way back, into memory that is there already.

    No step of this model can be faster: attention, norms, loss and optimizer come on top.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = list(weight_shapes(config))
    widths = {n for shape in shapes for n in shape}
    x, out = ({n: torch.randn(tokens, n).to(dtype) for n in widths} for _ in range(2))
    weights, gradients = ({s: torch.randn(s).to(dtype) for s in set(shapes)} for _ in range(2))

    def work() -> None:
        for n, k in shapes:
            torch.mm(x[k], weights[n, k].T, out=out[n])
            torch.mm(x[n], weights[n, k], out=out[k])
            torch.mm(x[n].T, x[k], out=gradients[n, k])

    return work


def weight_shapes(config: WindreachConfig) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of every matrix, queries with keys and values and gate with up as one."""
    e, i = config.hidden_size, config.intermediate_size
    heads, groups = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    for _ in range(config.num_hidden_layers):
        yield from ((heads + 2 * groups, e), (e, heads), (2 * i, e), (e, i))
    yield config.vocab_size, e


def speeds(rows: list[Row], settings: Settings) -> str:
    """The rows of one case in the units people ask for: tokens/s and, for ours, MFU."""
    n_rows, t = (int(part) for part in rows[0].case.split(", ")[-1].split(" tokens")[0].split(" x "))
    tokens, ours = n_rows * t, rows[0].ours_s
    rate = measure(torch.device("cpu")).rate(rows[0].dtype)
    mfu = tokens * flops_per_token(plain_config(settings), t) / ours / rate
    lines = [f"  {OURS}: {tokens / ours:,.0f} tokens/s, MFU {mfu:.1%} of a matmul measured here"]
    lines += [f"  {row.peer}: {tokens / row.peer_s:,.0f} tokens/s" for row in rows if row.peer_s]
    return "\n".join(lines)
