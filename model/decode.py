"""One token a row through all layers, where calls cost more than arithmetic: what decoding a small model is made of.

The layers' own `forward` makes some sixty calls a layer, and here they are about twenty. Products of one input are one,
queries and keys are turned together, keys and values are a single write, and what the layers of a kind share (slots,
mask, rotary tables) is made once. Every shape but those of full layers stays the same from token to token, so that the
whole can be compiled.

Legend: B rows, E hidden size, H heads, G kv heads, R = H / G, S slots, D head size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.places import Places, see
from model.rope import Rotary
from model.windows import LayerSpec

if TYPE_CHECKING:
    from model.cache import RingCache, Slots

FUSED_WEIGHTS = 1 << 20  # of the products of one input: larger ones are as fast apart, and then not held twice


class Weights(NamedTuple):
    """One layer's. `qkv` and `gate_up` are one matrix or several, `out` and `down` are transposed."""

    qkv: tuple[Tensor, ...]
    out: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor
    norms: tuple[Tensor, Tensor]
    sink_h: Tensor | None


class Shared(NamedTuple):
    """What the layers of a kind share: rotary tables or none, mask (B, 1, 1, S), and the slot of each row's token."""

    turn: tuple[Tensor, Tensor] | None
    mask: Tensor
    targets: Tensor


