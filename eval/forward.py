"""Logits after whole sequences: in batches of one shape, compiled where that pays, and through the ring as a check.

Both members of a counterfactual pair go through the same row of batches of the same shape, so that whatever is equal
in theory is equal in every bit.

Legend: B batch, T positions, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from eval.models import Examined
from model.cache import RingCache

LONG_WORK = 2_000_000  # tokens: below, compiling and starting processes take longer than they save
ROW_TOKENS = {"cpu": 2304, "cuda": 65_536}  # tokens of a batch: what fits the cache of a core; what fills a GPU


class Reader:
    """Logits (B, V) that predict what follows a position of each row, for batches (up to `rows`, T) of one length T."""

    def __init__(self, examined: Examined, seq_len: int, precision: str, compiled: bool) -> None:
        self.examined, self.precision = examined, precision
        self.rows = max(1, min(128, ROW_TOKENS.get(examined.device.type, 65_536) // seq_len))
        if compiled and examined.ours:
            examined.model.compile_layers()

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, at: int) -> Tensor:
        """What follows position `at`. A short batch is filled up with copies of its first row: another shape would be
        compiled anew, and so would a row cut short behind `at`."""
        missing = self.rows - len(input_ids)
        filled = torch.cat((input_ids, input_ids[:1].expand(missing, -1)))
        with self._autocast():
            return logits_at(self.examined, filled, at)[: len(input_ids)]

    def _autocast(self) -> AbstractContextManager[object]:
        bf16 = self.precision == "bf16"
        return torch.autocast(self.examined.device.type, torch.bfloat16) if bf16 else nullcontext()


def body(model: Any) -> Any:
    """The stack below the output matrix: token ids in, hidden states out."""
    return model.model if model.base_model is model else model.base_model


@torch.inference_mode()
def logits_at(examined: Examined, input_ids: Tensor, at: int) -> Tensor:
    """Logits (B, V) that predict what follows position `at` of each row of input_ids (B, T): one full forward pass."""
    if not examined.ours:
        return last_logits(examined, input_ids[:, : at + 1])
    ids = input_ids.to(examined.device)
    output = examined.model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - at)
    return output.logits[:, 0].float().cpu()


@torch.inference_mode()
def last_logits(examined: Examined, input_ids: Tensor) -> Tensor:
    """Logits (B, V) that predict what follows each row of input_ids (B, T): one full forward pass."""
    output = examined.model(input_ids=input_ids.to(examined.device), use_cache=False, logits_to_keep=1)
    return output.logits[:, -1].float().cpu()


@torch.inference_mode()
def last_logits_through_ring(examined: Examined, input_ids: Tensor, at: int) -> Tensor:
    """The same by way of the cache: the first `at` tokens, then the rest. Models without our ring run in full."""
    if not examined.ours:
        return last_logits(examined, input_ids)
    cache = RingCache(examined.model.config)
    for part in (input_ids[:, :at], input_ids[:, at:]):
        if part.shape[1]:
            output = examined.model(
                input_ids=part.to(examined.device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
    return output.logits[:, -1].float().cpu()


@torch.inference_mode()
def generate_one(examined: Examined, input_ids: Tensor) -> list[int]:
    """The first greedily generated token of each row, through the model's own cache."""
    ids = input_ids.to(examined.device)
    output = examined.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in output[:, ids.shape[1]]]
