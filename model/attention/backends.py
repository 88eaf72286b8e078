"""What each way to compute attention can do, on which device, and which one is fastest where: facts, as data."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from model.errors import UserError
from model.windows import LayerSpec

PACKAGES = {"cudnn": "nvidia-cudnn-frontend", "triton": "triton", "xformers": "xformers"}  # module, name to install
HALVES = (torch.float16, torch.bfloat16)

# What `auto` prefers on CUDA, fastest in training on an H100 first, see docs/gpu.md.
FASTEST_IN_HALVES = ("cudnn", "flex", "flash", "blocked")
FASTEST_IN_FLOAT = ("flex", "blocked")
FASTEST_IF_SHORT = ("blocked",)  # counted, not timed: the other kernels score at least 128 keys for each query
SHORT = 1024  # window times head size


def _is_short(spec: LayerSpec, head_size: int) -> bool:
    return spec.window is not None and not spec.global_tokens and spec.window * head_size <= SHORT


@dataclass(frozen=True)
class Device:
    """What attention can count on: the compute capability of an NVIDIA GPU, and which of `PACKAGES` are installed."""

    type: str
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()

    @staticmethod
    @cache
    def here(type: str | None = None) -> "Device":
        """The device of this machine of that type. Default: the GPU if there is one."""
        type = type or ("cuda" if torch.cuda.is_available() else "cpu")
        packages = frozenset(name for name in PACKAGES if importlib.util.find_spec(name))
        return Device(type, torch.cuda.get_device_capability() if type == "cuda" else (0, 0), packages)

    def __str__(self) -> str:
        return f"{self.type} (sm_{self.capability[0]}{self.capability[1]})" if self.type == "cuda" else self.type


@dataclass(frozen=True)
class Backend:
    """What a backend can compute.

    capability: the least that it needs of an NVIDIA GPU. gpu_only: it needs one. package: what it needs on a GPU.
    wide_head_sizes: the largest head size on GPUs of these major capabilities, instead of `max_head_size`.
    deterministic_on: major capabilities on which its backward pass gives the same bits every time; None: all.
    """

    about: str
    sinks: bool = True
    global_tokens: bool = True
    head_size_multiple: int = 1
    min_head_size: int = 1
    max_head_size: int | None = None
    wide_head_sizes: tuple[tuple[int, int], ...] = ()
    capability: tuple[int, int] = (0, 0)
    gpu_only: bool = False
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    cpu_gradients: bool = True
    deterministic_on: tuple[int, ...] | None = None

    def unable(
        self,
        spec: LayerSpec,
        head_size: int,
        device: Device,
        dtype: torch.dtype | None = None,
        gradients: bool = False,
        deterministic: bool = False,
    ) -> str | None:
        """The reason why it can't compute a layer, or None. `dtype`: of the matrix products, None if not yet known."""
        return (
            self._unable_layer(spec, head_size, device)
            or self._missing(device)
            or self._unable_training(device, dtype, gradients, deterministic)
        )

    def _unable_layer(self, spec: LayerSpec, head_size: int, device: Device) -> str | None:
        most = dict(self.wide_head_sizes).get(device.capability[0], self.max_head_size)
        if spec.sink and not self.sinks:
            return "has no learned sinks"
        if spec.global_tokens and not self.global_tokens:
            return "has no global tokens"
        if head_size % self.head_size_multiple:
            return f"needs a head size that is a multiple of {self.head_size_multiple}, not {head_size}"
        if head_size < self.min_head_size:
            return f"needs a head size of at least {self.min_head_size}, not {head_size}"
        if most is not None and head_size > most:
            return f"needs a head size of at most {most}, not {head_size}"
        return None

    def _missing(self, device: Device) -> str | None:
        if self.gpu_only and device.type != "cuda":
            return f"needs an NVIDIA GPU, but the device is {device}"
        if device.type == "cuda" and device.capability < self.capability:
            least = ".".join(map(str, self.capability))
            return f"needs an NVIDIA GPU of compute capability {least} or more, but the device is {device}"
        if self.package and device.type == "cuda" and self.package not in device.packages:
            return f"needs the package {PACKAGES[self.package]}, which is not installed"
        return None

    def _unable_training(
        self, device: Device, dtype: torch.dtype | None, gradients: bool, deterministic: bool
    ) -> str | None:
        if self.dtypes and dtype and device.type == "cuda" and dtype not in self.dtypes:
            able = " and ".join(_name(x) for x in self.dtypes)
            return f"computes in {able}, not in {_name(dtype)}"
        if gradients and device.type == "cpu" and not self.cpu_gradients:
            return "has no gradient on a CPU"
        on_gpu, orders = device.type == "cuda", self.deterministic_on
        if deterministic and on_gpu and orders is not None and device.capability[0] not in orders:
            return f"has no deterministic backward pass on {device}"
        return None


