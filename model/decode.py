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

from model.cache import write_places
from model.config import WindreachConfig
from model.places import Places, see
from model.rope import frequencies
from model.windows import LayerSpec

if TYPE_CHECKING:
    from model.cache import RingCache

FUSED_WEIGHTS = 1 << 20  # of the products of one input: larger ones are as fast apart, and then not held twice
SHORT = 256  # slots up to which attention, when compiled, is loops among others and not a call of its own
REGION = 4  # layers compiled once and run again and again: more take longer to compile, fewer to call


class Weights(NamedTuple):
    """One layer's. `qkv` and `gate_up` are one matrix each, or several."""

    qkv: tuple[Tensor, ...]
    out: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor
    norms: tuple[Tensor, Tensor]
    qk_norm: Tensor | None  # (H + G, D)
    sink_h: Tensor | None


class Kind(NamedTuple):
    """Of one kind of layers: places (B, S) of what the slots hold, the slots that the tokens go to, rotary radians."""

    positions: Tensor
    documents: Tensor
    passed: Tensor | None
    targets: Tensor
    radians: Tensor | None


class Shared(NamedTuple):
    """What the layers of a kind share: rotary tables or none, mask (B, 1, 1, S), and the slot of each row's token."""

    turn: tuple[Tensor, Tensor] | None
    mask: Tensor
    targets: Tensor


class Shape(NamedTuple):
    """What is the same in all layers."""

    heads: int
    groups: int
    head_dim: int
    eps: float


class Step:
    """A model's layers, made ready for single tokens. What it holds is as old as the weights it was made of.

    `layers`: modules of `model.decoder.DecoderLayer`, all of them `plain`.
    """

    def __init__(self, layers: nn.ModuleList, config: WindreachConfig, compiled: bool) -> None:
        self.shape = Shape(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps)
        self.layers = [_weights(layer) for layer in layers]
        self.radians = {spec: self._radians(spec, config.rope_base) for spec in dict.fromkeys(config.specs)}
        self.run = stack(config.specs, self.shape, compiled)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Step":
        """A copied cache goes on with the same weights."""
        return self

    def __call__(self, x_be: Tensor, token: Places, cache: "RingCache") -> Tensor:
        """Hidden states (B, E) of one new token a row, which the cache has begun; it is written on the way."""
        kinds = [
            Kind(slots.positions, slots.documents, slots.passed, slots.targets, self.radians[spec])
            for spec, slots in cache.slots.items()
        ]
        for layer in cache.layers:
            layer.make_room(x_be, 2 * self.shape.groups, self.shape.head_dim)
        x_be = self.run(x_be, token, kinds, self.layers, [layer.held for layer in cache.layers])
        for slots in cache.slots.values():
            slots.advance()
        return x_be

    def _radians(self, spec: LayerSpec, theta: float) -> Tensor | None:
        """Per position (H + 2G, 2, D / 2), for the halves of queries, keys and (none) values; none without RoPE."""
        if not spec.rope:
            return None
        radians = frequencies(self.shape.head_dim, spec.rope_theta or theta, self.layers[0].out.device)
        turned = torch.stack((-radians, radians)).expand(self.shape.heads + self.shape.groups, -1, -1)
        return F.pad(turned, (0, 0, 0, 0, 0, self.shape.groups))


@cache
def stack(specs: tuple[LayerSpec, ...], shape: Shape, compiled: bool) -> Callable[..., Tensor]:
    """All layers as one function; compiled, a few layers are, and the others are run by what was made of them."""
    kinds = list(dict.fromkeys(specs))
    kind_of = [kinds.index(spec) for spec in specs]
    part = torch.compiler.nested_compile_region(through_layers) if compiled else through_layers
    size = REGION if compiled else len(specs)

    def run(x_be: Tensor, token: Places, held_kinds: list[Kind], layers: list[Weights], held: list[Tensor]) -> Tensor:
        by_kind = [share(spec, token, kind, x_be.dtype) for spec, kind in zip(kinds, held_kinds, strict=True)]
        shared = [by_kind[i] for i in kind_of]
        for i in range(0, len(layers), size):
            now = slice(i, i + size)
            x_be = part(x_be, layers[now], shared[now], held[now], shape)
        return x_be

    grows = any(spec.ring_slots is None for spec in specs)  # then sizes are variables, which costs some speed
    return torch.compile(run, dynamic=None if grows else False, fullgraph=True) if compiled else run


