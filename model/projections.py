"""Several projections of one input as one matrix in memory, and as modules of their own for everyone else.

Queries, keys and values are one matrix product, as are gate and up. Files, state dicts and adapters still find
`q_proj`, `k_proj`, `v_proj`, `gate_proj` and `up_proj`, named as in Mistral.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED = {
    "qkv_weight": ("q_proj", "k_proj", "v_proj"), "qkv_bias": ("q_proj", "k_proj", "v_proj"),
    "gate_up_weight": ("gate_proj", "up_proj"),
}  # fmt: skip


class _Rows(Tensor):
    """Some rows of a matrix. Assigning to `.data`, as PEFT does when it merges an adapter, writes through to it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        self.detach().copy_(new)


class Projection(nn.Linear):
    """One projection of a `FusedProjections` module: rows of its matrix, with no parameter of its own.

    Adapters may replace or wrap it, and hooks may watch it. Its owner then calls it.
    """

    def __init__(self, owner: "FusedProjections", rows: slice, in_features: int):
        nn.Module.__init__(self)  # not Linear's, which makes a weight
        self.__dict__["owner"] = owner  # a reference, not a submodule
        self.in_features, self.out_features = in_features, rows.stop - rows.start
        self.rows: Any = rows

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features), a view of the owner's matrix."""
        owner: FusedProjections = self.__dict__["owner"]
        return owner.fused_weight[self.rows].as_subclass(_Rows)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(out_features,), a view of the owner's vector."""
        owner: FusedProjections = self.__dict__["owner"]
        return None if owner.fused_bias is None else owner.fused_bias[self.rows].as_subclass(_Rows)


class FusedProjections(nn.Module):
    """A module with several projections of its input. `name` is that of the common parameter, one of `FUSED`."""

    def __init__(self, name: str, in_features: int, sizes: tuple[int, ...], bias: bool = False):
        super().__init__()
        self.fused_name, self.fused_sizes = name, sizes
        weight = torch.empty(sum(sizes), in_features).normal_(0.0, in_features**-0.5)
        self.register_parameter(name, nn.Parameter(weight))
        if bias:
            self.register_parameter(_bias_of(name), nn.Parameter(torch.zeros(sum(sizes))))
        first = 0
        for projection, size in zip(FUSED[name], sizes, strict=True):
            self.add_module(projection, Projection(self, slice(first, first + size), in_features))
            first += size

    @property
    def fused_weight(self) -> nn.Parameter:
        weight = self._parameters[self.fused_name]
        assert weight is not None
        return weight

    @property
    def fused_bias(self) -> nn.Parameter | None:
        return self._parameters.get(_bias_of(self.fused_name))

    def project(self, x: Tensor) -> Tensor:
        """All projections of x (…, in_features) side by side.

        They are one product, unless an adapter or a hook was put on one of them.
        """
        projections = [self._modules[name] for name in FUSED[self.fused_name]]
        for p in projections:
            if type(p) is not Projection or p._forward_hooks or p._forward_pre_hooks:
                return torch.cat([p(x) for p in projections if p is not None], -1)
        return F.linear(x, self.fused_weight, self.fused_bias)

    def _fused_parameters(self) -> list[str]:
        return [name for name in FUSED if name in self._parameters]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for fused in self._fused_parameters():
            parts = destination.pop(prefix + fused).split(self.fused_sizes)
            destination.update(zip(split_name(prefix + fused), parts, strict=True))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        absent: list[str] = []
        missing: list[str] = []
        own = [prefix + name for name in self._fused_parameters()]
        for fused in own:
            names = split_name(fused)
            missing += [name for name in names if name not in state_dict]
            parts = [state_dict.pop(name) for name in names if name in state_dict]
            if len(parts) == len(names):
                state_dict[fused] = torch.cat(parts)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )  # fmt: skip
        missing_keys += [key for key in absent if key not in own] + missing


def row_sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The rows of each projection in every fused parameter of `module`, by the parameter's name."""
    fused = ((name, part) for name, part in module.named_modules() if isinstance(part, FusedProjections))
    return {f"{name}.{part.fused_name}": part.fused_sizes for name, part in fused}


def split_name(name: str) -> list[str]:
    """The names in files of what a parameter in memory holds.

    >>> split_name("layers.0.mlp.gate_up_weight"), split_name("norm.weight")
    (['layers.0.mlp.gate_proj.weight', 'layers.0.mlp.up_proj.weight'], ['norm.weight'])
    """
    stem, dot, last = name.rpartition(".")
    return [f"{stem}{dot}{part}.{last.rpartition('_')[2]}" for part in FUSED[last]] if last in FUSED else [name]


def _bias_of(name: str) -> str:
    return name.replace("weight", "bias")


def fused_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from files to the parameters in memory: those of q, k and v are joined to one `qkv_weight`.

    Serves weights and what an optimizer keeps for each weight, whatever stands before the projection's name.
    """
    fused = dict(tensors)
    for parameter, (first, *_) in FUSED.items():
        last = f"{first}.{parameter.rpartition('_')[2]}"
        for key in [key for key in tensors if key.endswith(last)]:
            stem = key.removesuffix(last)
            parts = [fused.pop(name) for name in split_name(stem + parameter)]
            fused[stem + parameter] = torch.cat(parts) if parts[0].ndim else parts[0]
    return fused