# cudnn: the limits of the package's own checks (1.32). It obeys torch.use_deterministic_algorithms.
# flash: gradients of queries differed from run to run on an H100, with that switch on too (torch 2.11).
# flex: its kernels add up in a fixed order unless a score function has parameters, and ours has none.
BACKENDS = {
    "reference": Backend("dense mask, softmax in float32: the oracle"),
    "blocked": Backend("pure PyTorch, O(n W) time and memory, any device"),
    "cudnn": Backend(
        "the attention of cuDNN, in fp16 and bf16", sinks=False, global_tokens=False, head_size_multiple=8,
        max_head_size=128, wide_head_sizes=((9, 256),), capability=(8, 0), gpu_only=True, package="cudnn",
        dtypes=HALVES, deterministic_on=(9, 10),
    ),
    "flash": Backend(
        "the flash attention of PyTorch, in fp16 and bf16", sinks=False, global_tokens=False, head_size_multiple=8,
        max_head_size=192, wide_head_sizes=((9, 256), (10, 256)), capability=(8, 0), gpu_only=True, dtypes=HALVES,
        deterministic_on=(),
    ),
    "flex": Backend(
        "FlexAttention: compiled on CUDA, forward only on a CPU", min_head_size=16, capability=(7, 0),
        package="triton", dtypes=(*HALVES, torch.float32), cpu_gradients=False,
    ),
    "xformers": Backend(
        "the memory-efficient attention of xFormers", sinks=False, global_tokens=False, head_size_multiple=8,
        capability=(6, 0), gpu_only=True, package="xformers", dtypes=(*HALVES, torch.float32), deterministic_on=(),
    ),
}  # fmt: skip


def check_backend(
    name: str,
    specs: Sequence[LayerSpec],
    head_size: int,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    gradients: bool = False,
    deterministic: bool = False,
) -> None:
    """Raises UserError, with the layer and the reason, where backend `name` can't compute these layers.

    `device`: that of this machine by default. `deterministic`: the backward pass must give the same bits every time.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        raise UserError(f"model.attention_backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    facts = head_size, device or Device.here(), dtype, gradients, deterministic
    for i, spec in enumerate(specs):
        if reason := BACKENDS[name].unable(spec, *facts):
            able = [n for n, b in BACKENDS.items() if not any(b.unable(s, *facts) for s in specs)]
            of_layer = reason.startswith(("has no learned sinks", "has no global tokens"))
            layer = f", but model.layers[{i}] asks for them" if of_layer else ""
            raise UserError(
                f"model.attention_backend is {name!r}, which {reason}{layer}; choose one of auto, {', '.join(able)}"
            )


def fastest(
    spec: LayerSpec, head_size: int, device: Device, dtype: torch.dtype, gradients: bool, deterministic: bool
) -> tuple[str, str]:
    """The backend that `auto` stands for, and the reason."""
    if device.type != "cuda":
        return "blocked", f"auto on {device}"
    order: tuple[str, ...] = FASTEST_IN_HALVES if dtype in HALVES else FASTEST_IN_FLOAT
    order = FASTEST_IF_SHORT if _is_short(spec, head_size) else order
    reasons = {name: BACKENDS[name].unable(spec, head_size, device, dtype, gradients, deterministic) for name in order}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    passed = [f"{name} {reasons[name]}" for name in order[: order.index(chosen)]]
    return chosen, "; ".join([f"auto in {_name(dtype)} on {device}", *passed])


def _name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))
