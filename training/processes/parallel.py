"""How a model is spread over the processes of a launch: a copy on each (DDP) or shards (FSDP2), also in checkpoints.

Under FSDP2 a parameter is a `DTensor`: each process holds some rows of it and of its moments, and gathers the whole
parameter only while its layer computes. `accelerate` reads the launch file. We call torch's `fully_shard` ourselves,
because accelerate's own call has no CPU processes, and in bf16 it rounds the residual stream and the summed loss.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.decoder import DecoderLayer, give_memory
from model.errors import MAKE_ROOM, UserError
from model.hub import SavedWeights

Tensors = dict[str, Tensor]


def shards() -> bool:
    """Whether this launch shards weights (FSDP2), so that no process needs to hold all of them."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def spread(module: nn.Module, precision: str) -> tuple[Accelerator, nn.Module]:
    """The accelerator, and `module` wrapped for these processes. Parameters on meta become zeros, layer by layer."""
    options: dict[str, Any] = {"mixed_precision": "bf16" if precision == "bf16" else "no"}
    # Loss is divided once, by us: ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment must not do it again.
    options["gradient_accumulation_plugin"] = GradientAccumulationPlugin(num_steps=1)
    if not shards():
        accelerator = Accelerator(**options)
        return accelerator, accelerator.prepare(module)
    plugin = FullyShardedDataParallelPlugin()
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.to(accelerator.device)
    _shard(module, plugin, accelerator.device.type, precision == "bf16")
    return accelerator, module


def exchange_gradients(module: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums gradients over the processes: only a step's last micro-batch needs to."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights, so each may compute something else."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not module and reshards, recurse=False)


def whole_weights(module: nn.Module, keep: bool) -> Tensors:
    """The state dict without shards. All processes must call this; those that do not `keep` it get an empty one."""
    state = module.state_dict().items()
    whole = ((name, whole_tensor(t)) for name, t in state)
    return {name: tensor for name, tensor in whole if keep}


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole on the CPU: all processes must call this. Another as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_whole(tensors: Tensors, saved: Tensors | SavedWeights) -> None:
    """Copy whole tensors, one at a time, into those of the same names, which may be sharded."""
    for name, tensor in tensors.items():
        tensor.copy_(as_placed(saved[name], tensor))


def load_weights(module: nn.Module, weights: Tensors | SavedWeights) -> None:
    """Copy a checkpoint into the parameters, which may be sharded. Those that it lacks stay as they are."""
    names = {name.replace(".base_layer", ""): p for name, p in module.named_parameters()}  # PEFT's, of adapted matrices
    load_whole({name: p for name, p in names.items() if name in weights}, weights)


def as_placed(full: Tensor, like: Tensor) -> Tensor:
    """`full` on the device of `like`; if that is sharded, this process's shard. Processes exchange nothing."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):
        return full.to(like.device)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stored_in_shards(checkpoints: Path, step: int, tensors: Tensors) -> Tensors | Path:
    """The tensors themselves if none is sharded; else a folder in `checkpoints` to which each process wrote one file.

    The file `shard-00001-model-00001-of-00001.safetensors` has the rows of the first process, and their positions
    (torch.distributed.checkpoint). Any number of processes can read them, and so can one that holds whole tensors.
    Raises UserError on every process if one can't write.
    """
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return tensors
    folder = checkpoints / f".shards-step-{step:06d}"
    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as problem:
        causes = "; ".join(sorted({str(cause[0]) for cause in problem.failures.values()}))
        raise UserError(f"{folder}: the parts of a checkpoint could not be written: {causes}\n{MAKE_ROOM}") from problem
    return folder


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> Tensors:
    """All tensors of the shards in `folder`. One named `.../NAME` is sharded as `like[NAME]` is, if shapes agree."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        if isinstance(saved, TensorStorageMetadata):
            owner = like.get(name.rpartition("/")[2], torch.empty(0))
            tensors[name] = torch.empty_like(owner) if owner.shape == saved.size else torch.empty(saved.size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is for one process alone
        dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return tensors


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
            give_memory(layer, torch.device(device))
            fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, mp_policy=policy, **root)
    give_memory(module, torch.device(device))
    fully_shard(module, reshard_after_forward=False, **root)
    if bf16:
        module.forward = torch.autocast(device, torch.bfloat16)(module.forward)
