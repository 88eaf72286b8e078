"""Side-by-side timings: ours against the peers installed, alternating in one process, medians.

    python scripts/bench.py train                                  a training step of configs/quickstart.yaml
    python scripts/bench.py train --config configs/small.yaml
    python scripts/bench.py attention --plot attention.png         against length and window, with fitted exponents
    python scripts/bench.py decode                                 token-by-token generation
    python scripts/bench.py prefill                                a prompt into the cache, W = 256
    python scripts/bench.py stream --tokens 131072                 late tokens beside early ones (minutes; not in all)
    python scripts/bench.py all --json bench.json

`ratio` is the peer's seconds divided by ours: above 1 we are faster. A peer that can't run says why. Bytes are the most
that was alive at once on top of the inputs (attention, prefill), the keys and values held (decode), or those of the
process (stream).
Legend: B batch, T tokens, H heads, G kv heads, D head size, V vocabulary.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.mistral.modeling_mistral import eager_attention_forward
from transformers.utils import logging as transformers_logging

from model.attention import attend
from model.decoder import build_model
from model.errors import UserError, cli
from model.places import Places
from model.windows import LayerSpec, visible
from scripts.bench_decode import (
    PREFILL_ALONE,
    PREFILL_BESIDE,
    bench_decode,
    bench_prefill,
    bench_stream,
    prefill_growth,
)
from scripts.peers import mistral_twin, plain_config
from scripts.timing import OURS, Row, Work, alternate, peak_bytes, rows_of, why_not
from training.config_file import load_settings
from training.precision import measure, set_up_threads
from training.settings import Settings

# -- train -------------------------------------------------------------------------------------------------------------


def bench_train(settings: Settings, precision: str, rounds: int, rows: int | None = None) -> list[Row]:
    """Forward, backward and AdamW on one text batch of the config: same weights, batch, loss and optimizer for all."""
    config = plain_config(settings)
    tokens, seq_len = settings.training.tokens_per_step, settings.data.seq_len
    rows = rows or max(1, tokens // seq_len)
    batch = torch.randint(config.vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    ours = build_model(config, seed=settings.seed)
    models: dict[str, Any] = {OURS: ours}
    for name, attention, compiled in PEERS_OF_TRAINING:
        models[name] = mistral_twin(ours, attention)
        if compiled:
            for layer in models[name].model.layers:
                layer.compile()
    ours.compile_layers()
    works = {name: _training_step(model.train(), batch, precision) for name, model in models.items()}
    case = (
        f"{settings.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, W {config.sliding_window}, "
    )
    case += f"{rows} x {seq_len} tokens a step"
    return rows_of("train", case, works, rounds, precision, limits={"transformers sdpa": 2.0})


PEERS_OF_TRAINING = (
    ("transformers sdpa", "sdpa", False),
    ("transformers sdpa, layers compiled", "sdpa", True),
    ("transformers eager", "eager", False),
)


def _training_step(model: nn.Module, batch: Tensor, precision: str) -> Work:
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


# -- attention ---------------------------------------------------------------------------------------------------------

LENGTHS, WINDOW = (512, 1024, 2048, 4096), 64
WINDOWS, LENGTH = (16, 32, 64, 128, 256, 512), 2048
LONG = (4096, 8192, 16_384, 32_768, 65_536)
SCORES_LIMIT = 2 << 30  # bytes of a dense score matrix beyond which a peer is left out
CAUSAL, DENSE = "sdpa, causal, no window", "sdpa, dense window mask"


@dataclass(frozen=True)
class Shape:
    """One attention call: `n` tokens under a window."""

    n: int
    window: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32

    @property
    def gain(self) -> float:
        """Pairs that a causal mask scores over those that the window does: the most that a window can win."""
        n, w = self.n, min(self.window, self.n)
        return (n * (n + 1) / 2) / (n * w - w * (w - 1) / 2)


ASKED = (  # shape, peer, least ratio of forward + backward
    (Shape(16_384, 4096, heads=2, kv_heads=2, head_dim=128), CAUSAL, 2.0),
    (Shape(16_384, 512, heads=2, kv_heads=2, head_dim=128), CAUSAL, 8.0),
    (Shape(2048, 64, batch=4, heads=4, kv_heads=4, head_dim=64), DENSE, 4.0),
)


def bench_attention(precision: str, rounds: int, lengths: tuple[int, ...], windows: tuple[int, ...]) -> list[Row]:
    """One layer's attention, forward and forward + backward: lengths at one window, windows at one length."""
    middle = LENGTH if LENGTH in lengths else lengths[-1]
    shapes = [Shape(n, WINDOW) for n in lengths] + [Shape(middle, w) for w in windows if w != WINDOW and w < middle]
    rows: list[Row] = []
    for shape in shapes:
        for backward in (False, True):
            works = _attention_works(shape, backward, precision)
            case = f"{'forward+backward' if backward else 'forward'} n={shape.n} W={shape.window}"
            held = {name: peak_bytes(work) for name, work in works.items() if why_not(work) == ""}
            rows += rows_of("attention", case, works, rounds, precision, held=held)
    return rows


