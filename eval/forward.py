"""Forward passes of the evaluations: logits and losses of whole sequences, and the same through the key/value cache.

The two members of a counterfactual pair have the same row in batches of one shape, so that what is equal in theory is
equal in every bit.

Legend: B batch, T positions, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.models import Examined
from model.cache import RingCache

BATCH_TOKENS = {"cpu": 2304, "cuda": 65_536}  # what fits into the cache of a CPU core; what keeps a GPU busy


def batch_rows(examined: Examined, seq_len: int) -> int:
    """The number of sequences of `seq_len` tokens in a batch."""
    return max(1, BATCH_TOKENS.get(examined.device.type, 65_536) // seq_len)


class Reader:
    """Computes logits (B, V) for batches of up to `rows` sequences of one length."""

    def __init__(self, examined: Examined, seq_len: int, precision: str, compiled: bool) -> None:
        self.examined, self.precision = examined, precision
        self.rows = min(128, batch_rows(examined, seq_len))
        if compiled and examined.ours:
            examined.model.compile_layers()

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, at: int) -> Tensor:
        """Logits (B, V) that predict the token after position `at` of each row of input_ids (B, T).

        A small batch is filled up with copies of its first row, because another shape would be compiled anew.
        """
        copies = input_ids[:1].expand(self.rows - len(input_ids), -1)
        bf16 = torch.autocast(self.examined.device.type, torch.bfloat16)
        with bf16 if self.precision == "bf16" else nullcontext():
            return logits_at(self.examined, torch.cat((input_ids, copies)), at)[: len(input_ids)]


def body(model: Any) -> Any:
    """The layers below the output matrix: token ids to hidden states."""
    return model.model if model.base_model is model else model.base_model


@torch.inference_mode()
def logits_at(examined: Examined, input_ids: Tensor, at: int) -> Tensor:
    """Logits (B, V) that predict the token after position `at` of each row of input_ids (B, T), by one full pass.

    Our own model runs over all T positions, whatever `at` is, so that it is compiled for one shape.
    """
    ids = (input_ids if examined.ours else input_ids[:, : at + 1]).to(examined.device)
    behind = ids.shape[1] - at
    return examined.model(input_ids=ids, use_cache=False, logits_to_keep=behind).logits[:, -behind].float().cpu()


def last_logits(examined: Examined, input_ids: Tensor) -> Tensor:
    """Logits (B, V) that predict the token after each row of input_ids (B, T), by one full pass."""
    return logits_at(examined, input_ids, input_ids.shape[1] - 1)


@torch.inference_mode()
def last_logits_through_ring(examined: Examined, input_ids: Tensor, at: int) -> Tensor:
    """`last_logits` through the cache: the first `at` tokens, then the rest. Models of other makers: one full pass."""
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
    """The first token of greedy generation for each row, through the model's own cache."""
    ids = input_ids.to(examined.device)
    output = examined.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in output[:, ids.shape[1]]]


@torch.inference_mode()
def token_nats(examined: Examined, input_ids: Tensor) -> NDArray[np.float64]:
    """(B, T-1) negative log-likelihood, in nats, of every token but the first, given those before it in its row."""
    ids = input_ids.to(examined.device)
    logits = examined.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(ids.shape[0], -1).double().cpu().numpy()


def last_token_nats(examined: Examined, input_ids: Tensor) -> NDArray[np.float64]:
    """(B,) negative log-likelihood, in nats, of the last token of each row, given those before it."""
    logits = last_logits(examined, input_ids[:, :-1])
    return F.cross_entropy(logits, input_ids[:, -1], reduction="none").double().numpy()
