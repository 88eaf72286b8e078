"""Token-by-token generation without waiting: the host sends off steps, and reads tokens a block at a time.

A step of a deep model is hundreds of kernels, and to launch them takes longer than to run them. On a GPU they are
recorded once for each cache, as a CUDA graph, and launched at once for each later token.

Legend: B batch, T prompt tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.cache import RingCache
    from model.decoder import WindreachForCausalLM

GPU_BLOCK = 16  # tokens between two waits for the GPU: a wait costs about as much as a tenth of a small model's token


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


@dataclass(frozen=True)
class Sampler:
    """Draws tokens on the device of the logits, without waiting for it.

    temperature: 0 is greedy. top_p: the likeliest tokens of this total mass are kept. generator: of the same device.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, logits_bv: Tensor) -> Tensor:
        """Token ids (B,). log p - log(noise) is greatest at a sample of p if the noise is exponentially distributed."""
        if self.temperature == 0:
            return logits_bv.argmax(-1)
        scores = logits_bv.float() / self.temperature
        noise = torch.empty_like(scores).exponential_(generator=self.generator).log()
        if self.top_p == 1:
            return (scores - noise).argmax(-1)
        scores, ids = scores.sort(descending=True)
        probabilities = scores.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        choice = (scores - noise).masked_fill(mass_before >= self.top_p, -torch.inf).argmax(-1, keepdim=True)
        return ids.gather(-1, choice)[:, 0]


@torch.inference_mode()
def token_blocks(
    model: "WindreachForCausalLM", ids_bt: Tensor, sampler: Sampler, cache: "RingCache", block: int,
    max_tokens: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the tokens after `ids_bt` (B, T) on the CPU: one a row, then `block` a row at a time (B, n).

    It ends after `max_tokens` a row; None is without end. At each yield the cache holds all tokens but the last.
    """
    if max_tokens is not None:
        cache.reserve(cache.get_seq_length() + ids_bt.shape[1] + max_tokens - 1)
    newest, left, size = ids_bt, math.inf if max_tokens is None else max_tokens, 1
    while left > 0:
        drawn = []
        for _ in range(int(min(size, left))):
            logits = model(newest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            newest = sampler(logits)[:, None]
            drawn.append(newest)
        yield torch.cat(drawn, 1).cpu()
        left, size = left - size, block
