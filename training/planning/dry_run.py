"""What a run would be, said before it starts: `python train.py CONFIG.yaml --dry-run`.

Nothing is allocated, read from the network or written. The only thing measured is the matmul rate of this machine.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from model.attention.backends import BACKENDS, choose_backend, serving
from model.attention.plan import tiles_from
from model.config import WindreachConfig
from model.flops import cache_bytes, flops_per_token, parameters
from model.windows import LayerSpec, reach, window_times_layers
from training.planning.cluster import active_steps, recall_plans, relay_parameters, work
from training.planning.memory import optimizer_bytes
from training.processes.precision import Machine, measure, set_up_threads
from training.settings.build import model_config
from training.settings.consistency import last_distance
from training.settings.schema import Settings

CACHE_DTYPE_BYTES = 2  # bfloat16
GIB, MIB = 2**30, 2**20


def plan_text(settings: Settings) -> str:
    """The plan, one fact a line.

    Raises UserError where the model can't be built: an attention backend that can't do what a layer asks, say.
    """
    config = model_config(settings, vocab_size(settings))
    machine = _measure(settings)
    lines = [
        *_layer_lines(config, settings.data.seq_len),
        *_reach_lines(config),
        *_size_lines(config),
        *_token_lines(settings, config),
        *_memory_lines(settings, config, machine.choose(settings.training.precision)),
        *_time_lines(settings, config, machine),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join([f"plan of {settings.name}; nothing was trained", *(f"  {n:<{width}}  {t}" for n, t in lines)])


def vocab_size(settings: Settings) -> int:
    """Rows of the embedding: as given, or of the tokenizer that is given or would be trained."""
    if settings.model.vocab_size is not None:
        return settings.model.vocab_size
    tokenizer = settings.data.tokenizer
    if tokenizer.model_file is None:
        return tokenizer.vocab_size
    from data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer.model_file).vocab_size


def _measure(settings: Settings) -> Machine:
    """Matmul rates with as many threads as a run of one process would use."""
    set_up_threads(settings.training.num_threads, local_processes=1)
    return measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


# -- model ------------------------------------------------------------------------------------------------------------

Lines = Iterator[tuple[str, str]]


def _layer_lines(config: WindreachConfig, seq_len: int) -> Lines:
    backend = _backend(config)
    for spec in dict.fromkeys(config.specs):
        count = config.specs.count(spec)
        kind = copy.copy(config)
        kind.layers, kind.num_hidden_layers = [vars(spec)] * count, count
        held_bytes = size(cache_bytes(kind, CACHE_DTYPE_BYTES, length=seq_len))
        held = f"{held_bytes} of cache" if spec.window else f"{held_bytes} of cache at {seq_len:,} tokens, growing"
        yield "layers", f"{count} x {spec.kind}, {_traits(spec)}; backend {backend}; {held} (bf16, one sequence)"


def _backend(config: WindreachConfig) -> str:
    """What runs the layers here, and why that."""
    name = choose_backend(config.attention_backend, config.specs, config.head_dim)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = serving(name, device)
    return f"{chosen} ({'auto on ' + device.type if name == 'auto' else BACKENDS[chosen].about})"


def _traits(spec: LayerSpec) -> str:
    traits = [f"window {spec.window:,}" if spec.window else "no window"]
    traits += [f"dilation {spec.dilation}"] if spec.dilation > 1 else []
    traits += [f"{spec.global_tokens} global tokens"] if spec.global_tokens else []
    traits += ["sink"] if spec.sink else []
    traits += [] if spec.rope else ["no rope"]
    traits += [f"rope theta {spec.rope_theta:,g}"] if spec.rope_theta else []
    return ", ".join(traits)


def _reach_lines(config: WindreachConfig) -> Lines:
    farthest, headline = reach(config.specs), window_times_layers(config.specs)
    if farthest is None:
        yield "reach", "unbounded"
        return
    yield "reach", f"R = {farthest:,} tokens back, exactly"
    if headline is not None:
        yield "W x layers", f"{headline:,}, the headline figure"


def _size_lines(config: WindreachConfig) -> Lines:
    parts = parameters(config)
    yield "parameters", f"{sum(parts.values()):,} ({', '.join(f'{name} {n:,}' for name, n in parts.items())})"


# -- work -------------------------------------------------------------------------------------------------------------


def _token_lines(settings: Settings, config: WindreachConfig) -> Lines:
    t, seq_len = settings.training, settings.data.seq_len
    flops = flops_per_token(config, seq_len)
    yield "FLOPs", f"{flops:,.0f} per token of a step in rows of {seq_len:,}, visible keys only"
    text = active_steps(settings, t.text_weight) * t.tokens_per_step
    yield "text", f"{t.tokens_per_step:,} tokens per step x {t.max_steps:,} steps = {text:,} tokens"
    if settings.recall.enabled:
        first, last = recall_plans(settings, ranks=1)
        steps = active_steps(settings, settings.recall.weight)
        yield (
            "recall",
            (
                f"{first.tokens:,} tokens per step in rows of {first.seq_len:,} at first, {last.tokens:,} in rows of "
                f"{last.seq_len:,} at D = {last_distance(settings):,}; "
                f"{first.tokens * steps:,} to {last.tokens * steps:,} tokens"
            ),
        )


def _memory_lines(settings: Settings, config: WindreachConfig, precision: str) -> Lines:
    """Of one process, in no time: activations are an estimate here, and counted on the real code by scripts/plan.py."""
    relay, objectives = relay_parameters(settings, config), 1 + settings.recall.enabled
    n = sum(parameters(config).values()) + relay
    tokens = settings.training.micro_batch_tokens or settings.training.tokens_per_step
    parts = {
        "weights": 4 * n,
        "gradients": 4 * n * objectives,
        "optimizer": optimizer_bytes(config, settings.training.optimizer, objectives, relay),
        "activations, roughly": tokens * activation_bytes_per_token(config, 2 if precision == "bf16" else 4),
    }
    listed = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
    yield "memory", f"{size(sum(parts.values()))} for one process that holds everything ({listed})"


def activation_bytes_per_token(config: WindreachConfig, dtype_bytes: int) -> int:
    """What the backward pass of a token needs: inputs of matrices and norms, queries, keys, values, logits.

    Attention scores come on top where short windows keep them: two windows of float32 a head.
    """
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    assert config.head_dim is not None
    per_layer = dtype_bytes * (4 * config.hidden_size + heads * config.head_dim + 3 * config.intermediate_size)
    longest = tiles_from(torch.bfloat16 if dtype_bytes == 2 else torch.float32, config.head_dim)
    kept = [s.ring_slots for s in config.specs if s.ring_slots and s.ring_slots < longest]
    scores = 4 * config.num_attention_heads * 2 * sum(kept)
    return config.num_hidden_layers * per_layer + scores + 2 * 4 * config.vocab_size


def _time_lines(settings: Settings, config: WindreachConfig, machine: Machine) -> Lines:
    precision = machine.choose(settings.training.precision)
    rates = f"matmul here fp32 {machine.fp32_flops / 1e9:,.0f}, bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s"
    yield "precision", f"{precision} (training.precision is {settings.training.precision}; {rates})"
    measured = _rate_of_earlier_run(settings)
    if measured is not None:
        seconds = sum(w.tokens for w in work(settings, 1)) / measured
        yield "time", f"{duration(seconds)} at {measured:,.0f} tokens/s, the last rate in {_metrics(settings)}"
        return
    seconds = sum(w.flops(config) for w in work(settings, 1)) / machine.rate(precision)
    yield (
        "time",
        f"{duration(seconds)} if all were bare {precision} matmuls at the rate measured just now; steps are slower",
    )


def _metrics(settings: Settings) -> Path:
    return Path(settings.run_dir or f"runs/{settings.name}") / "metrics.jsonl"


def _rate_of_earlier_run(settings: Settings) -> float | None:
    """Tokens/s that a run of this name logged last."""
    path = _metrics(settings)
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines() if '"tokens_per_second"' in line]
    return rows[-1]["tokens_per_second"] if rows else None


def size(n_bytes: float) -> str:
    """
    >>> size(536870912), size(3 * GIB)
    ('512 MiB', '3.0 GiB')
    """
    return f"{n_bytes / GIB:,.1f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.3g} MiB"


def duration(seconds: float) -> str:
    """
    >>> duration(90), duration(7200), duration(1e9)
    ('2 minutes', '2.0 hours', '11,574 days')
    """
    if seconds < 3600:
        return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"
