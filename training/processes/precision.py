"""What this machine is good at, measured once: matmul rate in float32 and bfloat16, and the choice between them."""

import os
import time
from dataclasses import dataclass
from functools import cache

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_GAIN = 1.5  # bf16 autocast costs casts; below this gain of the bare matmul it does not pay


@dataclass(frozen=True)
class Machine:
    """Matmul rates of one process in FLOP/s."""

    fp32_flops: float
    bf16_flops: float

    def rate(self, precision: str) -> float:
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    def choose(self, wanted: str) -> str:
        """`auto` is bf16 where its matmul is clearly faster. The answer is saved with the run: a resume never asks."""
        if wanted != "auto":
            return wanted
        return "bf16" if self.bf16_flops > BF16_GAIN * self.fp32_flops else "fp32"


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Best FLOP/s over several square matmuls within about `seconds`.

    They are of `size` rows (8 x that on a GPU), or smaller where one would take longer than `seconds`: bfloat16 without
    instructions for it takes seconds at 1,024.
    """
    if device.type == "cuda":
        size *= 8
    small = size // 8
    expected = 8**3 * min(_matmul_seconds(small, device, dtype) for _ in range(3))
    while size > small and expected > seconds:
        size, expected = size // 2, expected / 8
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        best = min(best, _matmul_seconds(size, device, dtype))
    return 2 * size**3 / best


def _matmul_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    _synchronize(device)
    start = time.perf_counter()
    a @ a
    _synchronize(device)
    return time.perf_counter() - start


def measure(device: torch.device) -> Machine:
    """With the threads of this process as they are set now; measured once for each number of them."""
    return _measure(device, torch.get_num_threads())


@cache
def _measure(device: torch.device, threads: int) -> Machine:
    return Machine(matmul_rate(device, torch.float32), matmul_rate(device, torch.bfloat16))


def set_up_threads(wanted: int | None, local_processes: int) -> int:
    """CPU threads of this process. `accelerate launch` leaves one process one thread; we share out all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wanted or max(1, cores // local_processes)
    torch.set_num_threads(threads)
    return threads


def make_deterministic() -> None:
    """What bit-equal resume needs: deterministic kernels, and code that depends on the shape alone.

    With automatic dynamic shapes the code compiled for a shape depends on which shapes came before it, so a resumed
    run would compile other kernels than the run it continues.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
