"""A small decoder in ordinary torch code, with the calls of transformers' models, in which faults can be planted.

`PlainDecoder(specs, mask=...)` replaces one of its methods. Masks, positions, cache and attention are written out here,
and share nothing with what they are checked by.

Legend: B rows, T queries, S keys, H heads, D head size.
"""

from collections.abc import Callable, Sequence
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.windows import LayerSpec

HIDDEN, HEADS, VOCAB = 32, 4, 61


class Call(NamedTuple):
    """What one forward pass is about. past: tokens in the cache. prefill: tokens of the first call with this cache."""

    training: bool
    past: int
    tokens: int
    prefill: int
    packed: bool
    padded: bool
    cached: bool


class Tokens(NamedTuple):
    """Positions in their documents, document ids (-1 for padding) and columns in the row, each (B, S)."""

    positions: Tensor
    documents: Tensor
    columns: Tensor

    def only(self, columns: Any) -> "Tokens":
        return Tokens(*(values[:, columns] for values in self))


class Cache:
    def __init__(self, layers: int) -> None:
        self.keys: list[tuple[Tensor, Tensor, Tokens] | None] = [None] * layers
        self.length = self.prefill = 0


class Attention(nn.Module):
    def __init__(self, model: "PlainDecoder", layer: int) -> None:
        super().__init__()
        self.spec, self.layer, self.decoder = model.config.specs[layer], layer, [model]
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.scaling = (HIDDEN / HEADS) ** -0.5
        if self.spec.sink:
            self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, call: Call, tokens: Tokens, cache: Cache | None) -> Tensor:
        model = self.decoder[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        rope = model.rope_positions(call, tokens)
        q, k, keys = rotate(q, rope) * self.scaling, rotate(k, rope), tokens
        if cache is not None:
            k, v, keys = model.extend(self.spec, call, cache, self.layer, (k, v, keys))
        mask = model.mask(self.spec, call, tokens, keys) & model.same_document(call, tokens, keys)
        sinks = model.sinks(call, self.sinks) if self.spec.sink else None
        return self.out(model.attend(q, k, v, mask[:, None], sinks).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, model: "PlainDecoder", layer: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(HIDDEN), Attention(model, layer)
        self.mlp = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 64), nn.GELU(), nn.Linear(64, HIDDEN))

    def forward(self, x: Tensor, call: Call, tokens: Tokens, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.norm(x), call, tokens, cache)
        return x + self.mlp(x)


class PlainDecoder(nn.Module):
    def __init__(self, specs: Sequence[LayerSpec], **replaced: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=len(specs), vocab_size=VOCAB, specs=tuple(specs))
        self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.layers = nn.ModuleList(Layer(self, n) for n in range(len(specs)))
        for layer in self.layers:
            nn.init.normal_(layer.attention.qkv.weight, std=0.3)
        for name, method in replaced.items():
            assert hasattr(PlainDecoder, name)
            setattr(self, name, MethodType(method, self))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        labels: Tensor | None = None,
    ) -> SimpleNamespace:
        cache = (past_key_values or Cache(len(self.layers))) if use_cache else None
        past, tokens = cache.length if cache else 0, input_ids.shape[1]
        padded = attention_mask is not None and not bool(attention_mask.all())
        packed = position_ids is not None and attention_mask is None and cache is None
        if cache:
            cache.length, cache.prefill = past + tokens, cache.prefill or tokens
        call = Call(self.training, past, tokens, cache.prefill if cache else 0, packed, padded, cache is not None)
        told = self.describe(call, input_ids, attention_mask, position_ids)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, call, told, cache)
        return SimpleNamespace(logits=self.head(x), past_key_values=cache)

    def generate(
        self, input_ids: Tensor, logits_processor: list[Any], max_new_tokens: int, **_: Any
    ) -> SimpleNamespace:
        ids, fed, cache, logits = input_ids, input_ids, None, []
        for _step in range(max_new_tokens):
            output = self(fed, position_ids=self.next_positions(ids, fed), past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
            fed = logits_processor[0](ids, logits[-1]).argmax(-1, keepdim=True)
            ids = torch.cat((ids, fed), 1)
        return SimpleNamespace(logits=tuple(logits))

    def next_positions(self, ids: Tensor, fed: Tensor) -> Tensor:
        return torch.arange(ids.shape[1] - fed.shape[1], ids.shape[1]).expand_as(fed)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)

    def describe(self, call: Call, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tokens:
        columns = torch.arange(call.past, call.past + call.tokens).expand_as(ids)
        positions = columns if position_ids is None else position_ids.expand_as(ids)
        documents = torch.zeros_like(ids) if mask is None else mask[:, -call.tokens :].long() - 1
        if call.packed:
            documents = F.pad((positions.diff(dim=1) != 1).cumsum(1), (1, 0))
        return Tokens(positions, documents, columns)

    def rope_positions(self, call: Call, tokens: Tokens) -> Tensor:
        return tokens.positions

    def mask(self, spec: LayerSpec, call: Call, q: Tokens, k: Tokens) -> Tensor:
        """The keys that a layer may see, bool (B, T, S)."""
        return window_mask(spec, q.positions[:, :, None], k.positions[:, None])

    def same_document(self, call: Call, q: Tokens, k: Tokens) -> Tensor:
        return (q.documents[:, :, None] == k.documents[:, None]) & (k.documents >= 0)[:, None]

    def extend(self, spec: LayerSpec, call: Call, cache: Cache, layer: int, new: tuple[Tensor, Tensor, Tokens]) -> Any:
        """The keys, values and tokens of the cache and of this call; keeps what the next call may need."""
        k, v, tokens = new
        if (old := cache.keys[layer]) is not None:
            k, v = torch.cat((old[0], k), 2), torch.cat((old[1], v), 2)
            tokens = Tokens(*(torch.cat(pair, 1) for pair in zip(old[2], tokens)))
        kept = self.kept(spec, call, tokens)
        cache.keys[layer] = (k[:, :, kept], v[:, :, kept], tokens.only(kept))
        return k, v, tokens

    def kept(self, spec: LayerSpec, call: Call, tokens: Tokens) -> Tensor:
        """The columns of the cache that stay: the last window, and global tokens of the row."""
        columns = tokens.columns[0]
        if spec.ring_slots is None:
            return torch.arange(len(columns))
        stays = columns > columns[-1] + 1 - spec.ring_slots
        pads = int((tokens.documents < 0).sum(1).max())
        return (stays | (columns < spec.global_tokens + pads)).nonzero().flatten()

    def sinks(self, call: Call, sinks: Tensor) -> Tensor | None:
        return sinks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
        """q (B, H, T, D), scaled, k and v (B, H, S, D), mask (B, 1, T, S); returns (B, H, T, D)."""
        scores = (q @ k.transpose(2, 3)).masked_fill(~mask, -1e30)
        if sinks is None:
            return scores.softmax(-1) @ v
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def window_mask(spec: LayerSpec, q: Tensor, k: Tensor) -> Tensor:
    """A mask by positions, whatever shapes these broadcast to."""
    seen, window = k <= q, spec.window or 0
    if spec.kind == "sliding":
        seen = seen & (q - k < window)
    if spec.kind == "chunked":
        seen = seen & (q // window == k // window)
    if spec.kind == "dilated":
        seen = seen & (q - k < window * spec.dilation) & ((q - k) % spec.dilation == 0)
    return seen | ((k < spec.global_tokens) & (k <= q))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE: x (B, H, T, D), positions (B, T)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * 0.1 ** torch.arange(half)
    a, b = x.split(half, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
