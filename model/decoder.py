"""The decoder: RMSNorm, grouped-query attention under a window, SwiGLU. Names and shapes in files are Mistral's.

Training, evaluation, generation and adapters run the same modules. Only the attention that they are given differs: that
of whole rows, of a chunk behind a cache, or of a single token over the slots of a cache.

Legend: B batch, T positions, H heads, G kv heads, D head size, E hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from model.attention import Attend, AttentionPlan, check_backend, plan_attention, product_dtype
from model.cache import RingCache, RingLayer, Slots, can_record
from model.config import WindreachConfig
from model.errors import UserError
from model.hub import SavedWeights, check_shapes, load_config, load_generation_config, save_hf
from model.packing import Packing, RowEnds, count_positions
from model.projections import FusedProjections
from model.rope import Rope, Rotary, rope_of, rotary_tables, rotate
from model.windows import LayerSpec

REGION = 4  # layers compiled as one unit, which is then called in turn: more compile longer, fewer need more calls
PREFILL_TOKENS = 1024  # of a chunk behind a cache that pass through the layers at a time; any number gives the same


class RMSNorm(nn.RMSNorm):
    """Sharded training hands out bfloat16 weights beside a float32 stream, for which PyTorch has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(FusedProjections):
    def __init__(self, config: WindreachConfig, spec: LayerSpec) -> None:
        e, d, h, g = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        super().__init__("qkv_weight", e, (h * d, g * d, g * d), config.qkv_bias)
        self.head_dim, self.groups = d, g
        self.o_proj = nn.Linear(h * d, e, bias=False)
        self.sink_logits = nn.Parameter(torch.zeros(h)) if spec.sink else None
        self.q_norm = RMSNorm(d, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(d, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_bte: Tensor, rotary: Rotary | None, attend: Attend, cache: RingLayer | None) -> Tensor:
        b, t, _ = x_bte.shape
        heads = self.project(x_bte).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((heads.shape[1] - 2 * self.groups, self.groups, self.groups), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        out = attend(q, k, v, self.sink_logits)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(FusedProjections):
    def __init__(self, config: WindreachConfig) -> None:
        super().__init__("gate_up_weight", config.hidden_size, (config.intermediate_size, config.intermediate_size))
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_bte: Tensor) -> Tensor:
        gate, up = self.project(x_bte).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: WindreachConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.self_attn = Attention(config, spec)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_bte: Tensor, rotary: Rotary | None, attend: Attend, cache: RingLayer | None = None) -> Tensor:
        x_bte = x_bte + self.self_attn(self.input_layernorm(x_bte), rotary, attend, cache)
        return x_bte + self.mlp(self.post_attention_layernorm(x_bte))


Call = tuple[nn.Module, Rotary | None, Attend, RingLayer | None]  # a layer and its arguments after the stream


