"""How the model is spread over the processes that accelerate launched: a copy on each (DDP), or sharded (FSDP2).

Under FSDP2 a parameter is a `DTensor`: each process holds some rows of it and of its moments, and gathers the whole
parameter only while its layer computes. `accelerate` reads the launch file. We call torch's `fully_shard` ourselves,
because accelerate's own call has no CPU processes, and in bf16 it rounds the residual stream and the summed loss.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.decoder import DecoderLayer
from model.errors import UserError

Tensors = dict[str, Tensor]


def spread(module: nn.Module, precision: str) -> tuple[Accelerator, nn.Module]:
    """The accelerator, and `module` wrapped for these processes. Raises UserError for FSDP options we don't support."""
    bf16, plugin = precision == "bf16", _sharding()
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", fsdp_plugin=plugin)
    if plugin is None:
        return accelerator, accelerator.prepare(module)
    _shard(module.to(accelerator.device), plugin, accelerator.device.type, bf16)
    return accelerator, module


def exchange_gradients(module: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums gradients over the processes: only a step's last micro-batch needs to."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on


@contextmanager
def whole(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights in the precision of training, so each may compute something else."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        with accelerator.autocast() if units else nullcontext():
            yield
    finally:
        reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not module and reshards, recurse=False)


def whole_weights(module: nn.Module, keep: bool) -> Tensors:
    """The state dict without shards. All processes must call this; those that do not `keep` it get an empty one."""
    state = module.state_dict().items()
    whole = ((name, t.full_tensor().cpu() if isinstance(t, DTensor) else t) for name, t in state)
    return {name: tensor for name, tensor in whole if keep}


@torch.no_grad()
def load_whole(tensors: Tensors, saved: Tensors) -> None:
    """Copy whole tensors into those of the same names, which may be sharded."""
    for name, tensor in tensors.items():
        tensor.copy_(as_placed(saved[name], tensor))


def as_placed(full: Tensor, like: Tensor) -> Tensor:
    """`full` on the device of `like`; if that is sharded, this process's shard. Processes exchange nothing."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):
        return full.to(like.device)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """What the launch file says about FSDP; None: no sharding."""
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


def _shard(module: nn.Module, plugin: FullyShardedDataParallelPlugin, device: str, bf16: bool) -> None:
    """Make each layer a unit; embedding, head and final norm belong to the root, whole until its backward pass.

    In bf16 the layers' weights are gathered in bfloat16, to which autocast would round them anyway. The residual
    stream, the root's weights and the sums of gradients stay in float32, as without shards.
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
