"""The step of single tokens on a GPU, recorded once for each cache as a CUDA graph, and replayed for each later token.

A step of a deep model is hundreds of kernels, and to launch them takes longer than to run them. A graph launches all of
them at once.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def can_record(x: Tensor) -> bool:
    """Whether a step on `x` can be recorded. Under autocast it can't: converted weights are freed behind each step."""
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


class Recording:
    """The kernels of a function of tensors, as a CUDA graph. They read and write the same memory at each replay.

    So everything that the function uses apart from its arguments must stay where it is, until `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recording":
        """A copied cache has other memory."""
        return Recording()

    def forget(self) -> None:
        self.is_warm = False
        self.recorded: tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor] | None = None  # with its inputs and output

    def replay(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """What `function` returns for `inputs`, which have the same shapes at each call; valid until the next call.

        The first call runs the function as it is: what is compiled or loaded at first can't be recorded.
        """
        if not self.is_warm:
            self.is_warm = True
            return function(*inputs)
        self.recorded = self.recorded or _record(function, inputs)
        graph, fixed, output = self.recorded
        for old, new in zip(fixed, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return output


def _record(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
    """The graph, and the memory that it reads and writes. Nothing is computed meanwhile."""
    fixed, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(fixed[0].device), capture_error_mode="thread_local"):
        output = function(*fixed)  # other threads may use the GPU meanwhile
    return graph, fixed, output


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are recorded: each stream has workspaces of its own."""
    return torch.cuda.Stream(device)
