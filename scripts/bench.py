"""Times Windreach and its peers side by side, in turns in one process, and prints medians.

    python scripts/bench.py train                                  a training step of configs/quickstart.yaml
    python scripts/bench.py train --config configs/small.yaml --rows 1 --seq-lens 1024,8192,16384
    python scripts/bench.py finetune --config configs/retrofit-smollm2.yaml   a step beside transformers.Trainer
    python scripts/bench.py attention                              several lengths and windows
    python scripts/bench.py aims                                   attention: only the shapes that have an aim
    python scripts/bench.py decode                                 token-by-token generation
    python scripts/bench.py prefill                                a prompt read into the cache, W = 256
    python scripts/bench.py stream --tokens 131072                 late tokens beside early ones (minutes; not in all)
    python scripts/bench.py all --json bench.json
    accelerate launch --config_file configs/accelerate/ddp-cpu-2.yaml scripts/bench.py context \\
        --seq-lens 8192,32768,131072                               rows that processes share (not in all)

The ratio is the peer's seconds divided by ours: above 1 we are faster. A peer that can't run here says why.
Bytes of attention, prefill and, on a GPU, train: the most that was alive at once in addition to the inputs.
Bytes of decode: keys and values in the cache. Bytes of stream: the memory of the process.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from eval.command import at_least, numbers
from model.errors import UserError, cli
from scripts.benchmarks import TRAINING_PEERS
from training.processes.signals import end_process
from training.run.checkpoint import finite
from training.settings.config_file import load_settings

if TYPE_CHECKING:
    from scripts.benchmarks.timing import Row, Setup
    from training.processes.precision import Machine

LONG = [4096, 8192, 16384, 32768, 65536]  # lengths of ours alone


def main() -> None:
    arguments = parse(sys.argv[1:])
    settings = load_settings(arguments.config, arguments.overrides)
    import torch

    from scripts.benchmarks.timing import Setup, set_up
    from training.processes.precision import measure

    first = os.environ.get("RANK", "0") == "0"  # only one of several launched processes prints
    device, threads = set_up(arguments.device, arguments.threads), torch.get_num_threads()
    console = Console(width=160, quiet=not first)
    machine = measure(device)
    precision = machine.choose(arguments.precision or settings.training.precision)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} threads"
    console.print(
        f"{where}; matmul fp32 {machine.fp32_flops / 1e9:,.0f}, "
        f"bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s -> {precision}; torch {torch.__version__}"
    )
    rows: list[dict[str, Any]] = []
    for more in benchmarks(arguments, Setup(settings, device, precision, arguments.rounds), machine):
        console.print(table_of(more))
        rows += map(asdict, more)
    if arguments.json and first:
        arguments.json.write_text(json.dumps(finite(rows), indent=1) + "\n")


def benchmarks(arguments: argparse.Namespace, setup: "Setup", machine: "Machine") -> "Iterator[list[Row]]":
    """Run the chosen benchmarks; yields the rows of each table."""
    from scripts.benchmarks import attention, context, decode, finetune, train

    chosen = ["train", "attention", "decode", "prefill"] if arguments.bench == "all" else [arguments.bench]
    few = replace(setup, rounds=min(setup.rounds, 3))
    if "train" in chosen:
        for seq_len in arguments.seq_lens or [None]:
            yield train.bench_train(setup, arguments.rows, seq_len, arguments.peer)
    if "finetune" in chosen:
        for seq_len in arguments.seq_lens or [None]:
            yield finetune.bench_finetune(setup, arguments.rows, seq_len)
    if "aims" in chosen or "attention" in chosen:
        yield attention.bench_aims(setup, machine)
    if "attention" in chosen:  # the peers with dense scores leave gigabytes of free memory behind, so they come last
        yield attention.bench_lengths(setup, LONG)
        yield attention.bench_attention(setup, arguments.lengths, arguments.windows)
    if "decode" in chosen:
        yield decode.bench_decode(few, 48, arguments.new_tokens, arguments.batches)
    if "prefill" in chosen:
        yield decode.bench_prefill(few, LONG, beside=16_384)
    if "stream" in chosen:
        yield decode.bench_stream(setup, arguments.tokens)
    if "context" in chosen:
        yield context.bench_context(setup, arguments.seq_lens)


def table_of(rows: "list[Row]") -> Table:
    columns = ("case", "peer", "precision", "ours", "peer's", "ratio", "our bytes", "its bytes", "note")
    table = Table(*columns, title=rows[0].bench)
    for row in rows:
        aim = f" (aim: {row.limit:.3g})" if row.limit else ""
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f} x{aim}"
        ours, theirs = ("–" if s is None else f"{s * 1e3:,.2f} ms" for s in (row.ours_s, row.peer_s))
        sizes = ("" if n is None else f"{n / 2**20:,.2f} MiB" for n in (row.ours_bytes, row.peer_bytes))
        table.add_row(row.case, row.peer, row.dtype, ours, theirs, ratio, *sizes, row.note)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    benches = ["attention", "aims", "train", "finetune", "decode", "prefill", "stream", "context", "all"]
    add("bench", choices=benches)
    add("overrides", nargs="*", metavar="key=value", help="settings, as for train.py: model.hidden_size=128")
    add("--config", default="configs/quickstart.yaml", help="model to time, except in attention; default: %(default)s")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--json", metavar="FILE", type=Path, help="write the rows to FILE")
    add("--threads", type=at_least(1), help="default: all cores of this process")
    add("--precision", choices=["fp32", "bf16"], help="default: training.precision of the config")
    add(
        "--rows", type=at_least(1), help="train, finetune: batch size; default: tokens_per_step / seq_len of the config"
    )
    peers = ", ".join(f"'{name}'" for name in TRAINING_PEERS)
    add("--peer", choices=list(TRAINING_PEERS), default="", metavar="NAME", help=f"train: only one of {peers}")
    add("--seq-lens", type=numbers, default=(), help="train, finetune, context: lengths of a row; default: seq_len")
    add("--rounds", type=at_least(1), default="7", help="timed runs of each function; default: %(default)s")
    add("--lengths", type=numbers, default="512,1024,2048,4096", help="attention: lengths; default: %(default)s")
    add("--windows", type=numbers, default="16,32,64,128,256,512", help="attention: windows; default: %(default)s")
    add("--new-tokens", type=at_least(1), default="128", help="decode: tokens to generate; default: %(default)s")
    add("--batches", type=numbers, default="1,8", help="decode: batch sizes; default: %(default)s")
    add("--tokens", type=at_least(1), default="131072", help="stream: tokens of the text; default: %(default)s")
    arguments = parser.parse_intermixed_args(argv)
    check_writable(arguments.json)
    return arguments


def check_writable(file: Path | None) -> None:
    if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise UserError(f"--json {file}: can't be written; name a file in a folder that exists")


if __name__ == "__main__":
    end_process(cli(main))