def bench_asked(rounds: int) -> list[Row]:
    """The shapes with a ratio to reach, in both precisions; the case says how much there is to win at most."""
    rows: list[Row] = []
    for precision in ("bf16", "fp32"):
        for shape, peer, least in ASKED:
            works = _attention_works(shape, True, precision)
            case = f"n={shape.n} W={shape.window} B={shape.batch} H={shape.heads} D={shape.head_dim}"
            case += f", at most {shape.gain:.2f} x causal"
            chosen = {name: works[name] for name in (OURS, peer)}
            rows += rows_of("attention, forward+backward", case, chosen, rounds, precision, limits={peer: least})
    return rows


def bench_lengths(precision: str, lengths: tuple[int, ...], window: int = 256) -> list[Row]:
    """Ours alone over long sequences, forward + backward: seconds and peak bytes against n."""
    rows = []
    for n in lengths:
        work = _attention_works(Shape(n, window, heads=2, kv_heads=1, head_dim=64), True, precision)[OURS]
        held = peak_bytes(work)
        seconds, _ = alternate({OURS: work}, 3)
        rows.append(
            Row("lengths", f"forward+backward n={n} W={window}", "–", seconds[OURS], None, None, None, held, None,
                precision, torch.get_num_threads(), "alone")
        )  # fmt: skip
    return rows


def growth(rows: list[Row]) -> str:
    """Exponents of seconds and bytes of `bench_lengths` against n."""
    n = np.log([float(row.case.split("n=")[1].split()[0]) for row in rows])
    columns = [row.ours_s for row in rows], [float(row.ours_bytes or 1) for row in rows]
    time_, held = (np.polyfit(n, np.log(column), 1)[0] for column in columns)
    return f"  ours, forward+backward: time ~ n^{time_:.2f}, peak bytes ~ n^{held:.2f}"


def _attention_works(shape: Shape, backward: bool, precision: str) -> dict[str, Work]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(shape.n + shape.window)
    q, k, v = (
        torch.randn(shape.batch, h, shape.n, shape.head_dim, generator=generator).to(dtype).requires_grad_(backward)
        for h in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    spec, positions = LayerSpec("sliding", shape.window), torch.arange(shape.n)
    gqa = shape.heads != shape.kv_heads
    module = nn.Module()
    module.num_key_value_groups = shape.heads // shape.kv_heads  # type: ignore[assignment]
    module.eval()

    @cache
    def mask() -> Tensor:
        _check_scores(shape)
        return visible(spec, positions[:, None], positions[None, :])

    @cache
    def bias() -> Tensor:
        return torch.zeros(shape.n, shape.n, dtype=dtype).masked_fill(~mask(), torch.finfo(dtype).min)

    forwards: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: attend(q, k, v, spec, Places(positions[None]), "blocked", None),
        DENSE: lambda: F.scaled_dot_product_attention(q, k, v, mask(), enable_gqa=gqa),
        CAUSAL: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa),
        "transformers eager": lambda: eager_attention_forward(
            module, q, k, v, bias()[None, None], shape.head_dim**-0.5
        )[0],
    }
    return {name: _with_backward(f, (q, k, v)) if backward else f for name, f in forwards.items()}


