"""The trainer's tensors of a sharded run: each process writes and reads its own part (torch.distributed.checkpoint).

    shard-00001-model-00001-of-00001.safetensors    of the first process: its rows of every moment, and their positions

Any number of processes can read what another number has written, and so can one process that holds whole tensors.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from model.errors import UserError
from training.run.checkpoint import MAKE_ROOM


def stored_in_shards(checkpoints: Path, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | Path:
    """The tensors themselves if none is sharded; else a folder in `checkpoints` to which each process wrote one file.

    Raises UserError on every process if one can't write.
    """
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return tensors
    folder = checkpoints / f".shards-step-{step:06d}"
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as problem:
        causes = {str(cause[0]) for cause in problem.failures.values()}
        what = "the parts of a checkpoint could not be written"
        raise UserError(f"{folder}: {what}: {'; '.join(sorted(causes))}\n{MAKE_ROOM}") from problem
    return folder


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the shards in `folder`. One named `.../NAME` is sharded as `like[NAME]` is, if shapes agree."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        if isinstance(saved, TensorStorageMetadata):
            owner = like.get(name.rpartition("/")[2], torch.empty(0))
            tensors[name] = torch.empty_like(owner) if owner.shape == saved.size else torch.empty(saved.size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is for one process alone
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors
