"""Side-by-side timings: ours against the peers installed, alternating in one process, medians.

    python scripts/bench.py train                                  a training step of configs/quickstart.yaml
    python scripts/bench.py train --config configs/small.yaml --rows 1 --seq-lens 1024,8192,16384
    python scripts/bench.py attention --plot attention.png         against length and window, with fitted exponents
    python scripts/bench.py decode                                 token-by-token generation
    python scripts/bench.py prefill                                a prompt into the cache, W = 256
    python scripts/bench.py stream --tokens 131072                 late tokens beside early ones (minutes; not in all)
    python scripts/bench.py all --json bench.json

`ratio` is the peer's seconds divided by ours: above 1 we are faster. A peer that can't run says why. Bytes are the most
that was alive at once on top of the inputs (attention, prefill), the keys and values held (decode), or those of the
process (stream).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from model.errors import UserError, cli
from scripts.benchmarks.attention import (
    LENGTHS,
    LONG,
    WINDOWS,
    bench_asked,
    bench_attention,
    bench_lengths,
    exponents,
    growth,
    plot_attention,
    precisions,
)
from scripts.benchmarks.decode import (
    PREFILL_ALONE,
    PREFILL_BESIDE,
    bench_decode,
    bench_prefill,
    bench_stream,
    prefill_growth,
)
from scripts.benchmarks.timing import Row
from scripts.benchmarks.train import PEERS, bench_long_rows, bench_train, speeds
from training.processes.allocator import keep_freed_memory
from training.processes.precision import Machine, measure, set_up_threads
from training.settings.config_file import load_settings

# -- command line ------------------------------------------------------------------------------------------------------


def table_of(rows: list[Row]) -> Table:
    table = Table(
        "case", "peer", "ours", "peer's", "ratio", "ours", "peer's", title=rows[0].bench, title_justify="left"
    )
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f} x"
        if row.limit is not None and row.ratio is not None:
            ratio += f" (asked: {row.limit:g})"
        table.add_row(
            row.case, row.peer, f"{row.ours_s * 1e3:,.2f} ms", row.note or f"{(row.peer_s or 0) * 1e3:,.2f} ms", ratio,
            _size(row.ours_bytes), _size(row.peer_bytes),
        )  # fmt: skip
    return table


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.2f} MiB"


@contextmanager
def threads(wanted: int | None) -> Iterator[None]:
    """As many threads as training takes, or as many as asked for."""
    before = torch.get_num_threads()
    set_up_threads(wanted, 1)
    yield
    torch.set_num_threads(before)


def run_attention(arguments: argparse.Namespace, precision: str, machine: Machine, console: Console) -> list[Row]:
    """Ours alone and the shapes asked for come first: the dense peers leave a heap of gigabytes behind."""
    asked = bench_asked(machine, min(arguments.rounds, 5))
    console.print(table_of(asked))
    if "bf16" not in precisions(machine):
        console.print("bf16 is left out: this machine's matmul is slower in it than in fp32")
    alone = bench_lengths(precision, tuple(arguments.long_lengths))
    console.print(table_of(alone), growth(alone), sep="\n")
    rows = bench_attention(precision, arguments.rounds, tuple(arguments.lengths), tuple(arguments.windows))
    console.print(table_of(rows), *(f"  {name}{slope:.2f}" for name, slope in exponents(rows).items()), sep="\n")
    if arguments.plot:
        plot_attention(rows, Path(arguments.plot))
    return asked + alone + rows


def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    rows: list[Row] = []
    machine = measure(torch.device("cpu"))
    settings = load_settings(arguments.config, arguments.overrides)
    precision = machine.choose(arguments.precision or settings.training.precision)
    console.print(
        f"{torch.get_num_threads()} threads; matmul fp32 {machine.fp32_flops / 1e9:,.0f}, "
        f"bf16 {machine.bf16_flops / 1e9:,.0f} GFLOP/s -> {precision}; torch {torch.__version__}"
    )
    if arguments.bench in ("train", "all"):
        for seq_len in arguments.seq_lens or [None]:
            found = bench_train(settings, precision, arguments.rounds, arguments.rows, seq_len, arguments.peer)
            console.print(table_of(found), speeds(found, settings), sep="\n")
            rows += found
        if len(arguments.seq_lens or ()) > 1:
            found = bench_long_rows(settings, precision, arguments.rounds, arguments.rows or 1, arguments.seq_lens)
            console.print(table_of(found))
            rows += found
    if arguments.bench in ("attention", "all"):
        rows += run_attention(arguments, precision, machine, console)
    few = min(arguments.rounds, 3)
    if arguments.bench in ("decode", "all"):
        batches = tuple(arguments.batches)
        found = bench_decode(settings, few, arguments.prompt_tokens, arguments.new_tokens, batches)
        console.print(table_of(found))
        rows += found
    if arguments.bench in ("prefill", "all"):
        found = bench_prefill(settings, few, arguments.prefill, tuple(arguments.prefill_lengths))
        console.print(table_of(found), prefill_growth(found), sep="\n")
        rows += found
    if arguments.bench == "stream":
        found = bench_stream(settings, arguments.tokens)
        console.print(table_of(found))
        rows += found
    return rows


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["attention", "train", "decode", "prefill", "stream", "all"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py: model.hidden_size=128")
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="for all but attention; default: %(default)s"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", metavar="FILE", help="of attention: time against n and W")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each; default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: all cores of this process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: as the config says")
    parser.add_argument("--rows", type=int, help="of train: rows a step; default: the config's tokens_per_step")
    parser.add_argument("--peer", choices=[name for name, *_ in PEERS], help="of train: this one alone")
    parser.add_argument("--seq-lens", type=_numbers, metavar="T,T", help="of train, tokens; default: the config's")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, metavar="N,N", help="of attention")
    parser.add_argument("--long-lengths", type=_numbers, default=LONG, metavar="N,N", help="of attention, ours alone")
    parser.add_argument("--windows", type=_numbers, default=WINDOWS, metavar="W,W", help="of attention")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="of decode; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="of decode; default: %(default)s")
    parser.add_argument("--batches", type=_numbers, default=[1, 8], metavar="B,B", help="of decode; default: 1,8")
    parser.add_argument("--prefill", type=int, default=PREFILL_BESIDE, help="tokens beside sdpa; default: %(default)s")
    parser.add_argument("--prefill-lengths", type=_numbers, default=PREFILL_ALONE, metavar="N,N", help="ours alone")
    parser.add_argument("--tokens", type=int, default=131_072, help="of stream; default: %(default)s")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "threads", "rows", "prompt_tokens", "new_tokens", "prefill", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    return arguments


def write_json(rows: list[Row], file: Path) -> None:
    try:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}; name a file that can be written") from error


def main() -> None:
    arguments = parse(sys.argv[1:])
    transformers_logging.disable_progress_bar()
    keep_freed_memory()  # as train.py does
    with threads(arguments.threads):
        rows = run(arguments, Console(width=160))
    if arguments.json:
        write_json(rows, Path(arguments.json))


if __name__ == "__main__":
    sys.exit(cli(main))