def _check_scores(shape: Shape) -> None:
    needed = shape.batch * shape.heads * shape.n**2 * 4
    if needed > SCORES_LIMIT:
        raise MemoryError(f"its dense scores need {needed / 2**30:.1f} GiB, more than this benchmark allows")


def _with_backward(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Work:
    def work() -> None:
        torch.autograd.grad(forward().float().square().sum(), leaves)

    return work


def exponents(rows: list[Row]) -> dict[str, float]:
    """Slopes of log seconds against log n (W fixed) and log W (n fixed): 1 is linear, 2 quadratic, 0 constant."""
    fits: dict[str, float] = {}
    for direction in ("forward", "forward+backward"):
        for axis, other in (("n", "W"), ("W", "n")):
            for name, points in _curves(rows, direction, axis, other).items():
                if len(points) >= 3:
                    x, y = np.log(np.array(points)).T
                    fits[f"{name}, {direction}: time ~ {axis}^"] = float(np.polyfit(x, y, 1)[0])
    return fits


def _curves(rows: list[Row], direction: str, axis: str, other: str) -> dict[str, list[tuple[float, float]]]:
    """Name to [(n or W, seconds)], with the other of the two at the value that most cases share."""
    parsed = [(dict(p.split("=") for p in row.case.split()[1:]), row) for row in rows]
    parsed = [(at, row) for at, row in parsed if row.case.split()[0] == direction]
    fixed = statistics.mode(at[other] for at, _ in parsed)
    curves: dict[str, dict[float, float]] = {}
    for at, row in parsed:
        if at[other] == fixed:
            curves.setdefault(OURS, {})[float(at[axis])] = row.ours_s
            if row.peer_s is not None:
                curves.setdefault(row.peer, {})[float(at[axis])] = row.peer_s
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot_attention(rows: list[Row], file: Path) -> None:
    """Seconds of forward + backward against n and against W, logarithmic on both axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (axis, other) in zip(figure.subplots(1, 2), (("n", "W"), ("W", "n")), strict=True):
        for name, points in _curves(rows, "forward+backward", axis, other).items():
            axes.loglog(*zip(*points, strict=True), "o-", label=name, linewidth=2.5 if name == OURS else 1.2)
        axes.set(xlabel=f"{axis}, tokens", ylabel="seconds, forward + backward")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {file}: {error.strerror}; name a file that can be written") from error


# -- command line ------------------------------------------------------------------------------------------------------


def table_of(rows: list[Row]) -> Table:
    table = Table(
        "case", "peer", "ours", "peer's", "ratio", "ours", "peer's", title=rows[0].bench, title_justify="left"
    )
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f} x"
        if row.limit is not None and row.ratio is not None:
            ratio += f" (asked: {row.limit:g})"
        table.add_row(
            row.case, row.peer, f"{row.ours_s * 1e3:,.2f} ms", row.note or f"{(row.peer_s or 0) * 1e3:,.2f} ms", ratio,
            _size(row.ours_bytes), _size(row.peer_bytes),
        )  # fmt: skip
    return table


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.2f} MiB"


def tokens_per_second(rows: list[Row]) -> str:
    """The training rows in the unit people ask for."""
    rows_, seq_len = rows[0].case.split(", ")[-1].split(" tokens")[0].split(" x ")
    tokens = int(rows_) * int(seq_len)
    lines = [f"  {OURS}: {tokens / rows[0].ours_s:,.0f} tokens/s"]
    lines += [f"  {row.peer}: {tokens / row.peer_s:,.0f} tokens/s" for row in rows if row.peer_s]
    return "\n".join(lines)


@contextmanager
def threads(wanted: int | None) -> Iterator[None]:
    """As many threads as training takes, or as many as asked for."""
    before = torch.get_num_threads()
    set_up_threads(wanted, 1)
    yield
    torch.set_num_threads(before)


def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    rows: list[Row] = []
    machine = measure(torch.device("cpu"))
    settings = load_settings(arguments.config, arguments.overrides)
    precision = machine.choose(arguments.precision or settings.training.precision)
    console.print(
        f"{torch.get_num_threads()} threads; matmul fp32 {machine.fp32_flops / 1e9:,.0f}, "
        f"bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s -> {precision}; torch {torch.__version__}"
    )
    if arguments.bench in ("train", "all"):
        found = bench_train(settings, precision, arguments.rounds, arguments.rows)
        console.print(table_of(found), tokens_per_second(found), sep="\n")
        rows += found
    if arguments.bench in ("attention", "all"):
        found = bench_attention(precision, arguments.rounds, tuple(arguments.lengths), tuple(arguments.windows))
        console.print(table_of(found))
        for name, slope in exponents(found).items():
            console.print(f"  {name}{slope:.2f}")
        if arguments.plot:
            plot_attention(found, Path(arguments.plot))
        rows += found
        found = bench_asked(min(arguments.rounds, 3))
        console.print(table_of(found))
        rows += found
        found = bench_lengths(precision, tuple(arguments.long_lengths))
        console.print(table_of(found), growth(found), sep="\n")
        rows += found
    few = min(arguments.rounds, 3)
    if arguments.bench in ("decode", "all"):
        batches = tuple(arguments.batches)
        found = bench_decode(settings, few, arguments.prompt_tokens, arguments.new_tokens, batches)
        console.print(table_of(found))
        rows += found
    if arguments.bench in ("prefill", "all"):
        found = bench_prefill(settings, few, arguments.prefill, tuple(arguments.prefill_lengths))
        console.print(table_of(found), prefill_growth(found), sep="\n")
        rows += found
    if arguments.bench == "stream":
        found = bench_stream(settings, arguments.tokens)
        console.print(table_of(found))
        rows += found
    return rows


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["attention", "train", "decode", "prefill", "stream", "all"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py: model.hidden_size=128")
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="for all but attention; default: %(default)s"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", metavar="FILE", help="of attention: time against n and W")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each; default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: all cores of this process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: as the config says")
    parser.add_argument("--rows", type=int, help="of train: rows a step; default: the config's tokens_per_step")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, metavar="N,N", help="of attention")
    parser.add_argument("--long-lengths", type=_numbers, default=LONG, metavar="N,N", help="of attention, ours alone")
    parser.add_argument("--windows", type=_numbers, default=WINDOWS, metavar="W,W", help="of attention")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="of decode; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="of decode; default: %(default)s")
    parser.add_argument("--batches", type=_numbers, default=[1, 8], metavar="B,B", help="of decode; default: 1,8")
    parser.add_argument("--prefill", type=int, default=PREFILL_BESIDE, help="tokens beside sdpa; default: %(default)s")
    parser.add_argument("--prefill-lengths", type=_numbers, default=PREFILL_ALONE, metavar="N,N", help="ours alone")
    parser.add_argument("--tokens", type=int, default=131_072, help="of stream; default: %(default)s")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "threads", "rows", "prompt_tokens", "new_tokens", "prefill", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    return arguments


def write_json(rows: list[Row], file: Path) -> None:
    try:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}; name a file that can be written") from error


def main() -> None:
    arguments = parse(sys.argv[1:])
    transformers_logging.disable_progress_bar()
    with threads(arguments.threads):
        rows = run(arguments, Console(width=160))
    if arguments.json:
        write_json(rows, Path(arguments.json))


if __name__ == "__main__":
    sys.exit(cli(main))
