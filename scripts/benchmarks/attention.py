"""Attention of one layer beside its peers, at several lengths and windows, and ours alone on long sequences.

On a GPU ours is what `auto` chooses, and each backend is a peer, so that the order of `auto` can be read from the rows.

Legend: n tokens, W window, B batch, H heads, G kv heads, D head size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.mistral.modeling_mistral import eager_attention_forward

from model.attention import BACKENDS, check_backend, plan_attention
from model.packing import Packing
from model.windows import LayerSpec, visible
from scripts.benchmarks.timing import OURS, Row, Setup, Work, compare
from training.processes.precision import DTYPES, Machine

WINDOW = 64  # of the cases that differ in length
LENGTH = 2048  # of the cases that differ in window
SCORES_LIMIT = 2 << 30  # bytes of a dense score matrix beyond which a peer is left out
CAUSAL, DENSE, FLEX = "sdpa, causal, no window", "sdpa, dense window mask", "FlexAttention, compiled"
EAGER, CAUSAL_CUDNN = "transformers eager", "sdpa, causal, no window, cuDNN"
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of one attention call: `n` tokens under a window."""

    n: int
    window: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32


AIMS = (  # shape, peer, least ratio of forward + backward that is aimed at
    (Shape(16_384, 4096, heads=2, kv_heads=2, head_dim=128), CAUSAL, 2.0),
    (Shape(16_384, 512, heads=2, kv_heads=2, head_dim=128), CAUSAL, 8.0),
    (Shape(2048, 64, batch=4, heads=4, kv_heads=4, head_dim=64), DENSE, 4.0),
)
GPU_AIMS = (  # the same beside the fastest causal kernel, which is CAUSAL or CAUSAL_CUDNN
    (Shape(16_384, 4096, heads=32, kv_heads=8, head_dim=128), 1.9),
    (Shape(16_384, 512, heads=32, kv_heads=8, head_dim=128), 8.0),
)


def bench_attention(setup: Setup, lengths: Sequence[int], windows: Sequence[int]) -> list[Row]:
    """All peers, forward and forward + backward: several lengths at one window, several windows at one length."""
    middle = LENGTH if LENGTH in lengths else lengths[-1]
    shapes = [Shape(n, WINDOW) for n in lengths] + [Shape(middle, w) for w in windows if w != WINDOW and w < middle]
    rows: list[Row] = []
    for shape, direction in itertools.product(shapes, ("forward", "forward+backward")):
        works = attention_works(shape, direction != "forward", setup.precision, setup.device)
        case, unwatched = f"{direction} n={shape.n} W={shape.window}", "" if setup.on_gpu else FLEX
        rows += compare("attention", case, works, setup.rounds, setup.precision, {}, setup.peak_bytes, unwatched)
    return rows


def bench_aims(setup: Setup, machine: Machine) -> list[Row]:
    """The shapes whose ratio to a peer has an aim; the case names the most that a window can gain."""
    if setup.on_gpu:
        return _bench_gpu_aims(setup)
    rows: list[Row] = []
    precisions = ("bf16", "fp32") if machine.bf16_flops > machine.fp32_flops else ("fp32",)  # no emulated bf16
    for precision, (shape, peer, limit) in itertools.product(precisions, AIMS):
        works = attention_works(shape, True, precision, setup.device)
        pair, rounds = {name: works[name] for name in (OURS, peer)}, min(setup.rounds, 5)
        rows += compare("attention, forward+backward", _aim_case(shape), pair, rounds, precision, {peer: limit})
    return rows


def _bench_gpu_aims(setup: Setup) -> list[Row]:
    """All peers, in bf16 alone, forward and forward + backward. Only the latter has an aim."""
    rows: list[Row] = []
    for (shape, limit), direction in itertools.product(GPU_AIMS, ("forward", "forward+backward")):
        works = attention_works(shape, direction != "forward", "bf16", setup.device)
        limits = dict.fromkeys((CAUSAL, CAUSAL_CUDNN), limit) if direction != "forward" else {}
        measured = _aim_case(shape), works, setup.rounds, "bf16", limits, setup.peak_bytes
        rows += compare(f"attention, {direction}", *measured)
    return rows


