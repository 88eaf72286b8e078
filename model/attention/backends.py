"""The forms of attention that can be had, what each can do, and the refusal of what it can't.

A model is refused when it is built, not when it first meets a batch: a configured window is never ignored.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.errors import UserError
from model.windows import LayerSpec


def _nothing() -> str | None:
    return None


def _needs_gpu(capability: int) -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and none is there"
    if torch.cuda.get_device_capability()[0] < capability:
        return f"needs an NVIDIA GPU of compute capability {capability}.0 or more"
    return None


def _needs_xformers() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "needs the package xformers, which is not installed"
    return _needs_gpu(6)


@dataclass(frozen=True)
class Backend:
    """about: in a few words. lacks: why it can't be had on this machine, or None."""

    about: str
    sinks: bool = True
    global_tokens: bool = True
    head_dim_multiple: int = 1
    least_head_dim: int = 1
    lacks: Callable[[], str | None] = _nothing

    def unable(self, spec: LayerSpec, head_dim: int) -> str | None:
        """What of a layer it can't do, or None."""
        if spec.sink and not self.sinks:
            return "has no learned sinks"
        if spec.global_tokens and not self.global_tokens:
            return "has no global tokens"
        if head_dim % self.head_dim_multiple:
            return f"needs a head size that is a multiple of {self.head_dim_multiple}, not {head_dim}"
        if head_dim < self.least_head_dim:
            return f"needs a head size of at least {self.least_head_dim}, not {head_dim}"
        return None


BACKENDS = {
    "reference": Backend("dense mask, float32 softmax: the oracle"),
    "blocked": Backend("pure PyTorch, O(n W) time and memory, any device"),
    "flex": Backend("FlexAttention: compiled on CUDA, forward only on a CPU", least_head_dim=16),
    "flash": Backend(
        "flash attention of torch; fp16 and bf16", sinks=False, global_tokens=False,
        head_dim_multiple=8, lacks=lambda: _needs_gpu(8),
    ),
    "xformers": Backend(
        "memory-efficient attention of xFormers", sinks=False, global_tokens=False,
        head_dim_multiple=8, lacks=_needs_xformers,
    ),
}  # fmt: skip


def choose_backend(name: str, specs: Sequence[LayerSpec] = (), head_dim: int = 16) -> str:
    """`name` if it can do all of these layers here; `auto` stays, and is decided by the device of each call.

    Raises UserError with the layer and the reason.
    """
    if name == "auto":
        return name
    if name not in BACKENDS:
        raise UserError(f"model.attention_backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    for i, spec in enumerate(specs):
        if reason := BACKENDS[name].unable(spec, head_dim):
            raise UserError(
                f"model.attention_backend is {name!r}, which {reason}{_where(i, reason)}; {_able(specs, head_dim)}"
            )
    if reason := BACKENDS[name].lacks():
        raise UserError(f"model.attention_backend is {name!r}, which {reason}; {_able(specs, head_dim)}")
    return name


def _where(layer: int, reason: str) -> str:
    return "" if "head size" in reason else f", but model.layers[{layer}] asks for them"


def _able(specs: Sequence[LayerSpec], head_dim: int) -> str:
    """The remedy: the backends that can do these layers on this machine."""
    able = [name for name, b in BACKENDS.items() if not b.lacks() and not any(b.unable(s, head_dim) for s in specs)]
    return f"choose one of auto, {', '.join(able)}"


def serving(name: str, device: torch.device) -> str:
    """What `auto` is on a device: FlexAttention where it has a gradient and a compiler, else blocked."""
    if name != "auto":
        return name
    return "flex" if device.type == "cuda" and importlib.util.find_spec("triton") else "blocked"
