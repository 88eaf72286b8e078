"""Token-by-token generation without waiting: the host sends off steps, and reads tokens a block at a time.

Legend: B batch, T prompt tokens, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError

GPU_BLOCK = 16  # tokens between two waits for the GPU: a wait costs about a tenth of the time of a small model's token


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
    model: WindreachForCausalLM, ids_bt: Tensor, sampler: Sampler, cache: RingCache, block: int,
    max_tokens: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the tokens after `ids_bt` (B, T) on the CPU: one a row, then `block` a row at a time (B, n).

    It ends after `max_tokens` a row; None is without end. At each yield the cache holds all tokens but the last. It
    turns on `record_decoding` for the model, and leaves it on.
    """
    model.record_decoding()
    if max_tokens is not None:
        cache.reserve(cache.get_seq_length() + ids_bt.shape[1] + max_tokens - 1)
    newest, left, size = ids_bt, math.inf if max_tokens is None else max_tokens, 1
    while left > 0:
        drawn = []
        for _ in range(int(min(size, left))):
            logits = model(newest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            newest = sampler(logits)[:, None]
            drawn.append(newest)
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite; its weights are too large or damaged")
        yield torch.cat(drawn, 1).cpu()
        left, size = left - size, block