class WindreachModel(nn.Module):
    """Embedding, layers and final norm: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: WindreachConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, spec) for spec in config.specs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.reconfigure(config)
        # transformers' activation_checkpointing_enable sets these two.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint
        self._decode: Callable[..., Tensor] = self._run_one_token
        self._run_region: Callable[..., Tensor] = _run_region
        self._structure = ""  # of the modules when decoding was compiled or recorded; empty: neither

    def reconfigure(self, config: WindreachConfig) -> None:
        """From now on the layers see, and rotate positions, as `config` says. Its sizes are those of the weights."""
        check_backend(config.attention_backend, config.specs, config.head_dim)
        self.config, self.specs = config, config.specs
        self.kinds = tuple(dict.fromkeys(self.specs))
        self.kind_of_layer = [self.kinds.index(spec) for spec in self.specs]
        self.kinds_of_region = [str(self.kind_of_layer[i : i + REGION]) for i in range(0, len(self.specs), REGION)]
        self.ropes: list[Rope | None] = []  # of each kind, on the device of the last call: no buffers, which would be
        self.ropes_on: torch.device | None = None  # rounded with the weights, and lost on the meta device

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
        packing: Packing | None = None,
    ) -> BaseModelOutputWithPast:
        """`documents` (B, T): ids of packed documents, -1 for padding. Else `attention_mask` (B, S), 0 for padding.

        `packing` says the same, and what the host knows of it, so that nobody waits for a GPU.

        `positions_to_keep`: return hidden states of the last positions only, 0 for all. With a cache, those of a long
        prompt's other positions never exist all at once.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        cache = self._checked_cache(tokens, past_key_values)
        assert tokens is not None
        self._place_ropes(tokens.device)
        packing = packing or _pack(tokens, documents, attention_mask, position_ids, cache)
        watched = output_hidden_states or torch.is_grad_enabled() or self.config.attention_backend == "reference"
        if cache is None:
            x = self._embed(tokens)
            attends = [plan.prepare(packing, len(x)) for plan in self.plans(x)]
            streams = self._run_layers(x, packing, attends, [None] * len(self.layers), output_hidden_states)
        elif tokens.shape[1] == 1 and not watched:
            streams = [self._run_token(self._embed(tokens), packing, cache)]
        else:
            streams = self._run_chunk(tokens, packing, cache, output_hidden_states, positions_to_keep)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(streams[-1]),
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if output_hidden_states else None,
        )

    def _checked_cache(self, tokens: Tensor | None, cache: Cache | None) -> RingCache | None:
        """The cache, made this model's. Raises UserError for a cache of another kind or model, and for no input."""
        if not isinstance(cache, RingCache | None):
            raise UserError(f"past_key_values is a {type(cache).__name__}; pass a model.cache.RingCache or none")
        if tokens is None:
            raise UserError("there is no input; give input_ids or inputs_embeds")
        if tokens.shape[1] == 0:
            raise UserError("the input is empty; give at least one token a row")
        if cache is not None and cache.claim(self, self.specs) and self._structure:
            self._structure = self._describe_modules()
        return cache

    def _place_ropes(self, device: torch.device) -> None:
        """Make the rotations of each kind of layer, if the last call was not on `device`."""
        if self.ropes_on != device:
            bases = [(spec.rope_theta or self.config.rope_base) if spec.rope else None for spec in self.kinds]
            made = {base: rope_of(self.config, base, device) for base in bases if base}
            self.ropes, self.ropes_on = [made[base] if base else None for base in bases], device

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, E) of token ids (B, T). Embeddings stay as they are."""
        return self.embed_tokens(tokens) if tokens.ndim == 2 else tokens

    def _run_chunk(
        self, tokens: Tensor, packing: Packing, cache: RingCache, keep_all: bool, last: int
    ) -> list[Tensor]:  # fmt: skip
        """`_run_layers` for a chunk of any length behind a cache, in the memory of `PREFILL_TOKENS` tokens."""
        parts: list[list[Tensor]] = []
        skip = tokens.shape[1] - last if last else 0
        for part, part_packing in zip(tokens.split(PREFILL_TOKENS, 1), packing.split(PREFILL_TOKENS)):
            x = self._embed(part)
            cache.begin(part_packing)
            kinds = zip(cache.slots.values(), self.plans(x))
            attends = [slots.attend_behind(part_packing, plan) for slots, plan in kinds]
            streams = self._run_layers(x, part_packing, attends, cache.layers, keep_all)
            cache.end(part.shape[1])
            if skip < part.shape[1]:
                parts.append([stream[:, max(0, skip) :] for stream in streams])
            skip -= part.shape[1]
        return [torch.cat(stream, 1) for stream in zip(*parts)]

    def _run_token(self, x: Tensor, token: Packing, cache: RingCache) -> Tensor:
        """The stream (B, 1, E) after the last layer for one token a row. Nothing on the way reads the device."""
        cache.begin_token(token, x.new_empty(0, dtype=product_dtype(x)))
        decode = self._decode if self._structure else self._run_one_token
        slots, rings, structure = list(cache.slots.values()), cache.layers, self._structure

        def run(x: Tensor, positions: Tensor, documents: Tensor, index: Tensor) -> Tensor:
            return decode(x, Packing(positions, documents), index, slots, rings, structure)

        assert token.documents is not None
        inputs = x, token.positions, token.documents, cache.index
        stream = cache.recording.replay(run, inputs) if structure and can_record(x) else run(*inputs)
        cache.end(1)
        return stream

    def _run_one_token(
        self, x: Tensor, token: Packing, index: Tensor, slots: Sequence[Slots], rings: Sequence[RingLayer],
        structure: str,
    ) -> Tensor:  # fmt: skip
        """The stream after the last layer for token `index` of each row. Compiled once for each `structure`."""
        attends = [kind.attend_in_slots(token, index, product_dtype(x)) for kind in slots]
        calls = self._calls(token, attends, rings)
        for first, kinds in zip(range(0, len(calls), REGION), self.kinds_of_region):
            x = self._run_region(x, calls[first : first + REGION], structure + kinds)
        return x

    def _run_layers(
        self, x: Tensor, packing: Packing, attends: Sequence[Attend], rings: Sequence[RingLayer | None], keep_all: bool
    ) -> list[Tensor]:
        """The residual stream (B, T, E) after the last layer; with `keep_all` also before the first and after each."""
        streams = [x]
        for layer, rotary, attend, ring in self._calls(packing, attends, rings):
            if self.gradient_checkpointing and self.training and ring is None:
                x = self._gradient_checkpointing_func(layer, x, rotary, attend)
            else:
                x = layer(x, rotary, attend, ring)
            streams = [*streams, x] if keep_all else [x]
        return streams

    def _calls(self, packing: Packing, attends: Sequence[Attend], rings: Sequence[RingLayer | None]) -> list[Call]:
        """What each layer is called with: the rotary tables and the attention of its kind, and its cache."""
        tables: dict[int, Rotary] = {id(rope): rotary_tables(packing, rope) for rope in self.ropes if rope}
        return [
            (layer, tables.get(id(self.ropes[kind])), attends[kind], ring)
            for layer, kind, ring in zip(self.layers, self.kind_of_layer, rings, strict=True)
        ]

    def record_decoding(self) -> None:
        """Replay single tokens as a CUDA graph where they are computed on a GPU. On a CPU nothing changes."""
        self._structure = self._describe_modules()

    def compile_decoding(self) -> None:
        """Compile `_run_one_token`, and `_run_region` once for all regions. On a GPU only the regions.

        There the step is recorded, and calls cost nothing. On a CPU checking the modules at each token would cost a
        tenth of it. Instead `_describe_modules` describes them when a cache is new, and another description is another
        compilation.
        """
        grows = any(spec.ring_slots is None for spec in self.kinds)  # then sizes are variables, which costs some speed
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        compiled = partial(torch.compile, dynamic=None if grows else False, fullgraph=True, options=options)
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.record_decoding()
        if on_gpu(self.norm.weight):  # a region inside of a larger graph copies the cache (torch 2.11)
            self._run_region, self._decode = compiled(_run_region), self._run_one_token
        else:
            self._run_region = torch.compiler.nested_compile_region(_run_region)
            self._decode = compiled(self._run_one_token)

    def _describe_modules(self) -> str:
        """Changes with every module, dtype and device. Empty where a module has a hook, which must see every call."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.modules()):
            return ""
        parameters = [(p.dtype, p.device, p.shape) for p in self.parameters()]
        return str(hash((*((id(m), type(m)) for m in self.modules()), *parameters)))

    def plans(self, x: Tensor) -> list[AttentionPlan]:
        """The plan of each kind of layer for a residual stream like `x`."""
        backend, head_dim, gradients = self.config.attention_backend, self.config.head_dim, torch.is_grad_enabled()
        device, dtype = x.device.type, product_dtype(x)
        return [plan_attention(spec, head_dim, backend, device, dtype, gradients) for spec in self.kinds]


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _run_region(x: Tensor, calls: Sequence[Call], structure: str) -> Tensor:
    """The stream (B, T, E) after some layers."""
    assert structure is not None  # compiled code is kept for each value of what it has read
    for layer, rotary, attend, ring in calls:
        x = layer(x, rotary, attend, ring)
    return x


