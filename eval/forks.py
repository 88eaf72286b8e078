"""Run both members of counterfactual pairs while computing what they share only once.

The members of a pair are equal up to the value token. With a ring cache the shared prefix is fed once, the ring is
copied, and each member goes on from its own copy: same row, same batch shape, so that whatever is equal in theory
is equal in every bit. When the next pair's prefix continues the last one (farther distances first), only the new
part of the prefix is fed. Models without our ring run both members in full.

Legend: B batch, T positions, V vocabulary.
"""

import copy
from typing import Protocol

import torch
from torch import Tensor

from eval.models import Examined, last_logits
from model.cache import RingCache

PIECE = 4096


class Forks(Protocol):
    def pair(self, first: Tensor, second: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Logits (B, V) after each of two batches (B, T) that are equal before position `at`."""


class RingForks:
    """Pairs through the ring; keep one per set of haystacks, and ask for the farthest distance first."""

    def __init__(self, examined: Examined, rows: int) -> None:
        self.examined = examined
        self.rows = rows
        self._restart()

    def _restart(self) -> None:
        self.cache = RingCache(self.examined.model.config)
        self.fed = torch.empty(self.rows, 0, dtype=torch.long)

    def pair(self, first: Tensor, second: Tensor, at: int) -> tuple[Tensor, Tensor]:
        assert torch.equal(first[:, :at], second[:, :at]), "the members of a pair share what precedes the value"
        fed = self.fed.shape[1]
        if fed > at or not torch.equal(self.fed, first[:, :fed]):
            self._restart()
            fed = 0
        if at > fed:
            self._feed(self.cache, first[:, fed:at])
            self.fed = first[:, :at].clone()
        return self._branch(first[:, at:]), self._branch(second[:, at:])

    def _branch(self, suffix: Tensor) -> Tensor:
        return self._feed(copy.deepcopy(self.cache), suffix)

    def _feed(self, cache: RingCache, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            for piece in ids.to(self.examined.device).split(PIECE, dim=1):
                output = self.examined.model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float().cpu()


class FullForks:
    """Pairs by two full forward passes: any Hugging Face model."""

    def __init__(self, examined: Examined) -> None:
        self.examined = examined

    def pair(self, first: Tensor, second: Tensor, at: int) -> tuple[Tensor, Tensor]:
        return last_logits(self.examined, first), last_logits(self.examined, second)


def make_forks(examined: Examined, rows: int) -> Forks:
    return RingForks(examined, rows) if examined.ours else FullForks(examined)
