"""Our attention in other people's models: importing this module registers it with `transformers`.

    import model.hf_attention
    AutoModelForCausalLM.from_pretrained(path, attn_implementation="windreach_blocked")

It serves decoder layers with a sliding window or none, grouped queries, padding, packed `position_ids`, sinks and the
dynamic cache, and refuses what it can't do: static caches, dropout, soft-capped scores, ready-made 4-d masks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.attention.plan import attend, attend_after
from model.errors import UserError
from model.places import Places, restarts
from model.windows import LayerSpec

NAME = "windreach_blocked"


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """All that layers need to be told: the 2-d padding mask (B, S) over their keys, or None without padding."""
    if int(q_offset) + q_length != int(kv_offset) + kv_length:
        raise UserError(f"{NAME} reads keys in order of age; use the dynamic cache, not one of fixed length")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As `transformers` calls it: query (B, H, T, D), key and value (B, G, S, D); returns (B, T, H, D) and None."""
    _refuse(attention_mask, dropout, others)
    t, s = query.shape[2], key.shape[2]
    spec = LayerSpec("sliding", sliding_window) if sliding_window else LayerSpec("full")
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    index = torch.arange(s, device=query.device)[None]
    documents = _documents(attention_mask, position_ids if t == s else None)
    keys = Places(index if documents is None else index.expand(len(documents), -1), documents)
    if t == s:
        out = attend(query, key, value, spec, keys, "blocked", s_aux)
    else:
        queries = Places(keys.positions[:, s - t :], None if documents is None else documents[:, s - t :])
        out = attend_after(query, key, value, spec, queries, keys, "blocked", s_aux)
    return out.transpose(1, 2).contiguous(), None


def _refuse(attention_mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if dropout > 0:
        raise UserError(f"{NAME} has no dropout; set attention_dropout to 0 in the config")
    if others.get("softcap") is not None:
        raise UserError(f"{NAME} can't cap scores (softcap); use another attn_implementation for this model")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UserError(f"{NAME} takes a 2-d attention_mask (batch, tokens), not {attention_mask.ndim}-d")


def _documents(mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Ids (B, S) of what a token may see: padding is -1; positions that start anew begin another document."""
    if mask is not None:
        return mask.long() - 1
    return None if position_ids is None else restarts(position_ids)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, padding_mask)
