"""A relay with weights set by hand, for any stack of layers.

The residual stream has six features: `ground`, `mark`, and the bits of a value as +1 or -1. A filler token starts with
ground alone, a value token with mark and bits. Each layer does the same at every token:

1. A query asks for `mark`. A visible token that has it gets a score of at least 24 in one of the heads. Tokens without
   it get 0.
2. Attention copies mark and bits of the marked tokens and adds them to the stream. So the token is marked, too.
3. If no visible token is marked, attention copies exact zeros, and the stream stays as it is in every bit.

So after l layers exactly those tokens are marked that have a path of l hops from the value. Only one value is planted,
so all marked tokens agree and a query need not choose between them. RMSNorm keeps the scores the same at any depth.
The MLPs are zero.

RoPE turns a score by an angle that grows with distance, down to minus its size. So three heads ask with three phases,
120 degrees apart: at any distance the phase of one is at most 60 degrees off. A head that is more than 90 degrees off
looks away from marked tokens and copies less, never another value. Without RoPE one head would do.

Legend: H heads, D head size, E hidden size.
"""

import math
from typing import Any

import torch

from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM

BITS = 4
VALUES = FILLER = 2**BITS  # token ids below FILLER are the values
HEADS, HEAD_SIZE, HIDDEN_SIZE = 3, 16, 8
GROUND, MARK = 0, 1  # features of the stream; the bits follow
CARRIED = range(MARK, MARK + 1 + BITS)  # features that attention copies
SHARPNESS = 12.0  # of queries and of keys; gives scores of at least 24, so that a token without mark weighs e^-24


def relay_config(config: WindreachConfig) -> WindreachConfig:
    """`config` with its layers, RoPE and QK-norm, but tiny."""
    sizes = {
        "vocab_size": VALUES + 1,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": HIDDEN_SIZE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_SIZE,
        "tie_word_embeddings": False,
    }
    dropped = ("model_type", "transformers_version")
    return WindreachConfig(**{k: v for k, v in config.to_dict().items() if k not in dropped} | sizes)


@torch.no_grad()
def relay_model(config: WindreachConfig) -> WindreachForCausalLM:
    """The relay with the layers of `config`, in float32 and evaluation mode."""
    model = WindreachForCausalLM(relay_config(config)).eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(float("norm" in name))
    for layer in model.model.layers:
        _set_attention(layer.self_attn)
    numbers = torch.arange(VALUES)[:, None]
    signs = (numbers >> torch.arange(BITS) & 1) * 2.0 - 1.0  # (values, bits)
    model.model.embed_tokens.weight[FILLER, GROUND] = 1.0
    model.model.embed_tokens.weight[:VALUES, MARK] = 1.0
    for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
        matrix[:VALUES, MARK + 1 : MARK + 1 + BITS] = signs
    return model


def _set_attention(attention: Any) -> None:
    """Queries read ground and mark, so that every token asks. Keys read mark. Both use the slowest pair of RoPE."""
    first, second = HEAD_SIZE // 2 - 1, HEAD_SIZE - 1
    q_hde = attention.q_proj.weight.view(HEADS, HEAD_SIZE, HIDDEN_SIZE)
    o_ehd = attention.o_proj.weight.view(HIDDEN_SIZE, HEADS, HEAD_SIZE)
    for head in range(HEADS):
        phase = 2 * math.pi * head / HEADS
        q_hde[head, first, [GROUND, MARK]] = SHARPNESS * math.cos(phase)
        q_hde[head, second, [GROUND, MARK]] = SHARPNESS * math.sin(phase)
    attention.k_proj.weight[first, MARK] = SHARPNESS
    for i, feature in enumerate(CARRIED):
        attention.v_proj.weight[i, feature] = 1.0
        o_ehd[feature, :, i] = 1.0
    if attention.q_norm is not None:  # it would undo the sharpness of the queries
        attention.q_norm.weight.fill_(SHARPNESS)
