"""Threads, determinism, and the matmul rates of this machine, which decide what precision `auto` is."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from training.processes.signals import TrainingFault
from training.settings.schema import Settings

ROUNDS = 3  # of measurements, in turn for each precision, so that both see the same other programs on a busy machine
PRODUCTS = 3  # the fewest that count in a measurement: a process that is held up measures nothing else in its time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_GAIN = 1.5  # autocast also costs casts, so a smaller gain of the bare matmul does not pay


@contextmanager
def lack_of_memory_is_fault(settings: Settings) -> Iterator[None]:
    """Raises TrainingFault, with what to change, where a GPU has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        training = settings.training
        tokens, checkpointing = (
            training.micro_batch_tokens or training.tokens_per_step,
            training.activation_checkpointing,
        )
        raise TrainingFault(
            f"the GPU has no memory left: {str(problem).split('. ')[0]}\n"
            f"  lower training.micro_batch_tokens (now {tokens:,} tokens a process at a time),\n"
            f"  or set training.activation_checkpointing: true (now {str(checkpointing).lower()}),\n"
            "  or share the model out over several GPUs with configs/accelerate/fsdp2.yaml;\n"
            "  each may change within a run: the same command then goes on from the last checkpoint"
        ) from problem


@dataclass(frozen=True)
class Machine:
    """Matmul rates of one process in FLOP/s, and whether its processor has instructions for bfloat16."""

    fp32_flops: float
    bf16_flops: float
    has_bf16: bool = True

    def rate(self, precision: str) -> float:
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    def choose(self, wanted: str) -> str:
        """`wanted`, or for `auto`: bf16 where its matmul is clearly faster. The run keeps the choice for ever.

        On a busy machine both rates may be far too low, so a processor without bfloat16 is never asked to use it.
        """
        fastest = "bf16" if self.has_bf16 and self.bf16_flops > BF16_GAIN * self.fp32_flops else "fp32"
        return fastest if wanted == "auto" else wanted


@cache
def measure(device: torch.device) -> Machine:
    """The best of several rates with this process's number of threads at the first call; later calls repeat it."""
    dtypes = torch.float32, torch.bfloat16
    rounds = [[matmul_rate(device, dtype, seconds=0.2 / ROUNDS) for dtype in dtypes] for _ in range(ROUNDS)]
    return Machine(*map(max, zip(*rounds, strict=True)), has_bf16=device.type != "cpu" or _cpu_has_bf16())


def _cpu_has_bf16() -> bool:
    """Whether a CPU flag says so: avx512_bf16, amx_bf16, ... Older versions of torch don't tell, which counts as yes."""
    flags = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()
    return any(has for name, has in flags.items() if name.endswith("bf16"))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Best FLOP/s of square matmuls within about `seconds`. Their width is `size`, and 8 x `size` on a GPU.

    A CPU starts at an eighth of `size` and stays lower if it is slow, as in bfloat16 without instructions for it.
    """
    size, width = (8 * size, 8 * size) if device.type == "cuda" else (size, size // 8)
    best, end, products = 0.0, math.inf, -1
    while time.perf_counter() < end or products < PRODUCTS:
        a = torch.randn(width, width, device=device, dtype=dtype)  # a GPU is a tenth faster with equal numbers
        a[0, 0].item()  # waits for the device, as it does below
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        took, products = time.perf_counter() - start, products + 1
        if end == math.inf:  # the first one also loads the kernel
            end = time.perf_counter() + seconds
            continue
        best = max(best, 2 * width**3 / took)
        if width < size and 8 * took < seconds:
            width *= 2
    return best


def set_up_threads(wanted: int | None, local_processes: int) -> int:
    """Set and return this process's CPU threads. Default: an equal share of all cores; `accelerate launch` gives 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(wanted or max(1, cores // local_processes))
    return torch.get_num_threads()


def make_deterministic(on_gpu: bool) -> None:
    """Deterministic kernels, and compiled code that depends on the shape alone: a bit-equal resume needs both.

    With automatic dynamic shapes the code compiled for a shape depends on the shapes before it, so a resumed run would
    compile other kernels than the run it continues. On a GPU deterministic kernels are slower, and some do not exist:
    `on_gpu` asks for them, and then an operation without one raises RuntimeError.
    """
    torch.use_deterministic_algorithms(on_gpu or not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a kernel a tensor
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
