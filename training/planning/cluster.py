"""The plan of a run on many processors, as figures and as tables: what `scripts/plan.py` prints."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from model.flops import forward_flops, parameters
from model.windows import reach, window_times_layers
from training.planning.dry_run import duration, size, vocab_size
from training.planning.formulas import Processor, Setup, largest_rows, memory, run_seconds, work
from training.planning.gpus import CPU, GPUS
from training.processes.precision import measure, set_up_threads
from training.settings.build import model_config
from training.settings.schema import Settings

USABLE = 0.92  # share of a GPU's memory; the rest goes to its context, the network library and fragmentation
MEMORY_PARTS = ("weights", "gradients", "optimizer", "exchange", "activations", "logits_and_scratch")


def plan(settings: Settings, gpu: str, ranks: int, mfu: float) -> dict[str, Any]:
    """Everything that `print_plan` shows and `--json` writes. Units: bytes, FLOPs, seconds."""
    config = model_config(settings, vocab_size(settings))
    processor, precision = _processor(gpu, settings, ranks)
    setups = [
        Setup(processor, precision, ranks, sharding, checkpointing)
        for sharding in (("ddp", "fsdp2") if ranks > 1 else ("ddp",))
        for checkpointing in (False, True)
    ]
    works, needed = work(settings, ranks), [memory(settings, config, setup) for setup in setups]
    tokens = sum(w.tokens for w in works)
    seconds = {setup.checkpointing: run_seconds(settings, config, setup, mfu) for setup in setups}
    result = {
        "name": settings.name,
        "processors": ranks,
        "processor": asdict(processor),
        "precision": precision,
        "mfu": mfu,
        "reach": reach(config.specs),
        "window_times_layers": window_times_layers(config.specs),
        "parameters": parameters(config),
        "flops_per_token": {part: 3 * n for part, n in forward_flops(config, settings.data.seq_len).items()},
        "work": [
            {"name": w.name, "steps": w.steps, "tokens": w.tokens, "flops": w.flops(config), "step": asdict(w.last)}
            for w in works
        ],
        "memory": [
            {
                "sharding": setup.sharding,
                "checkpointing": setup.checkpointing,
                **asdict(m),
                "total": m.total,
                "fits": m.total <= processor.memory,
                "largest_rows": largest_rows(settings, config, setup),
            }
            for setup, m in zip(setups, needed)
        ],
        "pace": [
            {"checkpointing": c, "tokens_per_second": tokens / s, "seconds": s, "processor_hours": s * ranks / 3600}
            for c, s in seconds.items()
        ],
    }
    return result | {"notes": list(_notes(settings, result))}


def _processor(gpu: str, settings: Settings, ranks: int) -> tuple[Processor, str]:
    """The processor of one process, and the precision of training on it."""
    if gpu != CPU:
        entry = GPUS[gpu]
        return Processor(gpu, entry.bf16_flops, USABLE * entry.memory, entry.source), "bf16"
    set_up_threads(settings.training.num_threads, local_processes=ranks)
    machine = measure(torch.device("cpu"))
    precision = machine.choose(settings.training.precision)
    main_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = f"{precision} matmul measured just now"
    return Processor(CPU, machine.rate(precision), main_memory / ranks, source), precision


def _notes(settings: Settings, result: dict[str, Any]) -> Iterator[str]:
    asked, ranks, backend = settings.training.tokens_per_step, result["processors"], settings.model.attention_backend
    step = work(settings, ranks)[0].first
    if step.tokens != asked:
        yield (
            f"{ranks:,} processors take {step.rows // ranks} row each of {step.seq_len:,} tokens at least: a step has "
            f"{step.tokens:,} tokens of text, not training.tokens_per_step = {asked:,}; lower data.seq_len, or raise "
            "tokens_per_step and lower max_steps"
        )
    if result["processor"]["name"] != CPU and backend in ("reference", "blocked"):
        yield (
            f"model.attention_backend is {backend}: on a GPU it keeps its weights for the backward pass; auto takes a "
            "fused kernel, which does not"
        )
    if not any(column["fits"] for column in result["memory"]):
        yield "nothing fits: take more GPUs, or lower training.micro_batch_tokens or data.seq_len"


# -- on the terminal --------------------------------------------------------------------------------------------------


def print_plan(result: dict[str, Any]) -> None:
    console, processor = Console(), result["processor"]
    console.print(
        f"[bold]{result['name']} on {result['processors']:,} x {processor['name']}[/], {result['precision']} "
        f"({processor['flops'] / 1e12:,.4g} TFLOP/s, {size(processor['memory'])} usable; {processor['source']})"
    )
    for name, parts in (("parameters", result["parameters"]), ("FLOPs per token", result["flops_per_token"])):
        listed = ", ".join(f"{part} {n:,.0f}" for part, n in parts.items() if n)
        console.print(f"{name}: {sum(parts.values()):,.0f} ({listed})")
    for w in result["work"]:
        step = w["step"]
        console.print(
            f"{w['name']}: {w['steps']:,} steps of {step['rows']:,} rows x {step['seq_len']:,} tokens, micro-batch "
            f"{step['micro_rows']:,} x {step['seq_len']:,}: {w['tokens']:,.0f} tokens, {w['flops']:.3g} FLOPs"
        )
    console.print(_memory_table(result), _pace_table(result), sep="\n")
    for note in result["notes"]:
        console.print(f"note: {note}")


def _memory_table(result: dict[str, Any]) -> Table:
    """A column for each sharding, without and with recomputation: four columns fit 80 characters."""
    columns, seq_len = result["memory"], result["work"][0]["step"]["seq_len"]
    heads = [f"{c['sharding']}\n{_recomputed(c)}" for c in columns]
    table = _table("Memory of each processor", "sharding\nrecompute", *heads)
    for part in (*MEMORY_PARTS, "total"):
        table.add_row(part.replace("_", " "), *(size(c[part]) for c in columns))
    table.add_row("fits", *("yes" if c["fits"] else "no" for c in columns))
    largest = [f"{c['largest_rows']:,} x {seq_len:,}" if c["largest_rows"] else "none" for c in columns]
    table.add_row("largest micro-batch", *largest)
    return table


def _pace_table(result: dict[str, Any]) -> Table:
    title = f"Time at an MFU of {result['mfu']:.0%} without recomputation, and at the same hardware rate with it"
    table = _table(title, "recompute", "tokens/s", "tokens/s each", "time", "processor hours")
    for row in result["pace"]:
        rate, hours = row["tokens_per_second"], row["processor_hours"]
        each, hours_text = f"{rate / result['processors']:,.0f}", f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}"
        table.add_row(_recomputed(row), f"{rate:,.0f}", each, duration(row["seconds"]), hours_text)
    return table


def _recomputed(column: dict[str, Any]) -> str:
    return "layers" if column["checkpointing"] else "nothing"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
