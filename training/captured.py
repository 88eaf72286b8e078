"""A function of tensors that becomes one CUDA graph for each shape of its inputs.

A thin stack launches thousands of small kernels a step, and the GPU waits for the host between them. A CUDA graph
launches all of them at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from model.errors import UserError

GRAPHS = ("reduce-overhead", "max-autotune")  # values of training.compile that ask for CUDA graphs
THIN = 1e-3  # seconds of a layer's products in a micro-batch. Launching its kernels takes about 3e-3 s on the host
WARM_CALLS = 2  # of each shape that run as they are: they compile, and fill caches and moments


def worth_capturing(compile_setting: bool | str, ranks: PartialState, seconds_per_layer: float, waits: bool) -> bool:
    """Whether a step becomes a CUDA graph: on one GPU if asked for, or if the stack is thin and compiled.

    waits: the attention of a layer reads the device, which a graph can't.
    """
    possible = ranks.device.type == "cuda" and ranks.num_processes == 1 and not waits
    return possible and (compile_setting in GRAPHS or (compile_setting is True and seconds_per_layer < THIN))


def check_graphs(compile_setting: bool | str, ranks: PartialState, waits: bool) -> None:
    """Raises UserError where CUDA graphs are asked for and can't be made."""
    if compile_setting not in GRAPHS or worth_capturing(compile_setting, ranks, 0.0, waits):
        return
    where = f"{ranks.num_processes} process{'es' * (ranks.num_processes > 1)} on {ranks.device.type}"
    where += ", and attention that reads the device (xformers, or global tokens in blocks)" * waits
    raise UserError(
        f"training.compile is {compile_setting!r}, which makes CUDA graphs on one GPU, and this run has {where}; "
        "set it to true"
    )


class Captured:
    """Calls `function` with a tree of tensors, and returns its one tensor. From the third call of a shape on, a graph.

    Tensors are copied into the memory that the graph reads. What is no tensor in the tree is part of the shape. The
    function must not wait for the device, and must keep no tensor that a graph allocates. All graphs share memory, so
    the result is valid until the next call.
    """

    def __init__(self, function: Callable[[Any], Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls: dict[Any, int] = {}
        self.warm_calls = WARM_CALLS
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, inputs: Any) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self._on_stream(inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _on_stream(self, inputs: Any) -> Tensor:
        leaves, structure = tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        shape = str(structure), tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if shape not in self.graphs:
            self.calls[shape] = self.calls.get(shape, 0) + 1
            moved = [x.to(self.device, non_blocking=True) for x in tensors]
            if self.calls[shape] <= self.warm_calls:
                return self.function(_with_tensors(leaves, moved, structure))
            self.graphs[shape] = self._capture(leaves, moved, structure)
        graph, static, result = self.graphs[shape]
        for mine, new in zip(static, tensors, strict=True):
            mine.copy_(new, non_blocking=True)
        graph.replay()
        return result

    def _capture(
        self, leaves: list[Any], static: list[Tensor], structure: Any
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """Nothing is computed here. `static` is the memory of the inputs."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = self.function(_with_tensors(leaves, static, structure))
        return graph, static, result


def _with_tensors(leaves: list[Any], tensors: list[Tensor], structure: Any) -> Any:
    """The tree with these tensors in place of its own."""
    new = iter(tensors)
    return tree_unflatten([next(new) if isinstance(x, Tensor) else x for x in leaves], structure)
