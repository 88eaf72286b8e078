"""The plan of a run before it starts: on this machine (`train.py --dry-run`) or on many GPUs (`scripts/plan.py`).

Nothing is allocated, downloaded or written. The only measurement is the matmul rate of this machine.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from data.tokenizer import load_tokenizer
from model.attention import Device, check_backend, plan_attention
from model.config import WindreachConfig
from model.errors import UserError
from model.flops import cache_bytes, count_parameters, forward_flops, parameters
from model.windows import LayerSpec, reach, window_times_layers
from training.distillation import teacher_config
from training.planning.formulas import (
    Setup,
    halo_bytes,
    largest_rows,
    longest_row,
    parameter_counts,
    recompute_factor,
)  # fmt: skip
from training.planning.gpus import GPUS
from training.planning.stages import StageWork, largest_memory, stage_works
from training.processes.precision import DTYPES, measure, set_up_threads
from training.settings.consistency import last_distance
from training.settings.pretrained import pretrained_settings
from training.settings.schema import Settings

GIB, MIB = 2**30, 2**20
USABLE = 0.92  # share of a GPU's memory; the rest goes to its context, the network library and fragmentation
Lines = Iterator[tuple[str, str]]


def vocab_size(settings: Settings) -> int:
    """Size of the vocabulary: `model.vocab_size`, or that of the tokenizer that is given or would be trained."""
    tokenizer = settings.data.tokenizer
    if settings.model.vocab_size is not None or tokenizer.model_file is None:
        return settings.model.vocab_size or tokenizer.vocab_size
    return load_tokenizer(tokenizer.model_file).vocab_size


def plan_text(settings: Settings) -> str:
    """The plan of one process on this machine, one fact per line.

    Raises UserError if the model can't be built: for example if a layer needs what the attention backend can't do.
    """
    stages = stage_works(settings, vocab_size(settings), ranks=1)
    config = stages[0].config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES.get(settings.training.precision, torch.bfloat16)  # `auto` is bf16 on a GPU, and no matter on a CPU
    for stage in stages:
        attention = stage.config.attention_backend, stage.config.specs, stage.config.head_dim
        check_backend(*attention, dtype=dtype, gradients=True)
    layers = list(_layer_lines(config, device, dtype, settings.data.seq_len))
    lines = [
        *layers,
        *_change_lines(settings, config),
        *_work_lines(settings, stages),
        *_machine_lines(settings, stages, device),
    ]
    return f"plan of {settings.name}; nothing was trained\n{_aligned(lines)}"


def _layer_lines(config: WindreachConfig, device: torch.device, dtype: torch.dtype, seq_len: int) -> Lines:
    """Each kind of layer with its attention backend and the reason for it, and the reach of all."""
    for spec in dict.fromkeys(config.specs):
        count = config.specs.count(spec)
        alone = copy.copy(config)
        alone.layers, alone.num_hidden_layers = [vars(spec)] * count, count
        cache = f"{size(cache_bytes(alone, length=seq_len))} of cache"
        cache += "" if spec.window else f" at {seq_len:,} tokens, growing"
        plan = plan_attention(spec, config.head_dim, config.attention_backend, device.type, dtype, True)
        backend = f"backend {plan.backend} ({plan.reason})"
        yield "layers", f"{count} x {_traits(spec)}; {backend}; {cache} (bf16, one sequence)"
    farthest, headline = reach(config.specs), window_times_layers(config.specs)
    yield "reach", "unbounded" if farthest is None else f"R = {farthest:,} tokens back, exactly"
    if farthest is not None and headline is not None:
        yield "W x layers", f"{headline:,}, the headline figure"


def _change_lines(settings: Settings, config: WindreachConfig) -> Lines:
    """What the settings change about the layers of a pretrained model. Nothing if there is none."""
    named = settings.model.init.from_pretrained
    if named is None:
        return
    before, after = copy.copy(config), config.specs
    try:
        before.layers = pretrained_settings(named)["layers"]
    except UserError:  # a run that has begun needs it no more
        yield "changed", f"unknown, because {named} is gone"
        return
    for lengths, name in {4096: "4k", 32768: "32k", 131072: "128k"}.items():
        old, new = cache_bytes(before, length=lengths), cache_bytes(config, length=lengths)
        yield "cache", f"{name:>4} tokens: {size(old)} before, {size(new)} now, {new / old:.1%} (bf16, one sequence)"
    yield "R", f"{_reach_text(before.specs)} before, {_reach_text(after)} now"
    changes: dict[tuple[LayerSpec, LayerSpec], list[int]] = {}
    for i, pair in enumerate(zip(before.specs, after, strict=True)):
        if pair[0] != pair[1]:
            changes.setdefault(pair, []).append(i)
    for (old_spec, new_spec), which in changes.items():
        yield "changed", f"{_traits(old_spec)} -> {_traits(new_spec)}: layers {ranges(which)} of 0-{len(after) - 1}"
    if not changes:
        yield "changed", f"no layer of {named}"


def _reach_text(specs: Sequence[LayerSpec]) -> str:
    farthest = reach(specs)
    return "unbounded" if farthest is None else f"{farthest:,} tokens"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as a range.

    >>> ranges([0, 1, 2, 4, 6, 7])
    '0-2, 4, 6-7'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _traits(spec: LayerSpec) -> str:
    """The kind of a layer, and its fields that differ from the defaults."""
    set_fields = {name: value for name, value in vars(spec).items() if value != getattr(LayerSpec, name)}
    return spec.kind + "".join(f", {name}={value}" for name, value in set_fields.items() if name != "kind")


def _machine_lines(settings: Settings, stages: list[StageWork], device: torch.device) -> Lines:
    """Memory of one process, precision, and the shortest possible time."""
    set_up_threads(settings.training.num_threads, local_processes=1)
    t, machine = settings.training, measure(device)
    precision = machine.choose(t.precision)
    setup = Setup(precision, checkpointing=t.activation_checkpointing, device=Device.here(device.type))
    needed = largest_memory(stages, setup)
    listed = ", ".join(f"{name.replace('_', ' ')} {size(n)}" for name, n in needed.items() if name != "exchange")
    yield "memory", f"{size(sum(needed.values()))} for one process that holds everything ({listed})"
    rates = f"matmul here fp32 {machine.fp32_flops / 1e9:,.0f}, bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s"
    yield "precision", f"{precision} (training.precision is {t.precision}; {rates})"
    shortest = duration(sum(stage.flops for stage in stages) / machine.rate(precision))
    yield "time", f"{shortest} if all were bare {precision} matmuls at the rate measured just now; steps are slower"


def _work_lines(settings: Settings, stages: list[StageWork]) -> Lines:
    """Parameters, FLOPs, the tokens of each objective, and stages if there are several."""
    config = stages[0].config
    parts, flops, seq_len = parameters(config), _training_flops(settings, config), settings.data.seq_len
    yield "parameters", f"{sum(parts.values()):,} ({', '.join(f'{name} {n:,}' for name, n in parts.items())})"
    every, trained, _ = parameter_counts(settings.training, config)
    if trained < every:
        adapters = ", adapters included" * (settings.training.lora is not None)
        yield "trained", f"{trained:,} of {every:,} parameters{adapters} ({trained / every:.2%})"
    each = ", ".join(f"{name} {n:,.0f}" for name, n in flops.items())
    yield "FLOPs", f"{sum(flops.values()):,.0f} per token in rows of {seq_len:,}, visible keys only ({each})"
    if (teacher := teacher_config(settings)) is not None:
        n, forward = count_parameters(teacher), sum(forward_flops(teacher, seq_len).values())
        yield "teacher", f"{n:,} parameters, {forward:,.0f} FLOPs per token of text"
    if len(stages) > 1:
        yield from ((f"stage {number}", str(stage)) for number, stage in enumerate(stages, 1))
        return
    for w in stages[0].works:
        step = f"{w.first.tokens:,} tokens per step in rows of {w.first.seq_len:,}"
        if w.first != w.last:
            end = f"{w.last.tokens:,} in rows of {w.last.seq_len:,}"
            step += f" at first, {end} at D = {last_distance(settings):,}"
        micro_batch = f"micro-batch {w.last.micro_rows:,} x {w.last.seq_len:,}"
        yield w.name, f"{step}, {micro_batch}; {w.steps:,} steps = {w.tokens:,.0f} tokens"
    if settings.training.context_parallel > 1:
        yield from _context_lines(settings, config, settings.training.context_parallel)


def _context_lines(settings: Settings, config: WindreachConfig, parts: int) -> Lines:
    """What each kind of layer sends where processes share rows."""
    setup, seq_len = Setup("bf16", parts, parts=parts), settings.data.seq_len
    for spec in dict.fromkeys(config.specs):
        sent = size(halo_bytes(config, setup, spec, 1, seq_len))
        what = f"{spec.kind} layers{f' of {spec.window} tokens' if spec.window else ''}"
        yield "context", f"{what}: the last of {parts} processes receives {sent} a row and layer, and returns as much"


def _training_flops(settings: Settings, config: WindreachConfig) -> dict[str, float]:
    """FLOPs of forward and backward by part, per token of text; visible keys only."""
    return {part: 3 * n for part, n in forward_flops(config, settings.data.seq_len).items()}


def cluster_plan(settings: Settings, gpu: str, ranks: int, mfu: float) -> dict[str, Any]:
    """The figures that `print_plan` shows and `--json` writes. Units: bytes, FLOPs, seconds.

    With activation checkpointing the GPUs run at the same hardware rate, but their MFU is lower.
    """
    parts = settings.training.context_parallel
    if ranks % parts:
        raise UserError(
            f"training.context_parallel is {parts}, but --gpus is {ranks}; "
            f"give a multiple of {parts}, or change the setting"
        )
    stages = stage_works(settings, vocab_size(settings), ranks)
    config, tokens, flops = stages[0].config, sum(s.tokens for s in stages), sum(s.flops for s in stages)
    usable, columns = USABLE * GPUS[gpu].memory, []
    for sharding in ("ddp", "fsdp2") if ranks > 1 else ("ddp",):
        for checkpointing in (False, True):
            setup = Setup("bf16", ranks, sharding, checkpointing, parts=parts)
            needed, most = largest_memory(stages, setup), largest_rows(settings, config, setup, usable)
            factor = recompute_factor(config, settings.data.seq_len) if checkpointing else 1.0
            seconds = factor * flops / (ranks * GPUS[gpu].bf16_flops * mfu)
            total, way = sum(needed.values()), {"sharding": sharding, "checkpointing": checkpointing}
            fit = {"total": total, "fits": total <= usable, "largest_rows": most}
            fit["longest_row"] = longest_row(settings, config, setup, usable)
            pace = {"tokens_per_second": tokens / seconds, "seconds": seconds, "gpu_hours": seconds * ranks / 3600}
            columns.append(way | needed | fit | pace)
    return {
        "name": settings.name, "gpus": ranks, "gpu": {"name": gpu, "usable": usable} | GPUS[gpu]._asdict(), "mfu": mfu,
        "reach": reach(config.specs), "window_times_layers": window_times_layers(config.specs),
        "parameters": parameters(config), "flops_per_token": _training_flops(settings, config),
        "work": [
            {"name": w.name, "steps": w.steps, "tokens": w.tokens, "flops": w.flops(s.config), "step": vars(w.last)}
            for s in stages
            for w in s.works
        ],
        "columns": columns,
    }  # fmt: skip


def print_plan(settings: Settings, plan: dict[str, Any]) -> None:
    """Prints header, work, and a table of memory and time with a column for each way to run."""
    console, gpu, columns = Console(), plan["gpu"], plan["columns"]
    console.print(
        f"[bold]{plan['name']} on {plan['gpus']:,} x {gpu['name']}[/], bf16 ({gpu['bf16_flops'] / 1e12:,.4g} TFLOP/s, "
        f"{size(gpu['usable'])} usable; {gpu['source']})"
    )
    console.print(_aligned(_work_lines(settings, stage_works(settings, vocab_size(settings), plan["gpus"]))))
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {  # the other figures are bytes
        "checkpointing": ("recompute", lambda on: "layers" if on else "nothing"),
        "fits": ("fits", lambda fits: "yes" if fits else "no"),
        "largest_rows": ("largest micro-batch", lambda rows: f"{rows:,} rows" if rows else "none"),
        "longest_row": ("longest row on all GPUs", lambda tokens: f"{tokens:,}" if tokens else "none"),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "seconds": ("time", duration),
        "gpu_hours": ("GPU hours", "{:,.1f}".format),
    }
    title = f"Memory of each GPU, and the time of all at an MFU of {plan['mfu']:.0%} without recomputation"
    heads = (Column(column["sharding"], justify="right", no_wrap=True) for column in columns)
    table = Table("sharding", *heads, title=title, title_justify="left", box=SIMPLE_HEAD)
    for key in [key for key in columns[0] if key != "sharding"]:
        label, text = formats.get(key, (key.replace("_", " "), size))
        table.add_row(label, *(text(column[key]) for column in columns))
    console.print(table)


def _aligned(lines: Iterable[tuple[str, str]]) -> str:
    lines = list(lines)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


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
