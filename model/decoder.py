"""The decoder: RMSNorm, grouped-query attention under a window, SwiGLU. Parameter names are Mistral's.

Legend: B batch, T positions, H heads, G kv heads, D head size, E hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from model.attention.backends import choose_backend
from model.attention.plan import attend, attend_after, dtype_of_products, prepare, tiles_from
from model.cache import RingCache, RingLayer, Tail
from model.config import WindreachConfig
from model.decode import Step, plain
from model.errors import UserError
from model.places import Places, restarts, split
from model.rope import Rotary, rotary_tables, rotate
from model.windows import LayerSpec

PREFILL_TOKENS = 1024  # that pass through the layers at a time behind a cache: any number gives the same logits


class RMSNorm(nn.RMSNorm):
    """Sharded training hands out bfloat16 weights beside a float32 stream, for which torch has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: WindreachConfig, spec: LayerSpec, backend: str) -> None:
        super().__init__()
        e, d, h, g = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.spec, self.backend, self.head_dim, self.sizes = spec, backend, d, (h * d, g * d, g * d)
        self.q_proj = nn.Linear(e, h * d, bias=False)
        self.k_proj = nn.Linear(e, g * d, bias=False)
        self.v_proj = nn.Linear(e, g * d, bias=False)
        self.o_proj = nn.Linear(h * d, e, bias=False)
        self.sink_logits = nn.Parameter(torch.zeros(h)) if spec.sink else None
        self.q_norm = RMSNorm(d, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_bte: Tensor, rotary: Rotary | None, places: Places, cache: RingLayer | None) -> Tensor:
        b, t, _ = x_bte.shape
        q, k, v = (x.view(b, t, -1, self.head_dim).transpose(1, 2) for x in self._project(x_bte))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is None:
            out = attend(q, k, v, self.spec, places, self.backend, self.sink_logits)
        else:
            (seen_k, seen_v), at = cache.view(k, v), cache.slots
            out = attend_after(q, seen_k, seen_v, self.spec, at.queries, at.keys, self.backend, self.sink_logits)
            cache.write(k, v)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))

    def _project(self, x_bte: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values; one fused product in training, where the weights' concatenation is cheap."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self.training:
            fused = torch.cat([p.weight for p in projections])
            return F.linear(x_bte, fused).split(self.sizes, dim=-1)
        return tuple(p(x_bte) for p in projections)


class MLP(nn.Module):
    def __init__(self, config: WindreachConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_bte: Tensor) -> Tensor:
        if self.training:
            gate, up = F.linear(x_bte, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x_bte), self.up_proj(x_bte)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: WindreachConfig, spec: LayerSpec, backend: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, spec, backend)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_bte: Tensor, rotary: Rotary | None, places: Places, cache: RingLayer | None = None) -> Tensor:
        x_bte = x_bte + self.self_attn(self.input_layernorm(x_bte), rotary, places, cache)
        return x_bte + self.mlp(self.post_attention_layernorm(x_bte))