def _pack(
    tokens: Tensor,
    documents: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: RingCache | None,
) -> Packing:
    """Positions and documents of the input. Document ids are left out for rows of one document without a cache."""
    b, t = tokens.shape[:2]
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UserError(f"attention_mask has {attention_mask.ndim} dimensions; give (batch, tokens), 0 for padding")
    if documents is None and attention_mask is not None and (cache is not None or not bool(attention_mask.all())):
        documents = attention_mask[:, -t:].long() - 1
    if documents is None and cache is not None:
        documents = torch.zeros(b, t, dtype=torch.long, device=tokens.device)
    if documents is None:
        return (
            Packing.of_whole_rows(t, tokens.device) if position_ids is None else Packing.of_position_ids(position_ids)
        )
    if cache is None:
        packing, _ = count_positions(documents, RowEnds.of_empty_rows(documents))
    else:
        packing = cache.count(documents)
    return packing if position_ids is None else Packing(position_ids.expand(b, t), packing.documents)


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

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: str = "auto", dtype: torch.dtype = torch.float32
    ) -> "WindreachForCausalLM":
        """The checkpoint in `folder`, in evaluation mode. The library's own loader can't fill joined projections.

        Raises UserError for a missing, damaged or unsuitable file.
        """
        folder, config = Path(folder), load_config(folder, backend)
        model = empty_model(config)
        check_shapes(folder, model.state_dict(), config.tie_word_embeddings)
        give_memory(model, torch.device("cpu"))
        weights = SavedWeights(folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        model.generation_config = load_generation_config(folder) or model.generation_config
        return model.to(dtype).eval()

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, is_main_process: bool = True
    ) -> None:
        """Write what `scripts/export.py` writes, without a tokenizer. `transformers.Trainer` calls it."""
        if is_main_process:
            save_hf(self, save_directory, state_dict)

    @can_return_tuple  # return_dict=False
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, V). `labels` (B, T) as in transformers: not shifted, -100 is ignored.

        `num_items_in_batch`: divide the summed loss by it instead of by the tokens of this call. `transformers.Trainer`
        passes the tokens of all micro-batches of a step. `output_hidden_states`: also the stream (B, T, E) before each
        layer, and the normed one after the last. Raises UserError for `output_attentions`.
        """
        if output_attentions:
            raise UserError("output_attentions: no attention backend makes the weights; leave it out")
        if use_cache and past_key_values is None:
            past_key_values = RingCache(self.config)
        watched = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = self.model(
            input_ids, documents, attention_mask, position_ids, past_key_values, inputs_embeds,
            output_hidden_states=watched, positions_to_keep=0 if watched else logits_to_keep,
        )  # fmt: skip
        hidden = output.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        streams = (*output.hidden_states[:-1], hidden) if watched else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=streams)

    def reconfigure(self, config: WindreachConfig) -> None:
        """As `WindreachModel.reconfigure`."""
        self.config = config
        self.model.reconfigure(config)

    def compile_layers(self, mode: str | None = None) -> None:
        """Compile layer by layer: layers of one kind share one compilation. `mode` is that of torch.compile."""
        for layer in self.model.layers:
            layer.compile(mode=mode)

    @contextmanager
    def uncompiled_layers(self) -> Iterator[None]:
        """Inside, layers run uncompiled, but FlexAttention stays compiled: it would make all scores."""
        compiled = [layer._compiled_call_impl for layer in self.model.layers]
        for layer in self.model.layers:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in zip(self.model.layers, compiled, strict=True):
                layer._compiled_call_impl = call

    def record_decoding(self) -> None:
        """On a GPU, replay the step of single tokens as a CUDA graph: hundreds of launches become one."""
        self.model.record_decoding()

    def compile_decoding(self) -> None:
        """Compile the step of single tokens, and replay it as `record_decoding` does.

        Each batch size is compiled once; the first token of each waits for it.
        """
        self.model.compile_decoding()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        """`generate` gets a ring unless it brings a cache or wants none."""
        if generation_config.cache_implementation is not None:
            raise UserError(
                f"cache_implementation is {generation_config.cache_implementation!r}, a cache of transformers that the "
                "model can't take; leave it out, and it gets a ring"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RingCache(self.config)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Positions are the cache's business: those that `generate` counts are dropped."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


@dataclass(frozen=True)
class InitOptions:
    """How weights start: normal, std 1/sqrt(fan-in) unless given; residual outputs divided by sqrt(2 * layers)."""

    std: float | None = None
    embedding_std: float = 1.0
    scale_residual_by_depth: bool = True
    copy_first_layer: bool = False


def empty_model(config: WindreachConfig) -> WindreachForCausalLM:
    """A model on the meta device: it takes no memory, whatever its sizes are. See `give_memory`."""
    with torch.device("meta"):
        return WindreachForCausalLM(config)


@torch.no_grad()
def give_memory(module: nn.Module, device: torch.device) -> None:
    """Replace parameters on the meta device by zeros on `device`, in place."""
    for part in module.modules():
        if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
            part.to_empty(device=device, recurse=False)
            for parameter in part.parameters(recurse=False):
                parameter.zero_()
    for part in module.modules():
        if isinstance(part, WindreachForCausalLM) and part.config.tie_word_embeddings:
            part.lm_head.weight = part.model.embed_tokens.weight


def build_model(config: WindreachConfig, init: InitOptions | None = None, seed: int = 0) -> WindreachForCausalLM:
    """A new model with weights drawn from `seed`, whatever the global random state is."""
    model = WindreachForCausalLM(config)
    _initialise(model, init or InitOptions(), torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _initialise(model: WindreachForCausalLM, init: InitOptions, generator: torch.Generator) -> None:
    """Draws the matrices in the order and the shapes of the state dict."""
    residual = 1 / math.sqrt(2 * len(model.model.layers)) if init.scale_residual_by_depth else 1.0
    for name, weight in model.state_dict().items():
        if weight.ndim < 2 or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        std = init.embedding_std if "embed_tokens" in name else init.std or 1 / math.sqrt(weight.shape[1])
        scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        weight.normal_(0.0, std * scale, generator=generator)
    if init.copy_first_layer:
        first = model.model.layers[0].state_dict()
        for layer in model.model.layers[1:]:
            layer.load_state_dict(first)