class Step:
    """A model's layers, made ready for single tokens. What it holds is as old as the weights it was made of.

    `layers`: modules of `model.decoder.DecoderLayer`, all of them `plain`.
    """

    def __init__(self, layers: nn.ModuleList, compiled: bool) -> None:
        first: Any = layers[0]
        attention = first.self_attn
        self.heads, self.groups = (size // attention.head_dim for size in attention.sizes[:2])
        self.eps: float = first.input_layernorm.eps
        self.layers = [_weights(layer) for layer in layers]
        self.run = _compiled() if compiled else through_layers

    def __deepcopy__(self, memo: dict[int, Any]) -> "Step":
        """A copied cache goes on with the same weights."""
        return self

    def __call__(self, x_be: Tensor, rotary: dict[LayerSpec, Rotary | None], cache: "RingCache") -> Tensor:
        """Hidden states (B, E) of one new token a row, which the cache has begun; it is written on the way."""
        cache.commit()
        shared = {spec: self._shared(slots, rotary[spec], x_be.dtype) for spec, slots in cache.slots.items()}
        for layer in cache.layers:
            layer.make_room(x_be, 2 * self.groups, self.layers[0].out.shape[0] // self.heads)
        kinds = [shared[layer.slots.spec] for layer in cache.layers]
        return self.run(x_be, self.layers, kinds, [layer.held for layer in cache.layers], self.heads, self.eps)

    def _shared(self, slots: "Slots", tables: Rotary | None, dtype: torch.dtype) -> Shared:
        seen = see(slots.spec, slots.chunk, Places(slots.positions, slots.documents))
        mask = torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None]
        return Shared(None if tables is None else self._turn(*tables), mask, slots.targets)

    def _turn(self, cos_btd: Tensor, sin_btd: Tensor) -> tuple[Tensor, Tensor]:
        """Tables (B, H + 2G, 1 or 2, D / 2) for the halves of queries, keys and (left as they are) values."""
        cos, sin = (x.chunk(2, -1)[0].expand(-1, self.heads + self.groups, -1) for x in (cos_btd, sin_btd))
        cos, sin = F.pad(cos, (0, 0, 0, self.groups), value=1.0), F.pad(sin, (0, 0, 0, self.groups))
        return cos[:, :, None], torch.stack((-sin, sin), 2)


def plain(layers: nn.ModuleList) -> bool:
    """Whether the layers do what their classes say: no adapter, hook or shard was put in or around a module."""
    known = ("model.decoder", "torch.nn.modules")
    return all(
        type(module).__module__.startswith(known)
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for module in layers.modules()
    )


def _weights(layer: Any) -> Weights:
    attention, mlp = layer.self_attn, layer.mlp
    return Weights(
        qkv=_fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj.weight.detach().t(),
        gate_up=_fuse(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.detach().t(),
        norms=(layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()),
        sink_h=None if attention.sink_logits is None else attention.sink_logits.detach(),
    )


def _fuse(*projections: nn.Linear) -> tuple[Tensor, ...]:
    weights = tuple(p.weight.detach() for p in projections)
    return (torch.cat(weights),) if sum(w.numel() for w in weights) <= FUSED_WEIGHTS else weights


def through_layers(
    x_be: Tensor, layers: list[Weights], kinds: list[Shared], held: list[Tensor], heads: int, eps: float
) -> Tensor:
    """All layers one after the other; `held` (B, S, 2G, D) of each takes the token's keys and values."""
    for weights, kind, slots in zip(layers, kinds, held, strict=True):
        x_be = through_layer(x_be, weights, kind, slots, heads, eps)
    return x_be


def through_layer(x_be: Tensor, weights: Weights, kind: Shared, held: Tensor, heads: int, eps: float) -> Tensor:
    normed = F.rms_norm(x_be, x_be.shape[1:], weights.norms[0], eps)
    mixed = _attend(_product(normed, weights.qkv), weights.sink_h, kind, held, heads)
    x_be = torch.addmm(x_be, mixed, weights.out)
    normed = F.rms_norm(x_be, x_be.shape[1:], weights.norms[1], eps)
    gate, up = _product(normed, weights.gate_up).chunk(2, dim=-1)
    return torch.addmm(x_be, F.silu(gate) * up, weights.down)


def _product(x_be: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`x` times all weights, side by side."""
    if len(weights) == 1:
        return F.linear(x_be, weights[0])
    return torch.cat([F.linear(x_be, weight) for weight in weights], dim=-1)


def _attend(qkv: Tensor, sink_h: Tensor | None, kind: Shared, held: Tensor, heads: int) -> Tensor:
    """Write the token's keys and values, then mix the values that it sees: (B, H * D)."""
    b, _, both, d = held.shape
    qkv = qkv.view(b, heads + both, 2, d // 2)
    if kind.turn is not None:
        qkv = torch.addcmul(qkv * kind.turn[0], qkv.flip(2), kind.turn[1]).to(qkv.dtype)
    qkv = qkv.view(b, heads + both, d)
    held.view(-1, both, d).index_copy_(0, kind.targets, qkv[:, heads:])
    keys, values = held.transpose(1, 2).chunk(2, dim=1)
    q = qkv[:, :heads].reshape(b, both // 2, -1, d)  # the R heads of a group stand as queries
    if sink_h is None:
        return F.scaled_dot_product_attention(q, keys, values, kind.mask).reshape(b, -1)
    return _beside_sinks(q, keys, values, kind.mask, sink_h).reshape(b, -1)


def _beside_sinks(q_bgrd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, mask: Tensor, sink_h: Tensor) -> Tensor:
    """Attention (B, G, R, D) of which each head's sink takes its share: a column more in the softmax."""
    scores = (q_bgrd @ k_bgsd.mT).float() * q_bgrd.shape[-1] ** -0.5 + mask
    sinks = sink_h.float().view(1, *q_bgrd.shape[1:3], 1).expand(len(scores), -1, -1, -1)
    weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    return weights.to(v_bgsd.dtype) @ v_bgsd


@cache
def _compiled() -> Callable[..., Tensor]:
    """`through_layers` compiled as a whole, of which each kind of layer is compiled once."""
    region = torch.compiler.nested_compile_region(through_layer)

    def run(
        x_be: Tensor, layers: list[Weights], kinds: list[Shared], held: list[Tensor], heads: int, eps: float
    ) -> Tensor:
        for weights, kind, slots in zip(layers, kinds, held, strict=True):
            x_be = region(x_be, weights, kind, slots, heads, eps)
        return x_be

    return torch.compile(run, fullgraph=True)
