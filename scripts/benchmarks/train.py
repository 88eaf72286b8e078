"""A training step beside that of `MistralForCausalLM`, and beside the step's matrix products with weights alone."""

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralForCausalLM

from model import hub
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM, build_model
from model.errors import UserError
from model.flops import flops_per_token
from scripts.benchmarks import TRAINING_PEERS
from scripts.benchmarks.timing import OURS, Row, Setup, Work, compare
from training.planning.gpus import gpu_named
from training.processes.precision import DTYPES, measure
from training.settings.build import model_config
from training.settings.schema import Settings

PRODUCTS = "products with weights alone"
LIMITS = ((8192, 8.0), (1024, 3.0), (0, 2.0))  # from this T on, the least ratio to each peer that is aimed at
GPU_LIMIT = 4.0  # the same on a GPU, from 8,192 tokens on
LONGEST = 8192  # tokens of a sequence beyond which transformers is left out on a CPU: its time grows with the square
SCORES_LIMIT = 8 << 30  # bytes of attention scores kept for the backward pass beyond which eager is left out


def plain_config(settings: Settings) -> WindreachConfig:
    """The model config of a run. Raises UserError where `MistralForCausalLM` can't compute the same function."""
    config = model_config(settings, settings.model.vocab_size or settings.data.tokenizer.vocab_size)
    if hub.exported_type(config) != "mistral":
        raise UserError(f"{settings.name}: its layers are not all alike, as Mistral's are; give another config")
    return config


def mistral_twin(ours: WindreachForCausalLM, attention: str) -> MistralForCausalLM:
    """`MistralForCausalLM` with the weights of `ours`, saved to a checkpoint and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save_hf(ours, folder)
        twin = MistralForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    return twin.to(ours.device)


def bench_train(setup: Setup, rows: int | None = None, seq_len: int | None = None, only: str = "") -> list[Row]:
    """Forward, backward and AdamW on one batch; weights, batch, loss and optimizer are the same for all.

    `rows` is the batch size. `only` names the one transformers peer to keep. Notes give our tokens/s and MFU.
    """
    settings, config = setup.settings, plain_config(setup.settings)
    t = seq_len or settings.data.seq_len
    rows = rows or max(1, settings.training.tokens_per_step // t)
    ours = build_model(config, seed=settings.seed).to(setup.device)
    models: dict[str, Any] = {OURS: ours}
    for name in peers(setup, config, rows, t):
        if only in ("", name):
            models[name] = _peer(ours, *TRAINING_PEERS[name])
    ours.compile_layers()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(config.vocab_size, (rows, t + 1), generator=generator).to(setup.device)
    works = {name: training_step(model, batch, setup.precision) for name, model in models.items()}
    works[PRODUCTS] = products(ours, rows * t, setup)
    case = f"{settings.name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
    case += f"W {config.sliding_window}, {rows} x {t} tokens a step"
    if setup.on_gpu:
        limits = dict.fromkeys(TRAINING_PEERS, GPU_LIMIT) if t >= 8192 else {}
        results = compare("train", case, works, setup.rounds, setup.precision, limits, setup.peak_bytes)
    else:  # compiled code can't be watched there
        limits = dict.fromkeys(TRAINING_PEERS, next(ratio for tokens, ratio in LIMITS if t >= tokens))
        results = compare("train", case, works, setup.rounds, setup.precision, limits)
    speed = rows * t / results[0].ours_s
    flops = speed * flops_per_token(config, t)
    note = f"ours: {speed:,.0f} tokens/s, MFU {flops / measure(setup.device).rate(setup.precision):.1%}"
    if setup.on_gpu and (gpu := gpu_named(torch.cuda.get_device_name())):
        note += f" ({flops / gpu.bf16_flops:.1%} of the data sheet's bf16 rate)"
    return [replace(row, note=row.note or note) for row in results]


def peers(setup: Setup, config: WindreachConfig, rows: int, t: int) -> Iterator[str]:
    """The peers that can run here, and whose attention scores fit."""
    # Eager attention keeps float32 scores and probabilities of all layers for the backward pass.
    eager_scores = 2 * 4 * config.num_hidden_layers * rows * config.num_attention_heads * t**2
    able = {"eager": eager_scores <= SCORES_LIMIT, "sdpa": True, "flex_attention": setup.on_gpu}
    able["flash_attention_2"] = setup.on_gpu and importlib.util.find_spec("flash_attn") is not None
    for name, (attention, _) in TRAINING_PEERS.items():
        if able[attention] and (setup.on_gpu or t <= LONGEST):
            yield name


def _peer(ours: WindreachForCausalLM, attention: str, compiled: bool) -> MistralForCausalLM:
    peer = mistral_twin(ours, attention)
    for layer in peer.model.layers if compiled else ():
        layer.compile()
    return peer


def training_step(model: Any, batch: Tensor, precision: str) -> Work:
    """One optimizer step on `batch` (rows, T + 1), as a function without arguments."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].flatten()

    def step() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def products(model: WindreachForCausalLM, tokens: int, setup: Setup) -> Work:
    """All matrix products of a step with weights, into memory allocated beforehand. No step can be faster."""
    tied = model.config.tie_word_embeddings  # the embedding is then the last matrix too
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and (tied or "embed_tokens" not in name)]
    shapes, dtype, device = [(p.shape[0], p.shape[1]) for p in matrices], DTYPES[setup.precision], setup.device
    widths = {n for shape in shapes for n in shape}
    x, out = ({n: torch.randn(tokens, n).to(device, dtype) for n in widths} for _ in range(2))
    weights, gradients = ({s: torch.randn(s).to(device, dtype) for s in set(shapes)} for _ in range(2))

    def work() -> None:
        for n, k in shapes:
            torch.mm(x[k], weights[n, k].T, out=out[n])
            torch.mm(x[n], weights[n, k], out=out[k])
            torch.mm(x[n].T, x[k], out=gradients[n, k])

    return work