def share(spec: LayerSpec, token: Places, kind: Kind, dtype: torch.dtype) -> Shared:
    """Write the place of one token a row; what it may see, and how far its queries and keys turn."""
    assert token.documents is not None
    write_places(*kind[:4], token.positions.flatten(), token.documents.flatten())
    seen = see(spec, token, Places(kind.positions, kind.documents))
    mask = torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None]
    if kind.radians is None:
        return Shared(None, mask, kind.targets)
    angles = token.positions[:, :, None, None] * kind.radians
    return Shared((angles.cos(), angles.sin()), mask, kind.targets)


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
    norms, counts = (attention.q_norm, attention.k_norm), [size // attention.head_dim for size in attention.sizes[:2]]
    each_head = [norm.weight.detach().expand(n, -1) for norm, n in zip(norms, counts) if norm is not None]
    return Weights(
        qkv=_fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj.weight.detach(),
        gate_up=_fuse(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.detach(),
        norms=(layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()),
        qk_norm=torch.cat(each_head) if each_head else None,
        sink_h=None if attention.sink_logits is None else attention.sink_logits.detach(),
    )


def _fuse(*projections: nn.Linear) -> tuple[Tensor, ...]:
    weights = tuple(p.weight.detach() for p in projections)
    return (torch.cat(weights),) if sum(w.numel() for w in weights) <= FUSED_WEIGHTS else weights


def through_layers(
    x_be: Tensor, layers: list[Weights], kinds: list[Shared], held: list[Tensor], shape: Shape
) -> Tensor:
    """Layers one after the other; `held` (B, S, 2G, D) of each takes the token's keys and values."""
    for weights, kind, slots in zip(layers, kinds, held, strict=True):
        normed = F.rms_norm(x_be, x_be.shape[1:], weights.norms[0], shape.eps)
        mixed = _attend(_product(normed, weights.qkv), weights, kind, slots, shape)
        x_be = x_be + F.linear(mixed, weights.out)
        normed = F.rms_norm(x_be, x_be.shape[1:], weights.norms[1], shape.eps)
        gate, up = _product(normed, weights.gate_up).chunk(2, dim=-1)
        x_be = x_be + F.linear(F.silu(gate) * up, weights.down)
    return x_be


def _product(x_be: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`x` times all weights, side by side."""
    if len(weights) == 1:
        return F.linear(x_be, weights[0])
    return torch.cat([F.linear(x_be, weight) for weight in weights], dim=-1)


def _attend(qkv: Tensor, weights: Weights, kind: Shared, held: Tensor, shape: Shape) -> Tensor:
    """Write the token's keys and values, then mix the values that it sees: (B, H * D)."""
    b, d, heads, of_both = len(qkv), shape.head_dim, shape.heads, 2 * shape.groups
    qkv = qkv.view(b, heads + of_both, d)
    if weights.qk_norm is not None:
        normed, values = qkv.split((heads + shape.groups, shape.groups), 1)
        qkv = torch.cat((F.rms_norm(normed, (d,), eps=shape.eps) * weights.qk_norm, values), 1)
    if kind.turn is not None:
        (cos, sin), (x, y) = kind.turn, qkv.unflatten(2, (2, -1)).unbind(2)
        turned = torch.stack((x * cos[:, :, 0] + y * sin[:, :, 0], y * cos[:, :, 1] + x * sin[:, :, 1]), 2)
        qkv = turned.flatten(2).to(qkv.dtype)
    held.view(-1, of_both, d).index_copy_(0, kind.targets, qkv[:, heads:])
    keys, values = held.transpose(1, 2).chunk(2, dim=1)
    q = qkv[:, :heads].reshape(b, shape.groups, -1, d)  # the R heads of a group stand as queries
    return _mix(q, keys, values, kind.mask, weights.sink_h).reshape(b, -1)


def _mix(q_bgrd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, mask: Tensor, sink_h: Tensor | None) -> Tensor:
    """Attention (B, G, R, D); a head's sink takes its share as a column more in the softmax."""
    in_loops = torch.compiler.is_compiling() and k_bgsd.shape[2] <= SHORT
    if sink_h is None and not in_loops:
        return F.scaled_dot_product_attention(q_bgrd, k_bgsd, v_bgsd, mask)
    scores = (q_bgrd[:, :, :, None] * k_bgsd[:, :, None]).sum(-1) if in_loops else q_bgrd @ k_bgsd.mT
    scores = scores.float() * q_bgrd.shape[-1] ** -0.5 + mask
    if sink_h is not None:
        sinks = sink_h.float().view(1, *q_bgrd.shape[1:3], 1).expand(len(scores), -1, -1, -1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : k_bgsd.shape[2]].to(v_bgsd.dtype)
    return (weights[..., None] * v_bgsd[:, :, None]).sum(-2) if in_loops else weights @ v_bgsd
