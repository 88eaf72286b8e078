"""One layer's attention beside the peers: against length and window, at the shapes with a ratio to reach, and alone.

Legend: n tokens, W window, B batch, H heads, G kv heads, D head size.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.mistral.modeling_mistral import eager_attention_forward

from model.attention.plan import attend, prepare, tiles_from
from model.errors import UserError
from model.places import Places
from model.windows import LayerSpec, visible
from scripts.benchmarks.timing import OURS, Row, Work, alternate, peak_bytes, rows_of, why_not
from training.processes.precision import Machine

LENGTHS, WINDOW = (512, 1024, 2048, 4096), 64
WINDOWS, LENGTH = (16, 32, 64, 128, 256, 512), 2048
LONG = (4096, 8192, 16_384, 32_768, 65_536)
SCORES_LIMIT = 2 << 30  # bytes of a dense score matrix beyond which a peer is left out
CAUSAL, DENSE, FLEX = "sdpa, causal, no window", "sdpa, dense window mask", "FlexAttention, compiled"
EAGER = "transformers eager"


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
            works = attention_works(shape, backward, precision)
            case = f"{'forward+backward' if backward else 'forward'} n={shape.n} W={shape.window}"
            held = {name: peak_bytes(work) for name, work in works.items() if name != FLEX and why_not(work) == ""}
            rows += rows_of("attention", case, works, rounds, precision, held=held)
    return rows


def bench_asked(machine: Machine, rounds: int) -> list[Row]:
    """The shapes with a ratio to reach; the case says how much there is to win at most."""
    rows: list[Row] = []
    for precision in precisions(machine):
        for shape, peer, least in ASKED:
            works = attention_works(shape, True, precision)
            case = f"n={shape.n} W={shape.window} B={shape.batch} H={shape.heads} D={shape.head_dim}"
            case += f", at most {shape.gain:.2f} x causal"
            chosen = {name: works[name] for name in (OURS, peer)}
            rows += rows_of("attention, forward+backward", case, chosen, rounds, precision, limits={peer: least})
    return rows


def precisions(machine: Machine) -> tuple[str, ...]:
    """Those that the machine has units for: emulated bf16 would say nothing of either side."""
    return ("bf16", "fp32") if machine.bf16_flops > machine.fp32_flops else ("fp32",)


def bench_lengths(precision: str, lengths: tuple[int, ...], window: int = 256) -> list[Row]:
    """Ours alone over long sequences, forward + backward: seconds and peak bytes against n."""
    rows = []
    for n in lengths:
        work = attention_works(Shape(n, window, heads=2, kv_heads=1, head_dim=64), True, precision)[OURS]
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


def attention_works(shape: Shape, backward: bool, precision: str) -> dict[str, Work]:
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

    @cache
    def places() -> Places:
        return prepare(spec, Places(positions[None]), "blocked", tiles=tiles_from(dtype, shape.head_dim))

    forwards: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: attend(q, k, v, spec, places(), "blocked", None),
        DENSE: lambda: F.scaled_dot_product_attention(q, k, v, mask(), enable_gqa=gqa),
        CAUSAL: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa),
        FLEX: _flex(q, k, v, spec, lambda: forwards[OURS]()),
        EAGER: lambda: eager_attention_forward(module, q, k, v, bias()[None, None], shape.head_dim**-0.5)[0],
    }
    return {name: _with_backward(f, (q, k, v)) if backward else torch.no_grad()(f) for name, f in forwards.items()}


def _flex(q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, ours: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """FlexAttention with its block mask made beforehand. Its first call is compared with ours: it must be right."""

    @cache
    def compiled() -> Callable[[], Tensor]:
        n = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: visible(spec, i, j), None, None, n, n, device=q.device)
        kernel = torch.compile(flex_attention, dynamic=False)
        run = partial(kernel, q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        with torch.no_grad():
            furthest = (run() - ours()).abs().max().item()
        if furthest > 0.05:
            raise RuntimeError(f"its output is off by {furthest:.2g}")
        return run

    return lambda: compiled()()


def _check_scores(shape: Shape) -> None:
    needed = shape.batch * shape.heads * shape.n**2 * 4
    if needed > SCORES_LIMIT:
        raise MemoryError(f"its dense scores need {needed / 2**30:.1f} GiB, more than this benchmark allows")


def _with_backward(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Work:
    def work() -> None:
        torch.autograd.grad(forward().float().square().sum(), leaves)

    return work


def exponents(rows: list[Row]) -> dict[str, float]:
    """Slopes of log seconds and log bytes against log n (W fixed) and log W (n fixed): 1 is linear, 0 constant."""
    fits: dict[str, float] = {}
    for direction in sorted({row.case.split()[0] for row in rows}):
        for axis, other in (("n", "W"), ("W", "n")):
            for what, value in (("time", _seconds), ("peak bytes", _mebibytes)):
                for name, points in _curves(rows, direction, axis, other, value).items():
                    if len(points) >= 3:
                        x, y = np.log(np.array(points)).T
                        fits[f"{name}, {direction}: {what} ~ {axis}^"] = float(np.polyfit(x, y, 1)[0])
    return fits


def _curves(
    rows: list[Row], direction: str, axis: str, other: str, value: Callable[[Row], tuple[float | None, float | None]]
) -> dict[str, list[tuple[float, float]]]:
    """Name to [(n or W, value)], with the other of the two at what most cases share. value: ours and the peer's."""
    parsed = [(dict(p.split("=") for p in row.case.split()[1:]), row) for row in rows]
    parsed = [(at, row) for at, row in parsed if row.case.split()[0] == direction]
    fixed = statistics.mode(at[other] for at, _ in parsed)
    curves: dict[str, dict[float, float]] = {}
    for at, row in parsed:
        for name, found in zip((OURS, row.peer), value(row)):
            if at[other] == fixed and found:
                curves.setdefault(name, {})[float(at[axis])] = found
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot_attention(rows: list[Row], file: Path) -> None:
    """Seconds and bytes of forward + backward against n and against W, logarithmic on all axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col")
    for column, (axis, other) in enumerate((("n", "W"), ("W", "n"))):
        for row, value in enumerate((_seconds, _mebibytes)):
            for name, points in _curves(rows, "forward+backward", axis, other, value).items():
                grid[row, column].loglog(*zip(*points), "o-", label=name, linewidth=2.5 if name == OURS else 1.2)
            grid[row, column].grid(alpha=0.3)
        ticks = sorted(
            {x for points in _curves(rows, "forward+backward", axis, other, _seconds).values() for x, _ in points}
        )
        grid[1, column].set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        grid[1, column].set_xticks([], minor=True)
        grid[1, column].set(xlabel=f"{axis}, tokens")
    grid[0, 0].set(ylabel="seconds, forward + backward")
    grid[1, 0].set(ylabel="MiB alive at once")
    grid[0, 1].legend(frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {file}: {error.strerror}; name a file that can be written") from error


def _seconds(row: Row) -> tuple[float | None, float | None]:
    return row.ours_s, row.peer_s


def _mebibytes(row: Row) -> tuple[float | None, float | None]:
    ours, peer = row.ours_bytes, row.peer_bytes
    return ours and ours / 2**20, peer and peer / 2**20
