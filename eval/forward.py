"""Forward passes of the evaluations: logits and losses of whole sequences.

The members of a counterfactual pair have the same row in batches of one shape: what must be equal, is in every bit.

Legend: B batch, T positions, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.models import Examined
from model.packing import Packing
from training.cross_entropy import cross_entropy
from training.processes.ranks import sum_tensor_over_ranks

BATCH_TOKENS = {"cpu": 2304, "cuda": 65_536}  # what fits into the cache of a CPU core; what keeps a GPU busy

SHARED_FROM = 1024  # tokens of a row for each process that shares it; shorter rows are computed by every process


def batch_rows(examined: Examined, seq_len: int) -> int:
    """The number of sequences of `seq_len` tokens in a batch."""
    return max(1, BATCH_TOKENS.get(examined.device.type, 65_536) // seq_len)


def body(model: Any) -> Any:
    """The layers below the output matrix: token ids to hidden states."""
    return model.model if model.base_model is model else model.base_model


@torch.inference_mode()
def logits_at(examined: Examined, input_ids: Tensor, at: int, rows: int = 0, precision: str = "fp32") -> Tensor:
    """Logits (B, V) that predict the token after position `at` of each row of input_ids (B, T), by one full pass.

    Our own model runs over all T positions, whatever `at` is, so that it is compiled for one shape. For the same
    reason a small batch is filled up to `rows` with copies of its first row.
    """
    if shares_rows(examined, input_ids.shape[1]):
        return shared_logits(examined, input_ids, at, precision)
    ids = input_ids if examined.ours else input_ids[:, : at + 1]
    ids = torch.cat((ids, ids[:1].expand(max(0, rows - len(ids)), -1))).to(examined.device)
    behind = ids.shape[1] - at
    with torch.autocast(examined.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = examined.model(input_ids=ids, use_cache=False, logits_to_keep=behind).logits
    return logits[: len(input_ids), -behind].float().cpu()


def last_logits(examined: Examined, input_ids: Tensor) -> Tensor:
    """Logits (B, V) that predict the token after each row of input_ids (B, T), by one full pass."""
    return logits_at(examined, input_ids, input_ids.shape[1] - 1)


@torch.inference_mode()
def token_nats(examined: Examined, input_ids: Tensor, scored: int = 0) -> NDArray[np.float64]:
    """(B, scored) negative log-likelihood, in nats, of the last `scored` tokens of each row, given those before them.

    The default 0 scores every token but the first: (B, T-1).
    """
    if shares_rows(examined, input_ids.shape[1]):
        return _shared_nats(examined, input_ids)[:, -scored:]
    ids = input_ids.to(examined.device)
    keep = scored + 1 if scored else 0  # 0 keeps the logits of all positions
    logits = examined.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, -logits.shape[1] :].flatten(), reduction="none")
    return nats.view(ids.shape[0], -1).double().cpu().numpy()


def shares_rows(examined: Examined, tokens: int) -> bool:
    """Whether several processes share rows of so many tokens, each with a part of them."""
    return examined.layout is not None and tokens >= SHARED_FROM * examined.layout.parts


def part_of_rows(examined: Examined, input_ids: Tensor) -> tuple[Tensor, slice]:
    """Hidden states (B, T of the part, E) of this process's part of the rows (B, T), and where the part lies."""
    assert examined.layout is not None
    tokens = input_ids.shape[1]
    own = examined.layout.own(tokens)
    packing = examined.layout.packing(Packing.of_whole_rows(tokens, torch.device("cpu"))).to(examined.device)
    return examined.model.model(input_ids[:, own].to(examined.device), packing=packing).last_hidden_state, own


@torch.inference_mode()
def shared_logits(examined: Examined, input_ids: Tensor, at: int = -1, precision: str = "fp32") -> Tensor:
    """What `logits_at` returns, of rows that all processes share. The one that holds position `at` computes them."""
    at = at % input_ids.shape[1]
    with torch.autocast(examined.device.type, torch.bfloat16, enabled=precision == "bf16"):
        hidden, own = part_of_rows(examined, input_ids)
        logits = examined.model.lm_head(hidden[:, min(max(0, at - own.start), hidden.shape[1] - 1)]).float()
    return sum_tensor_over_ranks(logits * (own.start <= at < own.stop)).cpu()


def _shared_nats(examined: Examined, input_ids: Tensor) -> NDArray[np.float64]:
    """(B, T-1): what `token_nats` returns for whole rows. The logits of a part never exist all at once."""
    hidden, own = part_of_rows(examined, input_ids)
    labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)[:, own].to(examined.device)
    losses = cross_entropy(hidden.flatten(0, 1), examined.model.lm_head.weight, labels.flatten()).losses
    nats = torch.zeros(input_ids.shape, dtype=torch.float64, device=examined.device)
    nats[:, own] = losses.view(labels.shape)
    return sum_tensor_over_ranks(nats)[:, :-1].cpu().numpy()