def _aim_case(shape: Shape) -> str:
    visible_pairs = sum(min(n, shape.window) for n in range(1, shape.n + 1))
    gain = shape.n * (shape.n + 1) / 2 / visible_pairs
    sizes = f"n={shape.n} W={shape.window} B={shape.batch} H={shape.heads} D={shape.head_dim}"
    return f"{sizes}, at most {gain:.2f} x causal"


def bench_lengths(setup: Setup, lengths: Sequence[int]) -> list[Row]:
    """Seconds and peak bytes of our forward + backward on long sequences."""
    rows: list[Row] = []
    for n in lengths:
        works = attention_works(Shape(n, 256, heads=2, kv_heads=1, head_dim=64), True, setup.precision, setup.device)
        case, ours = f"forward+backward n={n} W=256", {OURS: works[OURS]}
        rows += compare("lengths", case, ours, 3, setup.precision, bytes_of=setup.peak_bytes)
    return rows


def attention_works(shape: Shape, backward: bool, precision: str, device: torch.device) -> dict[str, Work]:
    """Ours and all peers on the same random q, k and v, as functions without arguments."""
    dtype, generator = DTYPES[precision], torch.Generator().manual_seed(shape.n + shape.window)
    q, k, v = (
        torch.randn(shape.batch, h, shape.n, shape.head_dim, generator=generator).to(device, dtype)
        for h in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    qkv = tuple(x.requires_grad_(backward) for x in (q, k, v))
    backend, peers = ("auto", gpu_peers(shape, *qkv)) if device.type == "cuda" else ("blocked", {})
    forwards: dict[str, Forward] = {OURS: partial(_ours, shape, backend, *qkv), **_peers(shape, *qkv), **peers}
    return {name: partial(_backward, f, qkv) if backward else torch.no_grad()(f) for name, f in forwards.items()}


def _ours(shape: Shape, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    spec, device = LayerSpec("sliding", shape.window), q.device
    plan = plan_attention(spec, shape.head_dim, backend, device.type, q.dtype, q.requires_grad)
    return plan.prepare(Packing.of_whole_rows(shape.n, device), shape.batch)(q, k, v, None)


def _peers(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Forward]:
    n, dtype, device, gqa = shape.n, q.dtype, q.device, shape.heads != shape.kv_heads
    spec, module = LayerSpec("sliding", shape.window), nn.Module().eval()
    module.num_key_value_groups = shape.heads // shape.kv_heads  # type: ignore[assignment]  # eager attention reads it

    @cache
    def mask() -> Tensor:
        if (size := shape.batch * shape.heads * n**2 * 4) > SCORES_LIMIT:
            raise MemoryError(f"its dense scores need {size / 2**30:.1f} GiB, more than this benchmark allows")
        positions = torch.arange(n, device=device)
        return visible(spec, positions[:, None], positions[None, :])

    @cache
    def bias() -> Tensor:
        return torch.zeros(1, 1, n, n, dtype=dtype, device=device).masked_fill(~mask(), torch.finfo(dtype).min)

    @cache
    def compiled_flex() -> Forward:
        mask = create_block_mask(lambda b, h, i, j: visible(spec, i, j), None, None, n, n, device=device)
        return partial(torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=mask, enable_gqa=gqa)

    return {
        DENSE: lambda: F.scaled_dot_product_attention(q, k, v, mask(), enable_gqa=gqa),
        CAUSAL: partial(_causal, q, k, v),
        FLEX: lambda: compiled_flex()(),
        EAGER: lambda: eager_attention_forward(module, q, k, v, bias(), shape.head_dim**-0.5)[0],
    }


def gpu_peers(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Forward]:
    """The causal kernel of cuDNN, and each of our backends; one that can't compute the layer says why."""

    @cache
    def check(backend: str) -> None:
        check_backend(backend, [LayerSpec("sliding", shape.window)], shape.head_dim)

    def named(backend: str) -> Tensor:
        check(backend)
        return _ours(shape, backend, q, k, v)

    cudnn: dict[str, Forward] = {CAUSAL_CUDNN: partial(sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(_causal), q, k, v)}
    return cudnn | {f"ours, {name}": partial(named, name) for name in BACKENDS if name != "reference"}


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _backward(forward: Forward, leaves: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(forward().float().square().sum(), leaves)
