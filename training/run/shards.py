"""The trainer's tensors of a sharded run: each process writes and reads its own part (torch.distributed.checkpoint).

    shard-00001-model-00001-of-00001.safetensors    of the first process: its rows of every moment, and where they lie

Any number of processes can read what another number has written, one that holds whole tensors too.
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

PATTERN = "shard-*.safetensors"


def stored_in_shards(checkpoints: Path, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | Path:
    """Tensors as they are where none is sharded; else a folder beside the checkpoints, with one file of each process.

    Raises UserError on every process when one can't write.
    """
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return tensors
    folder = checkpoints / f".shards-step-{step:06d}"
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as problem:
        causes = {str(cause[0]) for cause in problem.failures.values()}
        raise UserError(
            f"{folder}: the parts of a checkpoint could not be written: {'; '.join(sorted(causes))}\n"
            "  earlier checkpoints are untouched; make room (or set training.keep_checkpoints lower) and run again"
        ) from problem
    return folder


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the shards in `folder`; one named `.../NAME` is placed over the processes as `like[NAME]` is."""
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: _room(name, t.size, like) for name, t in saved if isinstance(t, TensorStorageMetadata)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone: so it is
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


def _room(name: str, size: torch.Size, like: Mapping[str, Tensor]) -> Tensor:
    owner = like.get(name.rpartition("/")[2])
    return torch.empty_like(owner) if owner is not None and owner.shape == size else torch.empty(size)
