"""Times Windreach and its peers side by side, in turns in one process, and prints medians.

    python scripts/bench.py train                                  a training step of configs/quickstart.yaml
    python scripts/bench.py train --config configs/small.yaml --rows 1 --seq-lens 1024,8192,16384
    python scripts/bench.py attention --plot attention.png         several lengths and windows, with fitted exponents
    python scripts/bench.py decode                                 token-by-token generation
    python scripts/bench.py prefill                                a prompt read into the cache, W = 256
    python scripts/bench.py stream --tokens 131072                 late tokens beside early ones (minutes; not in all)
    python scripts/bench.py all --json bench.json

The ratio is the peer's seconds divided by ours: above 1 we are faster. A peer that can't run here says why. Bytes are
the most that was alive at once in addition to the inputs (attention, prefill), the keys and values in the cache
(decode), or the resident memory of the process (stream). `--device cuda` has not been run yet.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.errors import UserError, cli
from scripts.benchmarks import TRAINING_PEERS

if TYPE_CHECKING:
    from rich.table import Table

    from scripts.benchmarks.timing import Row, Setup
    from training.processes.precision import Machine


def main() -> None:
    arguments = parse(sys.argv[1:])
    from training.settings.config_file import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from scripts.benchmarks.timing import Setup
    from scripts.generate import check_device
    from training.processes.allocator import keep_freed_memory
    from training.processes.precision import measure, set_up_threads

    check_device(arguments.device)
    logging.disable_progress_bar()
    keep_freed_memory()  # as train.py does
    console, device, threads = Console(width=160), torch.device(arguments.device), set_up_threads(arguments.threads, 1)
    machine = measure(device)
    precision = machine.choose(arguments.precision or settings.training.precision)
    setup = Setup(settings, device, precision, arguments.rounds)
    console.print(
        f"{threads} threads; matmul fp32 {machine.fp32_flops / 1e9:,.0f}, "
        f"bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s -> {precision}; torch {torch.__version__}"
    )
    rows: list[Row] = []
    for more, lines in benchmarks(arguments, setup, machine):
        console.print(table_of(more), *lines, sep="\n")
        rows += more
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def benchmarks(
    arguments: argparse.Namespace, setup: "Setup", machine: "Machine"
) -> "Iterator[tuple[list[Row], Iterable[str]]]":
    """Run what was asked for; gives the rows of each table, and the lines to print below it."""
    from scripts.benchmarks import attention, decode, train
    from scripts.benchmarks.timing import exponents

    chosen = ["train", "attention", "decode", "prefill"] if arguments.bench == "all" else [arguments.bench]
    if "train" in chosen:
        for seq_len in arguments.seq_lens or [None]:
            rows = train.bench_train(setup, arguments.rows, seq_len, arguments.peer)
            yield rows, train.speeds(rows, setup)
        if len(arguments.seq_lens) > 1:
            yield train.bench_long_rows(setup, arguments.rows or 1, arguments.seq_lens), []
    if "attention" in chosen:  # the peers with dense scores leave gigabytes of free memory behind, so they come last
        yield attention.bench_aims(setup, machine), []
        rows = attention.bench_lengths(setup, arguments.long_lengths)
        yield rows, exponents(rows, "forward+backward")
        rows = attention.bench_attention(setup, arguments.lengths, arguments.windows)
        by_direction = {d: [row for row in rows if row.case.split()[0] == d] for d in ("forward", "forward+backward")}
        yield rows, [line for direction, part in by_direction.items() for line in exponents(part, direction)]
        if arguments.plot:
            attention.plot_attention(rows, arguments.plot)
    few = replace(setup, rounds=min(setup.rounds, 3))
    if "decode" in chosen:
        yield decode.bench_decode(few, arguments.prompt_tokens, arguments.new_tokens, arguments.batches), []
    if "prefill" in chosen:
        beside_sdpa, alone = decode.bench_prefill(few, arguments.prefill, arguments.prefill_lengths)
        yield beside_sdpa + alone, exponents(alone, "prefill")
    if "stream" in chosen:
        yield decode.bench_stream(setup, arguments.tokens), []


def table_of(rows: "list[Row]") -> "Table":
    from rich.table import Table

    def size(count: int | None) -> str:
        return "" if count is None else f"{count / 2**20:,.2f} MiB"

    columns = ("case", "peer", "precision", "ours", "peer's", "ratio", "ours", "peer's")
    table = Table(*columns, title=rows[0].bench, title_justify="left")
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f} x"
        if row.ratio is not None and row.limit is not None:
            ratio += f" (aim: {row.limit:.3g})"
        theirs = row.note or f"{(row.peer_s or 0) * 1e3:,.2f} ms"
        times, sizes = (f"{row.ours_s * 1e3:,.2f} ms", theirs), (size(row.ours_bytes), size(row.peer_bytes))
        table.add_row(row.case, row.peer, row.dtype, *times, ratio, *sizes)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", choices=["attention", "train", "decode", "prefill", "stream", "all"])
    add("overrides", nargs="*", metavar="key=value", help="settings, as for train.py: model.hidden_size=128")
    add("--config", default="configs/quickstart.yaml", help="model to time, except in attention; default: %(default)s")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add("--json", metavar="FILE", help="write the rows to FILE")
    add("--plot", metavar="FILE", help="attention: plot time and memory against n and W")
    add("--threads", type=_count, help="default: all cores of this process")
    add("--precision", choices=["fp32", "bf16"], help="default: training.precision of the config")
    add("--rows", type=_count, help="train: batch size; default: tokens_per_step / seq_len of the config")
    add("--peer", choices=list(TRAINING_PEERS), default="", help="train: time only this peer; default: all")
    add("--seq-lens", type=_counts, default=[], help="train: sequence lengths; default: seq_len of the config")
    for option, number_or_list, default, what in (
        ("--rounds", _count, "7", "timed runs of each function"),
        ("--lengths", _counts, "512,1024,2048,4096", "attention: sequence lengths, beside peers"),
        ("--long-lengths", _counts, "4096,8192,16384,32768,65536", "attention: sequence lengths, ours alone"),
        ("--windows", _counts, "16,32,64,128,256,512", "attention: windows"),
        ("--prompt-tokens", _count, "48", "decode: tokens of the prompt"),
        ("--new-tokens", _count, "128", "decode: tokens to generate"),
        ("--batches", _counts, "1,8", "decode: batch sizes"),
        ("--prefill", _count, "16384", "prefill: tokens of the prompt, beside sdpa"),
        ("--prefill-lengths", _counts, "4096,8192,16384,32768,65536", "prefill: tokens of the prompt, ours alone"),
        ("--tokens", _count, "131072", "stream: tokens of the text"),
    ):
        metavar = "N" if number_or_list is _count else "N,N"
        add(option, type=number_or_list, default=default, metavar=metavar, help=f"{what}; default: %(default)s")
    arguments = parser.parse_intermixed_args(argv)
    for option in ("json", "plot"):
        file = Path(getattr(arguments, option) or "none")
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise UserError(f"--{option} {file}: can't be written; name a file in a folder that exists")
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return sorted({_count(part) for part in text.split(",")})


if __name__ == "__main__":
    sys.exit(cli(main))
