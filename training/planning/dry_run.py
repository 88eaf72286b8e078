"""The plan of a run, before it starts: `python train.py CONFIG.yaml --dry-run`.

Nothing is allocated, downloaded or written. The only measurement is the matmul rate of this machine.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from model.attention.backends import choose_backend, serving
from model.config import WindreachConfig
from model.flops import cache_bytes, flops_per_token, parameters
from model.windows import LayerSpec, reach, window_times_layers
from training.planning.formulas import Processor, Setup, memory, work
from training.processes.precision import Machine, measure, set_up_threads
from training.settings.build import model_config
from training.settings.consistency import last_distance
from training.settings.schema import Settings

GIB, MIB = 2**30, 2**20
Lines = Iterator[tuple[str, str]]


def plan_text(settings: Settings) -> str:
    """The plan, one fact per line.

    Raises UserError if the model can't be built: for example if a layer needs what the attention backend can't do.
    """
    config = model_config(settings, vocab_size(settings))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = _backend(config, device)
    set_up_threads(settings.training.num_threads, local_processes=1)
    machine = measure(device)
    lines = [
        *_model_lines(config, backend, settings.data.seq_len),
        *_token_lines(settings, config),
        *_machine_lines(settings, config, machine, device),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join([f"plan of {settings.name}; nothing was trained", *(f"  {n:<{width}}  {t}" for n, t in lines)])


def vocab_size(settings: Settings) -> int:
    """Size of the vocabulary: `model.vocab_size`, or that of the tokenizer that is given or would be trained."""
    if settings.model.vocab_size is not None:
        return settings.model.vocab_size
    tokenizer = settings.data.tokenizer
    if tokenizer.model_file is None:
        return tokenizer.vocab_size
    from data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer.model_file).vocab_size


def _backend(config: WindreachConfig, device: torch.device) -> str:
    """The attention backend of the layers on this device, and who chose it."""
    name = choose_backend(config.attention_backend, config.specs, config.head_dim)
    why = f"auto on {device.type}" if name == "auto" else "model.attention_backend"
    return f"{serving(name, device)} ({why})"


def _model_lines(config: WindreachConfig, backend: str, seq_len: int) -> Lines:
    """Kinds of layers, reach and parameters."""
    for spec in dict.fromkeys(config.specs):
        count = config.specs.count(spec)
        alone = copy.copy(config)
        alone.layers, alone.num_hidden_layers = [vars(spec)] * count, count
        cache = f"{size(cache_bytes(alone, length=seq_len))} of cache"
        cache += "" if spec.window else f" at {seq_len:,} tokens, growing"
        yield "layers", f"{count} x {spec.kind}, {_traits(spec)}; backend {backend}; {cache} (bf16, one sequence)"
    farthest, headline = reach(config.specs), window_times_layers(config.specs)
    yield "reach", "unbounded" if farthest is None else f"R = {farthest:,} tokens back, exactly"
    if farthest is not None and headline is not None:
        yield "W x layers", f"{headline:,}, the headline figure"
    parts = parameters(config)
    yield "parameters", f"{sum(parts.values()):,} ({', '.join(f'{name} {n:,}' for name, n in parts.items())})"


def _traits(spec: LayerSpec) -> str:
    traits = [f"window {spec.window:,}" if spec.window else "no window"]
    traits += [f"dilation {spec.dilation}"] if spec.dilation > 1 else []
    traits += [f"{spec.global_tokens} global tokens"] if spec.global_tokens else []
    traits += ["sink"] if spec.sink else []
    traits += [] if spec.rope else ["no rope"]
    traits += [f"rope theta {spec.rope_theta:,g}"] if spec.rope_theta else []
    return ", ".join(traits)


def _token_lines(settings: Settings, config: WindreachConfig) -> Lines:
    """FLOPs per token, and the tokens of each objective."""
    t, seq_len = settings.training, settings.data.seq_len
    flops = flops_per_token(config, seq_len)
    yield "FLOPs", f"{flops:,.0f} per token of a step in rows of {seq_len:,}, visible keys only"
    text, *others = work(settings, ranks=1)
    tokens = text.steps * t.tokens_per_step
    yield "text", f"{t.tokens_per_step:,} tokens per step x {t.max_steps:,} steps = {tokens:,} tokens"
    for recall in others:
        first, last, steps = recall.first, recall.last, recall.steps
        yield (
            "recall",
            f"{first.tokens:,} tokens per step in rows of {first.seq_len:,} at first, {last.tokens:,} in rows of "
            f"{last.seq_len:,} at D = {last_distance(settings):,}; "
            f"{first.tokens * steps:,} to {last.tokens * steps:,} tokens",
        )


def _machine_lines(settings: Settings, config: WindreachConfig, machine: Machine, device: torch.device) -> Lines:
    """Memory of one process, precision, and time."""
    precision = machine.choose(settings.training.precision)
    here = Processor(device.type, machine.rate(precision), 0, "")
    needed = memory(settings, config, Setup(here, precision, checkpointing=settings.training.activation_checkpointing))
    listed = ", ".join(f"{name.replace('_', ' ')} {size(n)}" for name, n in vars(needed).items() if name != "exchange")
    yield "memory", f"{size(needed.total)} for one process that holds everything ({listed})"
    rates = f"matmul here fp32 {machine.fp32_flops / 1e9:,.0f}, bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s"
    yield "precision", f"{precision} (training.precision is {settings.training.precision}; {rates})"
    log = Path(settings.run_dir or f"runs/{settings.name}") / "metrics.jsonl"
    measured = _last_rate(log)
    if measured is not None:
        seconds = sum(w.tokens for w in work(settings, 1)) / measured
        yield "time", f"{duration(seconds)} at {measured:,.0f} tokens/s, the last rate in {log}"
        return
    seconds = sum(w.flops(config) for w in work(settings, 1)) / here.flops
    bound = f"if all were bare {precision} matmuls at the rate measured just now; steps are slower"
    yield "time", f"{duration(seconds)} {bound}"


def _last_rate(log: Path) -> float | None:
    """The last tokens/s that an earlier run of this name logged."""
    lines = log.read_text().splitlines() if log.is_file() else []
    rates = [json.loads(line)["tokens_per_second"] for line in lines if '"tokens_per_second"' in line]
    return rates[-1] if rates else None


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