class WindreachModel(nn.Module):
    """Embedding, layers and final norm: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: WindreachConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = choose_backend(config.attention_backend, config.specs, config.head_dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, spec, self.backend) for spec in config.specs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = (
            False  # this and the next are set by transformers' activation_checkpointing_enable
        )
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint
        self.compiled_step = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        positions_to_keep: int = 0,
    ) -> BaseModelOutputWithPast:
        """`documents` (B, T): ids of packed documents, -1 for padding; else `attention_mask` (B, S), 0 for padding.

        `positions_to_keep`: the last ones, of which alone hidden states are asked; 0 for all. Of a long prompt behind a
        cache no others are held.
        """
        if not isinstance(past_key_values, RingCache | None):
            kind = type(past_key_values).__name__
            raise UserError(f"past_key_values is a {kind}; pass a model.cache.RingCache or none")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise UserError("nothing to read: give input_ids or inputs_embeds")
        if given.shape[1] == 0:
            raise UserError("the input is empty; give at least one token a row")
        if past_key_values is not None:
            past_key_values.serve(self, self.config.specs)
        places = _places(given, documents, attention_mask, position_ids, past_key_values)
        if past_key_values is None:
            streams = self._whole(self._embed(given), places, output_hidden_states)
        elif (step := self._step(given, past_key_values, output_hidden_states)) is not None:
            past_key_values.begin(places)
            streams = [step(self._embed(given)[:, 0], places, past_key_values)[:, None]]
        else:
            streams = self._in_slices(given, places, past_key_values, output_hidden_states, positions_to_keep)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(streams[-1]),
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if output_hidden_states else None,
        )

    def _embed(self, given: Tensor) -> Tensor:
        """Embeddings (B, T, E) of token ids (B, T), or those that were given."""
        return self.embed_tokens(given) if given.ndim == 2 else given

    def _whole(self, x: Tensor, places: Places, keep: bool) -> list[Tensor]:
        """The residual stream (B, T, E) after the last layer, or (`keep`) before the first and after each."""
        tiles = tiles_from(dtype_of_products(x), self.config.head_dim)
        kinds = dict.fromkeys(self.config.specs)
        of_kind = {spec: prepare(spec, places, self.backend, len(x), tiles) for spec in kinds}
        rotary, streams = self._rotary(places.positions), [x]
        for layer, spec in zip(self.layers, self.config.specs):
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer, x, rotary[spec], of_kind[spec])
            else:
                x = layer(x, rotary[spec], of_kind[spec])
            streams = [*streams, x] if keep else [x]
        return streams

    def _in_slices(self, given: Tensor, places: Places, cache: RingCache, keep: bool, last: int) -> list[Tensor]:
        """The same behind a cache, however long the chunk, in the memory of a slice and of the `last` positions."""
        parts: list[list[Tensor]] = []
        unwanted = given.shape[1] - last if last else 0
        for part, at in zip(given.split(PREFILL_TOKENS, 1), split(places, PREFILL_TOKENS)):
            streams = self._behind(self._embed(part), at, cache, keep)
            if unwanted < part.shape[1]:
                parts.append([stream[:, max(0, unwanted) :] for stream in streams])
            unwanted -= part.shape[1]
        return [torch.cat(stream, 1) for stream in zip(*parts)]

    def _behind(self, x: Tensor, places: Places, cache: RingCache, keep: bool) -> list[Tensor]:
        cache.begin(places)
        for slots in cache.slots.values():
            slots.look_back(self.backend)
        rotary, streams = self._rotary(places.positions), [x]
        for layer, spec, ring in zip(self.layers, self.config.specs, cache.layers):
            x = layer(x, rotary[spec], places, ring)
            streams = [*streams, x] if keep else [x]
        cache.commit()
        return streams

    def _step(self, given: Tensor, cache: RingCache, keep: bool) -> Step | None:
        """The short way for a single token, where there is nothing but inference of the layers as they are."""
        several, device = given.shape[1] > 1, given.device.type
        watched = several or keep or torch.is_grad_enabled() or torch.is_autocast_enabled(device)
        if watched or self.backend == "reference":
            return None
        if cache.step is None and plain(self.layers):
            cache.step = Step(self.layers, self.config, self.compiled_step)
        return cache.step

    def _rotary(self, positions: Tensor) -> dict[LayerSpec, Rotary | None]:
        """Rotary tables of each layer kind; kinds of the same theta share one."""
        tables: dict[float, Rotary] = {}
        chosen: dict[LayerSpec, Rotary | None] = {}
        for spec in dict.fromkeys(self.config.specs):
            theta = spec.rope_theta or self.config.rope_base
            if spec.rope and theta not in tables:
                tables[theta] = rotary_tables(positions, self.config.head_dim, theta)
            chosen[spec] = tables[theta] if spec.rope else None
        return chosen


def _places(
    given: Tensor,
    documents: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: RingCache | None,
) -> Places:
    """Positions inside each row's document, and document ids where there are several or padding, or a cache."""
    b, t = given.shape[:2]
    if documents is None and attention_mask is not None and not bool(attention_mask.all()):
        documents = attention_mask[:, -t:].long() - 1
    if documents is None and cache is not None:
        documents = torch.zeros(b, t, dtype=torch.long, device=given.device)
    if documents is None and position_ids is not None:
        documents = restarts(position_ids)
    if documents is None:
        index = torch.arange(t, device=given.device)[None]
        return Places(index if position_ids is None else position_ids)
    if cache is not None and t == 1:
        places, cache.tail = cache.tail_for(documents).one_more(documents)
    else:
        places = _count(documents, cache)
    return places if position_ids is None else Places(position_ids.expand(b, t), places.documents)


