"""One token a row through all layers, where calls cost more than arithmetic: what a small model's decoding is made of.

The layers' own `forward` makes some sixty calls a layer, and here they are about twenty. Products of one input are one,
queries and keys are turned together, keys and values are a single write, and what the layers of a kind share (slots,
mask, rotary tables) is made once. Every shape but those of full layers stays the same from token to token.

Legend: B rows, E hidden size, H heads, G kv heads, R = H / G, S slots, D head size.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Places, see
from model.windows import LayerSpec

if TYPE_CHECKING:
    from model.cache import RingCache, RingLayer, Slots
    from model.rope import Rotary

FUSED_WEIGHTS = (
    1 << 20
)  # of the products of a layer with one input: those of more are as fast apart, and not held twice


class Step:
    """The layers' weights, made ready for single tokens. It is as old as they were: make a new one when they change.

    `layers`: modules of `model.decoder.DecoderLayer`, all `plain`.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = [_Weights(layer) for layer in layers]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Step":
        """A copied cache goes on with the same weights."""
        return self

    def __call__(self, x_be: Tensor, rotary: dict[LayerSpec, "Rotary | None"], cache: "RingCache") -> Tensor:
        """Hidden states (B, E) of one new token a row, which the cache has begun; it is written on the way."""
        cache.commit()
        heads = self.layers[0]
        turns = {spec: None if tables is None else heads.turn(*tables) for spec, tables in rotary.items()}
        masks = {spec: mask_of(slots, x_be.dtype) for spec, slots in cache.slots.items()}
        for weights, layer in zip(self.layers, cache.layers):
            spec = layer.slots.spec
            x_be = weights.forward(x_be, turns[spec], masks[spec], layer)
        return x_be


def plain(layers: nn.ModuleList) -> bool:
    """Whether the layers do what their classes say: no adapter, hook or shard has been put in or around a module."""
    known = ("model.decoder", "torch.nn.modules")
    return all(
        type(module).__module__.startswith(known)
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for module in layers.modules()
    )


def mask_of(slots: "Slots", dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, S) to add to the scores of the newest token: 0 where it sees a slot, else -inf."""
    seen = see(slots.spec, slots.chunk, Places(slots.positions, slots.documents))
    return torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None]


class _Weights:
    """One layer's."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        self.heads, self.groups = (size // self.head_dim for size in attention.sizes[:2])
        self.qkv = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _fuse(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = attention.o_proj.weight.detach().t(), mlp.down_proj.weight.detach().t()
        self.norms = [
            (norm.weight.detach(), norm.eps) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self.sinks = None if attention.sink_logits is None else attention.sink_logits.detach()

    def turn(self, cos_btd: Tensor, sin_btd: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables (B, H + 2G, 1 or 2, D / 2) for halves of queries, keys and (left as they are) values."""
        cos, sin = (x[..., : self.head_dim // 2].expand(-1, self.heads + self.groups, -1) for x in (cos_btd, sin_btd))
        cos, sin = F.pad(cos, (0, 0, 0, self.groups), value=1.0), F.pad(sin, (0, 0, 0, self.groups))
        return cos[:, :, None], torch.stack((-sin, sin), 2)

    def forward(self, x_be: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor, cache: "RingLayer") -> Tensor:
        mixed = self._attend(self._norm(0, x_be), turn, mask, cache)
        x_be = torch.addmm(x_be, mixed, self.out)
        gate, up = _product(self._norm(1, x_be), self.gate_up).chunk(2, dim=-1)
        return torch.addmm(x_be, F.silu(gate) * up, self.down)

    def _norm(self, i: int, x_be: Tensor) -> Tensor:
        weight, eps = self.norms[i]
        return F.rms_norm(x_be, weight.shape, weight, eps)

    def _attend(self, x_be: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor, cache: "RingLayer") -> Tensor:
        qkv = _product(x_be, self.qkv).view(len(x_be), -1, 2, self.head_dim // 2)
        if turn is not None:
            qkv = torch.addcmul(qkv * turn[0], qkv.flip(2), turn[1]).to(qkv.dtype)
        qkv = qkv.flatten(2)
        cache.put(qkv[:, self.heads :])
        q = qkv[:, : self.heads].unflatten(1, (self.groups, -1))  # the R heads of a group stand as queries
        if self.sinks is None:
            out = F.scaled_dot_product_attention(q, cache.keys, cache.values, mask)
        else:
            out = _beside_sinks(q, cache.keys, cache.values, mask, self.sinks)
        return out.reshape(len(x_be), -1)


def _fuse(*projections: nn.Linear) -> tuple[Tensor, ...]:
    weights = tuple(p.weight.detach() for p in projections)
    return (torch.cat(weights),) if sum(w.numel() for w in weights) <= FUSED_WEIGHTS else weights


def _product(x_be: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`x` times all weights, side by side."""
    if len(weights) == 1:
        return F.linear(x_be, weights[0])
    return torch.cat([F.linear(x_be, weight) for weight in weights], dim=-1)


def _beside_sinks(q_bgrd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, mask: Tensor, sink_h: Tensor) -> Tensor:
    """Attention (B, G, R, D) of which each head's sink takes its share: a column more in the softmax."""
    scores = (q_bgrd @ k_bgsd.mT).float() * q_bgrd.shape[-1] ** -0.5 + mask
    sinks = sink_h.float().view(1, *q_bgrd.shape[1:3], 1).expand(len(scores), -1, -1, -1)
    weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    return weights.to(v_bgsd.dtype) @ v_bgsd
