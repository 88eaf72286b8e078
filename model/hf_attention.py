"""Our attention for models of `transformers`. Importing this module registers it:

    import model.hf_attention
    AutoModelForCausalLM.from_pretrained(path, attn_implementation="windreach_blocked")

It serves decoder layers with or without a sliding window, grouped queries, padding, packed `position_ids`, sinks and
the dynamic cache. It refuses static caches, dropout, soft-capped scores, 4-d masks, and a model that does not pass its
window on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.attention import plan_attention, product_dtype
from model.errors import UserError
from model.packing import Packing
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
    """The 2-d padding mask (B, S) over the keys, or None without padding: all that `attention` needs of a mask."""
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
    _refuse(module, attention_mask, dropout, sliding_window, others)
    t, s = query.shape[2], key.shape[2]
    kind = "sliding" if sliding_window else "full"
    spec = LayerSpec(kind, sliding_window or None, sink=s_aux is not None)
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    plan = plan_attention(
        spec, query.shape[-1], "blocked", query.device.type, product_dtype(query), torch.is_grad_enabled()
    )
    keys = _packing(key, attention_mask, position_ids if t == s else None)
    if t == s:
        attend = plan.prepare(keys, len(query))
    else:
        documents = None if keys.documents is None else keys.documents[:, s - t :]
        attend = plan.prepare_cached(Packing(keys.positions[:, s - t :], documents), keys)
    return attend(query, key, value, s_aux).transpose(1, 2).contiguous(), None


def _refuse(
    module: nn.Module, mask: Tensor | None, dropout: float, sliding_window: int | None, others: dict[str, Any]
) -> None:
    if dropout > 0:
        raise UserError(f"{NAME} has no dropout; set attention_dropout to 0 in the config")
    if others.get("softcap") is not None:
        raise UserError(f"{NAME} can't cap scores (softcap); use another attn_implementation for this model")
    if mask is not None and mask.ndim != 2:
        raise UserError(f"{NAME} takes a 2-d attention_mask (batch, tokens), not {mask.ndim}-d")
    config: Any = getattr(module, "config", None)
    asked = getattr(config, "sliding_window", None)
    if asked and not sliding_window and getattr(config, "layer_types", None) is None:
        raise UserError(
            f"config.sliding_window is {asked}, but {type(module).__name__} does not pass it to its attention, so it "
            "would be ignored; set it to None, or use a model class with a window"
        )


def _packing(key: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Packing:
    """Packing of the keys: padding has document -1, and positions that start again begin another document."""
    tokens, device = key.shape[2], key.device
    if mask is not None:
        return Packing(torch.arange(tokens, device=device).expand(len(mask), -1), mask.long() - 1)
    documents = None if position_ids is None else Packing.of_position_ids(position_ids).documents
    if documents is None:
        return Packing.of_whole_rows(tokens, device)
    return Packing(torch.arange(tokens, device=device).expand(len(documents), -1), documents)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, padding_mask)