def _count(documents: Tensor, cache: RingCache | None) -> Places:
    """Positions from the start of each document, continued from the cache, and an id for each that never returns.

    Padding inside a document does not start it anew; an id that comes back after another document does:

        >>> places = _count(torch.tensor([[-1, 0, 0, -1, 0, 1, 0]]), None)
        >>> places.positions.tolist(), places.documents.tolist()
        ([[0, 0, 1, 2, 3, 0, 0]], [[-1, 1, 1, -1, 1, 2, 3]])
    """
    tail = Tail.none(documents) if cache is None else cache.tail_for(documents)
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    real = documents >= 0
    latest = torch.where(real, index, -1).cummax(1).values
    latest_id = torch.where(latest >= 0, documents.gather(1, latest.clamp_min(0)), tail.documents[:, None])
    starts = real & (documents != torch.cat((tail.documents[:, None], latest_id[:, :-1]), 1))
    begin = torch.where(starts, index, -1).cummax(1).values
    positions = torch.where(begin >= 0, index - begin, tail.positions[:, None] + index)
    number = tail.numbers[:, None] + starts.cumsum(1)
    if cache is not None:
        cache.tail = Tail(positions[:, -1] + 1, latest_id[:, -1], number[:, -1])
    return Places(positions, torch.where(real, number, -1))


class WindreachForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. A stack of equal sliding layers is saved as, and is, a Mistral checkpoint (`model.hub`)."""

    config_class = WindreachConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _is_stateful = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # told to `transformers.Trainer`: `forward` takes `num_items_in_batch`

    def __init__(self, config: WindreachConfig) -> None:
        super().__init__(config)
        self.model = WindreachModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        documents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, V). `labels` (B, T) as in transformers: not shifted, -100 is ignored.

        `num_items_in_batch`: divide the summed loss by it instead of by the tokens of this call. `transformers.Trainer`
        passes the tokens of all micro-batches of a step.
        """
        if use_cache and past_key_values is None:
            past_key_values = RingCache(self.config)
        hidden = self.model(
            input_ids, documents, attention_mask, position_ids, past_key_values, inputs_embeds,
            positions_to_keep=logits_to_keep,
        ).last_hidden_state  # fmt: skip
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def compile_layers(self) -> None:
        """Compile layer by layer: layers of one kind share one compilation."""
        for layer in self.model.layers:
            layer.compile()

    def compile_decoding(self) -> None:
        """Compile the step of single tokens, when the next cache comes to it. Each batch size is compiled anew."""
        self.model.compiled_step = True

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        """`generate` gets a ring unless it brings a cache or wants none."""
        if generation_config.cache_implementation is not None:
            raise UserError(
                f"cache_implementation is {generation_config.cache_implementation!r}, a cache of transformers that the "
                "model can't take; leave it out, and it gets a ring"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RingCache(self.config)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Positions are the cache's business: those that `generate` counts are dropped."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


@dataclass(frozen=True)
class InitOptions:
    """How weights start: normal, std 1/sqrt(fan-in) unless given; residual outputs divided by sqrt(2 * layers)."""

    std: float | None = None
    embedding_std: float = 1.0
    scale_residual_by_depth: bool = True
    copy_first_layer: bool = False


def build_model(config: WindreachConfig, init: InitOptions | None = None, seed: int = 0) -> WindreachForCausalLM:
    """A new model with weights drawn from `seed`, whatever the global random state is."""
    model = WindreachForCausalLM(config)
    _initialise(model, init or InitOptions(), torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _initialise(model: WindreachForCausalLM, init: InitOptions, generator: torch.Generator) -> None:
    residual = 1 / math.sqrt(2 * len(model.model.layers)) if init.scale_residual_by_depth else 1.0
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        std = init.embedding_std if "embed_tokens" in name else init.std or 1 / math.sqrt(weight.shape[1])
        scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        weight.normal_(0.0, std * scale, generator=generator)
    if init.copy_first_layer:
        first = model.model.layers[0].state_dict()
        for layer in model.model.layers[1:]:
            layer.load_state_dict(first)
