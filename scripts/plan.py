"""What a run would need on any number of GPUs: memory by part, FLOPs, days. Nothing is trained.

    python scripts/plan.py configs/mistral-7b.yaml --gpus 64 --gpu h100
    python scripts/plan.py configs/small.yaml --gpu cpu training.max_steps=1000 --json plan.json

Peak rates come from data sheets (`training/planning/gpus.py`), with `--gpu cpu` from a matmul measured here. What is counted and
what is assumed: the head of `training/planning/cluster.py`. Exit codes: 0 done, 2 the input is wrong.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from model.config import WindreachConfig
from model.errors import UserError, cli
from model.flops import forward_flops, parameters
from model.windows import reach, window_times_layers
from training.planning.cluster import (
    MOST_TOKENS,
    USABLE,
    Pace,
    Processor,
    Setup,
    attention_form,
    largest_rows,
    memory,
    pace,
    setups,
    work,
)
from training.planning.dry_run import duration, size, vocab_size
from training.planning.gpus import CPU, GPUS, gpu_named
from training.processes.precision import Machine, measure, set_up_threads
from training.settings.build import model_config
from training.settings.config_file import load_settings
from training.settings.schema import Settings


def plan(settings: Settings, processor: Processor, ranks: int, precision: str, mfu: float) -> dict[str, Any]:
    """Everything the table shows and `--json` writes. Bytes, FLOPs, seconds."""
    config = model_config(settings, vocab_size(settings))
    works = work(settings, ranks)
    rows = [_memory_row(settings, config, setup) for setup in setups(processor, precision, ranks)]
    paces = [pace(settings, config, processor, ranks, mfu, c) for c in (False, True)]
    return {
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
        "memory": rows,
        "pace": [asdict(p) | {"processor_hours": p.hours(ranks)} for p in paces],
    } | {"notes": list(_notes(settings, config, processor, ranks, rows))}


def _memory_row(settings: Settings, config: WindreachConfig, setup: Setup) -> dict[str, Any]:
    m = memory(settings, config, setup)
    how = {"sharding": setup.sharding, "checkpointing": setup.checkpointing}
    most = {"largest_rows": largest_rows(settings, config, setup, m.fixed)}
    return how | asdict(m) | {"total": m.total, "fits": m.total <= setup.processor.memory} | most


def _notes(
    settings: Settings, config: WindreachConfig, processor: Processor, ranks: int, rows: list[dict[str, Any]]
) -> Any:
    asked, step = settings.training.tokens_per_step, work(settings, ranks)[0].first
    if step.tokens != asked:
        yield (
            f"{ranks:,} processors take {step.rows // ranks} row each of {step.seq_len:,} tokens at least: a step has "
            f"{step.tokens:,} tokens of text, not training.tokens_per_step = {asked:,}; lower data.seq_len, or raise "
            "tokens_per_step and lower max_steps"
        )
    if processor.attention == "accelerator":
        yield (
            f"model.attention_backend is {config.attention_backend}: on a GPU it keeps its weights for the backward "
            "pass; auto takes a fused kernel there, which does not"
        )
    if not any(row["fits"] for row in rows):
        yield "nothing fits: take more GPUs, or lower training.micro_batch_tokens or data.seq_len"


# -- on the terminal --------------------------------------------------------------------------------------------------


def print_plan(found: dict[str, Any], console: Console) -> None:
    ranks, processor = found["processors"], found["processor"]
    console.print(
        f"[bold]{found['name']} on {ranks:,} x {processor['name']}[/], {found['precision']} "
        f"({processor['flops'] / 1e12:,.4g} TFLOP/s, {size(processor['memory'])} usable; {processor['source']})"
    )
    parts, flops = found["parameters"], found["flops_per_token"]
    _line(console, "parameters", sum(parts.values()), parts)
    _line(console, "FLOPs a token", sum(flops.values()), flops)
    for w in found["work"]:
        step = w["step"]
        console.print(
            f"{w['name']}: {w['steps']:,} steps of {step['rows']:,} rows x {step['seq_len']:,} tokens, "
            f"{step['micro_rows']} at a time: {w['tokens']:,.0f} tokens, {w['flops']:.3g} FLOPs"
        )
    console.print(memory_table(found), pace_table(found), sep="\n")
    for note in found["notes"]:
        console.print(f"note: {note}")


def _line(console: Console, name: str, total: float, parts: dict[str, float]) -> None:
    listed = ", ".join(f"{part} {n:,.0f}" for part, n in parts.items() if n)
    console.print(f"{name}: {total:,.0f} ({listed})")


MEMORY_PARTS = ("weights", "gradients", "optimizer", "exchange", "activations", "logits_and_scratch")


def memory_table(found: dict[str, Any]) -> Table:
    """A column for each way to share the model out: four fit a terminal of 80 columns."""
    table = Table(title="Memory of each", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("sharding\nrecompute")
    rows = found["memory"]
    for row in rows:
        recompute = "layers" if row["checkpointing"] else "nothing"
        table.add_column(f"{row['sharding']}\n{recompute}", justify="right")
    for part in (*MEMORY_PARTS, "total"):
        table.add_row(part.replace("_", " "), *(size(row[part]) for row in rows))
    table.add_row("fits", *("yes" if row["fits"] else "no" for row in rows))
    seq_len = found["work"][0]["step"]["seq_len"]
    table.add_row("largest micro-batch", *(_rows(row["largest_rows"], seq_len) for row in rows))
    return table


def _rows(most: int, seq_len: int) -> str:
    """Of the largest micro-batch; `+` where more were not looked for."""
    more = "+" if (most + 1) * seq_len > MOST_TOKENS else ""
    return f"{most:,}{more} x {seq_len:,}" if most else "none"


def pace_table(found: dict[str, Any]) -> Table:
    title = (
        f"Time at an MFU of {found['mfu']:.0%}, nothing recomputed; the same rate of the hardware with recomputation"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("recompute", "tokens/s", "tokens/s each", "time", "processor hours"):
        table.add_column(name, justify="left" if name == "recompute" else "right")
    for row in found["pace"]:
        p = Pace(row["checkpointing"], row["tokens_per_second"], row["seconds"])
        rate = p.tokens_per_second
        table.add_row(
            "layers" if p.checkpointing else "nothing",
            f"{rate:,.0f}",
            f"{rate / found['processors']:,.0f}",
            duration(p.seconds),
            f"{row['processor_hours']:,.0f}" if row["processor_hours"] >= 10 else f"{row['processor_hours']:.2f}",
        )
    return table


# -- what it runs on --------------------------------------------------------------------------------------------------


def processor_for(name: str, settings: Settings, config: WindreachConfig, ranks: int) -> tuple[Processor, str]:
    """The processor and the precision of training there: GPUs of the table have bf16, this machine is measured."""
    asked = settings.training.precision
    if name == CPU:
        machine = _measure(settings, ranks)
        precision = machine.choose(asked)
        return Processor(
            CPU, machine.rate(precision), _main_memory() / ranks, f"{precision} matmul measured just now",
            attention_form(config, "cpu"),
        ), precision  # fmt: skip
    gpu = gpu_named(name)
    precision = "bf16" if asked == "auto" else asked
    if precision == "fp32":
        raise UserError(f"training.precision is fp32, but the rates known for {name} are those of bf16; set it to bf16")
    form = attention_form(config, "cuda")
    return Processor(name, gpu.bf16_flops, USABLE * gpu.memory, gpu.source, form), precision


def _measure(settings: Settings, ranks: int) -> Machine:
    set_up_threads(settings.training.num_threads, local_processes=ranks)
    return measure(torch.device("cpu"))


def _main_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.max_steps=1000")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of processors; default: %(default)s")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)}, or cpu; default: %(default)s")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: give at least 1")
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu}: give a share above 0 and at most 1, such as 0.4")
    return arguments


def planned(arguments: argparse.Namespace) -> dict[str, Any]:
    """`plan` of a command line that `parse` has read."""
    settings = load_settings(arguments.config, arguments.overrides)
    config = model_config(settings, vocab_size(settings))
    processor, precision = processor_for(arguments.gpu, settings, config, arguments.gpus)
    return plan(settings, processor, arguments.gpus, precision, arguments.mfu)


def main() -> None:
    arguments = parse(sys.argv[1:])
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: {arguments.json.parent} is no folder; name one that is there")
    found = planned(arguments)
    print_plan(found, Console())
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as problem:
            raise UserError(f"--json {arguments.json}: can't be written: {problem.strerror}") from problem


if __name__ == "__main__":
    sys.exit(cli(main))
