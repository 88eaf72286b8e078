"""Peak rates and memory of GPUs, from their data sheets. Rates are dense, without structured sparsity."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """bf16_flops: tensor-core FLOP/s in bfloat16 with float32 sums. memory: bytes (a GB is 1e9)."""

    bf16_flops: float
    memory: float
    source: str


GPUS = {
    "a10": Gpu(125e12, 24e9, "NVIDIA A10 data sheet"),
    "a100-40": Gpu(312e12, 40e9, "NVIDIA A100 data sheet"),
    "a100-80": Gpu(312e12, 80e9, "NVIDIA A100 data sheet"),
    "b200": Gpu(2250e12, 180e9, "NVIDIA HGX B200 data sheet, an eighth of the board, half of the sparse figure"),
    "h100": Gpu(989.4e12, 80e9, "NVIDIA H100 (SXM5) data sheet, half of the sparse figure"),
    "h100-pcie": Gpu(756e12, 80e9, "NVIDIA H100 (PCIe) data sheet, half of the sparse figure"),
    "h200": Gpu(989.4e12, 141e9, "NVIDIA H200 (SXM) data sheet, half of the sparse figure"),
    "l4": Gpu(121e12, 24e9, "NVIDIA L4 data sheet, half of the sparse figure"),
    "l40s": Gpu(362e12, 48e9, "NVIDIA L40S data sheet"),
    "mi300x": Gpu(1307.4e12, 192e9, "AMD Instinct MI300X data sheet"),
    "rtx-3090": Gpu(71e12, 24e9, "NVIDIA GA102 white paper"),
    "rtx-4090": Gpu(165.2e12, 24e9, "NVIDIA Ada white paper"),
}


def gpu_named(name: str) -> Gpu | None:
    """The GPU that torch calls `name`, or None if it has no entry.

    >>> gpu_named("NVIDIA A100-SXM4-80GB") is GPUS["a100-80"], gpu_named("NVIDIA T4")
    (True, None)
    """
    words = {word.removesuffix("gb") for word in re.findall(r"[a-z0-9]+", name.lower())}
    known = [key for key in GPUS if words.issuperset(key.split("-"))]
    return GPUS[max(known, key=len)] if known else None
