"""How the model lies on the processes that accelerate launched: whole on each (DDP), or sharded layer by layer (FSDP2).

Under FSDP2 a parameter is a `DTensor`: each process keeps some rows of it and of its moments, and has the whole one
only while its layer computes. `accelerate` reads the launch file; the sharding itself is torch's `fully_shard`, called
here because accelerate's own call knows no CPU processes, and in bf16 rounds the residual stream and the summed loss.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.decoder import DecoderLayer
from model.errors import UserError

Tensors = dict[str, Tensor]


def spread(module: nn.Module, precision: str) -> tuple[Accelerator, nn.Module]:
    """The accelerator, and `module` as the processes share it. Raises UserError for what we do not do with FSDP."""
    bf16 = precision == "bf16"
    plugin = _sharding()
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", fsdp_plugin=plugin)
    if plugin is None:
        return accelerator, accelerator.prepare(module)
    _shard(module.to(accelerator.device), plugin, accelerator.device.type, bf16)
    return accelerator, module


def without_exchange(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside keep their gradients to themselves: the last micro-batch of a step exchanges them all."""
    return _unsynchronised(module) if isinstance(module, FSDPModule) else accelerator.no_sync(module)


@contextmanager
def whole(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Every process holds all weights inside, in the precision of training: it may compute what the others don't."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        with accelerator.autocast() if units else nullcontext():
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not module and _reshards(), recurse=False)


def whole_weights(module: nn.Module, keep: bool) -> Tensors:
    """The state dict without shards. All processes take part; those that do not `keep` it get an empty one."""
    weights = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full
    return weights


@torch.no_grad()
def load_whole(tensors: Tensors, saved: Tensors) -> None:
    """Copy tensors without shards into those of the same names, which may be sharded."""
    for name, tensor in tensors.items():
        tensor.copy_(as_placed(saved[name], tensor))


def as_placed(full: Tensor, like: Tensor) -> Tensor:
    """`full` on the device of `like`; where that is sharded, this process's part of it. Nothing is exchanged."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):
        return full.to(like.device)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """What the launch file asks for; None: no sharding."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_config.fsdp_version is {version} in the accelerate config file; set it to 2")
    plugin = FullyShardedDataParallelPlugin()
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_config.fsdp_activation_checkpointing is true in the accelerate config file; "
            "remove it and set training.activation_checkpointing: true"
        )
    return plugin


def _reshards() -> bool:
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


def _shard(module: nn.Module, plugin: FullyShardedDataParallelPlugin, device: str, bf16: bool) -> None:
    """A unit for each layer; embedding, head and final norm are the root's, which stays whole until its backward pass.

    In bf16 the layers' weights are exchanged in bfloat16, what autocast would round them to; the residual stream, the
    root's weights and the sums of gradients stay in float32, as they are without shards.
    """
    root: dict[str, Any] = {"mesh": init_device_mesh(device, (torch.distributed.get_world_size(),))}
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        root["offload_policy"] = plugin.cpu_offload
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for layer in module.modules():
        if isinstance(layer, DecoderLayer):
            fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, mp_policy=policy, **root)
    fully_shard(module, reshard_after_forward=False, **root)
    if bf16:
        module.forward = torch.autocast(device, torch.bfloat16)(module.forward)


@contextmanager
def _unsynchronised(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
