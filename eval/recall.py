"""How far back a model recalls a value, by distance, with intervals and controls.

    python -m eval.recall MODEL [--out DIR] [--tasks needle,needle-noise] [--n 400] [--seed 0]
                                [--distances 1,16,96] [--precision auto] [--data CONFIG.yaml] [--text FILE]
                                [--compare RUN ...]

Distance = (position whose logits are read) - (position of the value token). All items have one total length, so
length and distance are not confounded, and nothing but haystack stands between needle and query. Each item is a
**counterfactual pair**: the same tokens with value v and with v'. Beyond the reach R both runs must give the same
bits, and the report says whether they did.

Both members of a pair run in the same row of batches of one shape. The haystack without a needle is the same at every
distance: one control serves all. Shared haystacks make rows of *different* distances dependent; within a distance the
items are independent.

Right means: among the task's values the right one has the highest logit (chance is 1/values). `free_accuracy` asks
more: it must be the highest of the whole vocabulary, as in greedy generation.
"""

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from data.recall import RecallItem, clean_filler, item
from data.recall_vocabulary import RecallVocabulary, recall_vocabulary
from eval import plots, stats
from eval.forward import LONG_WORK, Reader, generate_one, last_logits, last_logits_through_ring
from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from model.errors import UserError, cli

TASKS = ("needle", "needle-noise")
IntArray = NDArray[np.int64]
SCREENING = 200
ALIGNED = 32  # tokens: of such a length the blocks of attention need no padding, which is a third faster


# ---------------------------------------------------------------------------------------------- what is measured


def protocol_distances(window: int, reach: int, product: int) -> list[int]:
    """1, W/2, W-1, W, W+1, 1.5W, 2W, then about six a doubling, R-1, R, R+1, W k, W k + W.

    >>> protocol_distances(4, 12, 16)
    [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 20]
    """
    near = {1, window // 2, window - 1, window, window + 1, 3 * window // 2, 2 * window}
    doublings = math.log2(max(reach, 2 * window) / (2 * window))
    steps = int(6 * doublings)
    far = {round(2 * window * 2 ** (i / 6)) for i in range(steps + 1)}
    far = {d for d in far if d < reach - 1}
    edge = {reach - 1, reach, reach + 1, product, product + window}
    return sorted(d for d in near | far | edge if d >= 1)


def default_distances(examined: Examined, max_distance: int) -> list[int]:
    """The protocol's distances for this model; a stack of unbounded reach gets those of its sliding twin."""
    window = examined.window
    if examined.reach is not None and window is not None:
        wanted = protocol_distances(window, examined.reach, examined.window_times_layers or examined.reach)
    elif window is not None:
        wanted = protocol_distances(window, examined.layers * (window - 1), examined.layers * window)
    else:
        wanted = [1, *(round(8 * 2 ** (i / 2)) for i in range(40))]
    return [d for d in wanted if d <= max_distance]


@dataclass
class Tally:
    """What was seen at one distance, item by item, in the order of the items."""

    value: list[int] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    pair: list[bool] = field(default_factory=list)
    free: list[bool] = field(default_factory=list)
    identical: list[bool] = field(default_factory=list)
    nll_bits: list[float] = field(default_factory=list)
    blind_correct: list[bool] = field(default_factory=list)
    blind_nll_bits: list[float] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for name, seen in vars(other).items():
            getattr(self, name).extend(seen)

    def row(self, distance: int, window: int | None) -> dict[str, Any]:
        n, correct = len(self.correct), sum(self.correct)
        low, high = stats.wilson(correct, n)
        return {
            "distance": distance,
            "distance_in_windows": distance / window if window else None,
            "n": n,
            "correct": correct,
            "accuracy": correct / n,
            "low": low,
            "high": high,
            "pair_accuracy": sum(self.pair) / n,
            "identical_pairs": sum(self.identical) / n,
            "free_accuracy": sum(self.free) / n,
            "delta_nll_bits": float(np.mean(self.blind_nll_bits) - np.mean(self.nll_bits)),
            "nll_bits": float(np.mean(self.nll_bits)),
            "accuracy_without_needle": sum(self.blind_correct) / n,
        }


@dataclass(frozen=True)
class Bench:
    """One task on one model: everything that stays the same over the distances."""

    examined: Examined
    haystack: Haystack
    vocabulary: RecallVocabulary
    task: str
    total_length: int
    seed: int

    @property
    def values(self) -> list[int]:
        return list(self.vocabulary.values)

    def items(self, distance: int, indices: Sequence[int]) -> list[RecallItem]:
        """Item `i` is a pure function of (seed, task, i, distance); its haystack of (seed, task, i) alone."""
        made = []
        for i in indices:
            filler = self.filler(i)
            rng = np.random.default_rng([self.seed, TASKS.index(self.task), i, distance])
            made.append(item(self.task, rng, filler, self.vocabulary, self.total_length, distance))
        return made

    def filler(self, i: int) -> IntArray:
        """(T,) haystack of item `i`, without the tokens that needles and queries are made of."""
        if self.task == "needle-noise":
            return np.random.default_rng([self.seed, 11, i]).choice(self.vocabulary.plain, self.total_length)
        return clean_filler(self.haystack.filler(i, self.total_length, self.seed), self.vocabulary)

    def blind(self, indices: Sequence[int]) -> Tensor:
        """(n, T): the same haystacks and the query, but no needle."""
        query = torch.tensor(self.vocabulary.query)
        rows = torch.from_numpy(np.stack([self.filler(i) for i in indices]))
        return torch.cat([rows[:, : self.total_length - len(query)], query.expand(len(rows), -1)], dim=1)


def judge(bench: Bench, items: list[RecallItem], first: Tensor, second: Tensor, blind: Tensor, tally: Tally) -> None:
    """Add the items' outcomes: logits (B, V) with value v, with v', and without a needle."""
    values = torch.tensor(bench.values)
    index = {token: i for i, token in enumerate(bench.values)}
    chosen, counter, unseen = (values[x[:, values].argmax(-1)] for x in (first, second, blind))
    bits, blind_bits = (-torch.log_softmax(x, -1) / math.log(2) for x in (first, blind))
    for r, made in enumerate(items):
        assert made.value in index
        assert made.counterfactual_value in index
        right = int(chosen[r]) == made.value
        tally.value.append(made.value)
        tally.correct.append(right)
        tally.pair.append(right and int(counter[r]) == made.counterfactual_value)
        tally.free.append(int(first[r].argmax()) == made.value)
        tally.identical.append(bool(torch.equal(first[r], second[r])))
        tally.nll_bits.append(float(bits[r, made.value]))
        tally.blind_nll_bits.append(float(blind_bits[r, made.value]))
        tally.blind_correct.append(int(unseen[r]) == made.value)


def pair_rows(items: list[RecallItem]) -> tuple[Tensor, Tensor]:
    """(B, T) twice: with the value and with its counterfactual; they differ in one token."""
    first = torch.tensor([made.tokens for made in items])
    second = first.clone()
    for r, made in enumerate(items):
        second[r, made.value_position] = made.counterfactual_value
    return first, second


def measure_batch(bench: Bench, read: Reader, distances: Sequence[int], batch: Sequence[int]) -> dict[int, Tally]:
    """The items of one batch at every distance."""
    tallies: dict[int, Tally] = {}
    blind = read(bench.blind(batch))
    for distance in distances:
        items = bench.items(distance, batch)
        first, second = pair_rows(items)
        judge(bench, items, read(first), read(second), blind, tallies.setdefault(distance, Tally()))
    return tallies


def run_batches(
    bench: Bench,
    crew: "Crew",
    distances: Sequence[int],
    indices: Sequence[int],
    tallies: dict[int, Tally],
    advance: Callable[[int], None],
) -> None:
    """Measure the items `indices` at every distance."""
    batches = [indices[start : start + crew.read.rows] for start in range(0, len(indices), crew.read.rows)]
    for batch, found in zip(batches, crew.measure(bench, distances, batches), strict=True):
        for distance, tally in found.items():
            tallies.setdefault(distance, Tally()).add(tally)
            advance(len(batch))


# -------------------------------------------------------------------------------------------- who does the work


@dataclass(frozen=True)
class Crew:
    """Who measures batches: this process, or a pool of processes of one thread each, which on a CPU are faster than
    threads that share every small matrix product."""

    read: Reader
    pool: Executor | None = None

    def measure(
        self, bench: Bench, distances: Sequence[int], batches: list[Sequence[int]]
    ) -> Iterable[dict[int, Tally]]:
        """What `measure_batch` gives for each batch, in order."""
        if self.pool is None:
            return (measure_batch(bench, self.read, distances, batch) for batch in batches)
        return self.pool.map(partial(_work, bench.task, distances), batches)


@dataclass(frozen=True)
class Order:
    """What is asked for, in words that another process understands."""

    model: str
    device: str | None
    text: str | None
    data: str | None
    tasks: tuple[str, ...]
    distances: tuple[int, ...]
    n: int
    seed: int
    precision: str


_benches: dict[str, tuple[Bench, Reader]] = {}  # of a process of the pool


def _start_worker(order: Order) -> None:
    torch.set_num_threads(1)
    examined = load_model(order.model, order.device)
    benches = open_benches(
        examined, open_haystack(examined, order.text, order.data), order.tasks, order.distances, order.seed
    )
    read = Reader(examined, benches[0].total_length, order.precision, compiled=True)
    _benches.update({bench.task: (bench, read) for bench in benches})


def _work(task: str, distances: Sequence[int], batch: Sequence[int]) -> dict[int, Tally]:
    return measure_batch(*_benches[task], distances, batch)


@contextmanager
def assemble(order: Order, examined: Examined, total_length: int) -> Iterator[Crew]:
    """Processes where the work is long, the device a CPU with several threads to share out, and the model ours."""
    tokens = len(order.tasks) * min(order.n, SCREENING) * (2 * len(order.distances) + 1) * total_length
    long, threads = tokens >= LONG_WORK and examined.ours, torch.get_num_threads()
    if not (long and threads > 1 and examined.device.type == "cpu"):
        yield Crew(Reader(examined, total_length, order.precision, compiled=long))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, context, _start_worker, (order,)) as pool:
        yield Crew(Reader(examined, total_length, order.precision, compiled=False), pool)


# ----------------------------------------------------------------------------------------- where more is needed


def near_transition(rows: list[dict[str, Any]], chance: float, window: int | None) -> set[int]:
    """Distances that deserve the full n: between floor and ceiling, at W, and around the 90 % crossing."""
    chosen = {d for d in (row["distance"] for row in rows) if window and abs(d - window) <= 1}
    for before, row, after in zip([rows[0], *rows[:-1]], rows, [*rows[1:], rows[-1]], strict=True):
        middling = row["high"] > chance + 0.1 and row["low"] < 0.95
        edge = (row["low"] >= 0.9) != (after["low"] >= 0.9) or (before["low"] >= 0.9) != (row["low"] >= 0.9)
        if middling or edge:
            chosen.add(row["distance"])
    return chosen


def measure_task(
    bench: Bench, crew: Crew, distances: list[int], n: int, console: Console, reach: int | None = None
) -> dict[str, Any]:
    """The task's entry in recall.json: screening with up to 200 items, then up to n where the curve bends."""
    tallies: dict[int, Tally] = {}
    window, chance = bench.examined.window, 1 / len(bench.values)
    screening = list(range(min(n, SCREENING)))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        bar = progress.add_task(f"{bench.task}, {len(distances)} distances", total=len(distances) * len(screening))
        run_batches(bench, crew, distances, screening, tallies, lambda done: progress.advance(bar, done))
        rows = [tallies[d].row(d, window) for d in distances]
        wanted = {d for d in near_transition(rows, chance, window) if reach is None or d <= reach}
        rest = list(range(len(screening), n))
        progress.update(bar, total=len(distances) * len(screening) + len(wanted) * len(rest))
        if wanted and rest:
            run_batches(bench, crew, sorted(wanted), rest, tallies, lambda done: progress.advance(bar, done))
    rows = [tallies[d].row(d, window) for d in distances]
    result = {"chance": chance, "total_length": bench.total_length, "rows": rows} | horizons(rows, reach)
    with torch.compiler.set_stance("force_eager"):
        paths = check_paths(bench, distances)
    return result | {"paths": paths} | beyond_reach(rows, reach)


def horizons(rows: list[dict[str, Any]], reach: int | None) -> dict[str, Any]:
    """H90, H50 in tokens and U90, U50 as shares of R, with 95 % intervals."""
    distances, correct, n = ([row[key] for row in rows] for key in ("distance", "correct", "n"))
    out: dict[str, Any] = {}
    for name, horizon in (("90", stats.h90(distances, correct, n)), ("50", stats.h50(distances, correct, n))):
        share = horizon.over(reach)
        out |= {
            f"h{name}": horizon.value,
            f"h{name}_interval": [horizon.low, horizon.high],
            f"h{name}_censored": horizon.censored,
            f"u{name}": share and share.value,
            f"u{name}_interval": share and [share.low, share.high],
        }
    return out


def beyond_reach(rows: list[dict[str, Any]], reach: int | None) -> dict[str, Any]:
    """How many pairs lie beyond the reach, and whether all of them gave the same bits."""
    beyond = [row for row in rows if reach is not None and row["distance"] > reach]
    return {
        "pairs_beyond_reach": sum(row["n"] for row in beyond),
        "identical_beyond_reach": all(row["identical_pairs"] == 1.0 for row in beyond) if beyond else None,
    }


def check_paths(bench: Bench, distances: list[int], rows: int = 4) -> dict[str, Any]:
    """The same items in float32 by one full forward pass, through the ring, and generated: do they agree?"""
    forced: list[int] = []
    ringed: list[int] = []
    written: list[int] = []
    difference = 0.0
    spread = distances[:: max(1, len(distances) // 12)]
    for distance in spread:
        first, _ = pair_rows(bench.items(distance, range(rows)))
        full = last_logits(bench.examined, first)
        ring = last_logits_through_ring(bench.examined, first, first.shape[1] - 1 - distance)
        difference = max(difference, float((full - ring).abs().max()))
        forced += full.argmax(-1).tolist()
        ringed += ring.argmax(-1).tolist()
        if len(written) < 6 * rows:
            written += generate_one(bench.examined, first)
    right = [made.value for distance in spread for made in bench.items(distance, range(rows))]
    return {
        "n": len(forced),
        "teacher_forced_accuracy": float(np.mean([a == b for a, b in zip(forced, right, strict=True)])),
        "ring_accuracy": float(np.mean([a == b for a, b in zip(ringed, right, strict=True)])),
        "agree": sum(a == b for a, b in zip(forced, ringed, strict=True)),
        "max_abs_logit_difference": difference,
        "generated_n": len(written),
        "generated_agree": sum(a == b for a, b in zip(written, forced, strict=False)),
    }


def open_benches(
    examined: Examined, haystack: Haystack, tasks: Iterable[str], distances: Sequence[int], seed: int
) -> list[Bench]:
    """A bench per task; all items have one length. UserError where the model can't read so far."""
    vocabulary = recall_vocabulary(examined.tokenizer, n_values_of(examined))
    margin = len(vocabulary.needle) + len(vocabulary.query) + 8
    total_length = max(distances) + margin
    total_length += -total_length % ALIGNED
    if examined.max_tokens and total_length > examined.max_tokens:
        raise UserError(
            f"--distances {max(distances)}: items would be {total_length:,} tokens long and this model reads "
            f"{examined.max_tokens:,}; give distances up to {examined.max_tokens // ALIGNED * ALIGNED - margin:,}"
        )
    return [Bench(examined, haystack, vocabulary, task, total_length, seed) for task in tasks]


def measure(examined: Examined, haystack: Haystack, order: Order, console: Console | None = None) -> dict[str, Any]:
    """Everything recall.json holds."""
    console = console or Console(quiet=True)
    distances = list(order.distances)
    benches = open_benches(examined, haystack, order.tasks, distances, order.seed)
    with assemble(order, examined, benches[0].total_length) as crew:
        results = {
            bench.task: measure_task(bench, crew, distances, order.n, console, examined.reach) for bench in benches
        }
    facts = {"seed": order.seed, "precision": order.precision, "haystack": haystack.name}
    return examined.header() | facts | {"tasks": results}


def n_values_of(examined: Examined) -> int:
    return int(examined.settings.get("recall", {}).get("values", 32))


# ---------------------------------------------------------------------------------------------- on the terminal


def print_result(result: dict[str, Any], console: Console) -> None:
    for task, entry in result["tasks"].items():
        console.print(recall_table(task, entry, result, console))
        console.print(headline(task, entry, result))


def recall_table(task: str, entry: dict[str, Any], result: dict[str, Any], console: Console) -> Table:
    """Right answers by distance; pair: both of a pair right; equal: pairs of equal bits; bits: gained by the needle;
    blind: right answers without a needle."""
    table = Table(title=f"Recall by distance: {task} ({result['model']})", title_justify="left", box=box.SIMPLE_HEAD)
    bars = console.width >= 100
    for name in ("tokens", "W", "n", "recall", *([""] if bars else []), "95 %", "pair", "equal", "bits", "blind"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in entry["rows"]:
        windows = row["distance_in_windows"]
        table.add_row(
            f"{row['distance']:,}",
            "" if windows is None else f"{windows:.1f}",
            str(row["n"]),
            f"{row['accuracy']:.3f}",
            *(["█" * round(12 * row["accuracy"])] if bars else []),
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['pair_accuracy']:.2f}",
            f"{row['identical_pairs']:.0%}",
            f"{row['delta_nll_bits']:+.2f}",
            f"{row['accuracy_without_needle']:.2f}",
            style="dim" if result["reach"] is not None and row["distance"] > result["reach"] else None,
        )
    return table


def headline(task: str, entry: dict[str, Any], result: dict[str, Any]) -> str:
    """One paragraph that says what was found."""
    window = result["window"]
    in_w = f" = {entry['h90'] / window:.1f} W" if window else ""
    text = f"[bold]{task}: H90 = {entry['h90']:,} tokens{in_w}"
    if entry["u90"] is not None:
        text += f", U90 = {entry['u90']:.2f} of R = {result['reach']:,}"
    text += f"[/]; H50 = {entry['h50']:.0f} tokens; chance {entry['chance']:.3f}."
    if entry["identical_beyond_reach"] is not None:
        verdict = "all bit-identical" if entry["identical_beyond_reach"] else "[red]NOT all bit-identical[/]"
        text += f" Beyond R, {entry['pairs_beyond_reach']:,} pairs: {verdict}."
    paths = entry["paths"]
    text += (
        f" Full forward and ring agree on {paths['agree']} of {paths['n']} answers"
        f" (logits within {paths['max_abs_logit_difference']:.1e}),"
        f" generation on {paths['generated_agree']} of {paths['generated_n']}."
    )
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.recall", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where the results go; default: the run folder, or here")
    parser.add_argument(
        "--tasks", help=f"comma-separated, of {', '.join(TASKS)}; default: those the run was trained on"
    )
    parser.add_argument("--n", type=int, default=400, help="items a distance near transitions (elsewhere up to 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distances", help="comma-separated tokens; default: the protocol's")
    parser.add_argument("--max-distance", type=int, default=4096, help="cut the protocol's distances here")
    parser.add_argument("--data", metavar="CONFIG.yaml", help="take the held-out text of this config")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to use as haystack")
    parser.add_argument("--compare", nargs="*", default=[], metavar="RUN", help="runs to draw in grey, e.g. the twin")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as trained")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def chosen_distances(args: argparse.Namespace, examined: Examined) -> tuple[int, ...]:
    if args.distances is None:
        return tuple(default_distances(examined, min(args.max_distance, (examined.max_tokens or 1 << 40) - 64)))
    try:
        wanted = sorted({int(part) for part in args.distances.split(",")})
    except ValueError as error:
        raise UserError(f"--distances {args.distances!r}: give whole numbers of tokens, such as 1,16,96") from error
    if not wanted or wanted[0] < 1:
        raise UserError(f"--distances {args.distances!r}: a distance is at least 1 token")
    return tuple(wanted)


def chosen_tasks(args: argparse.Namespace, trained: Iterable[str]) -> tuple[str, ...]:
    if args.tasks is None:
        return tuple(task for task in TASKS if task in trained) or TASKS
    tasks = [part.strip() for part in args.tasks.split(",") if part.strip()]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {args.tasks!r}: unknown task {', '.join(unknown)!r}; known: {', '.join(TASKS)}")
    return tuple(tasks)


def main() -> None:
    args = parse(sys.argv[1:])
    console = Console()
    if args.n < 1:
        raise UserError(f"--n {args.n}: give at least 1 item")
    others = [read_result(Path(run) / "recall.json") for run in args.compare]
    examined = load_model(args.model, args.device)
    order = Order(
        args.model, args.device, args.text, args.data,
        chosen_tasks(args, examined.settings.get("recall", {}).get("tasks", {})), chosen_distances(args, examined),
        args.n, args.seed, examined.precision if args.precision == "auto" else args.precision,
    )  # fmt: skip
    result = measure(examined, open_haystack(examined, args.text, args.data), order, console)
    out = examined.out_dir(args.out)
    (out / "recall.json").write_text(json.dumps(result, indent=1))
    print_result(result, console)
    reach = read_result(out / "reach.json") if (out / "reach.json").exists() else None
    plots.save(plots.hero_figure([result, *others], reach), out / "recall.png")
    console.print(f"Written: {out / 'recall.json'}, {out / 'recall.png'}")
    if any(entry["identical_beyond_reach"] is False for entry in result["tasks"].values()):
        raise SystemExit("pairs beyond the reach differ: the model sees farther than its windows allow")


def read_result(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such result; run the evaluation on that run first") from error
    except ValueError as error:
        raise UserError(f"{file} is not whole JSON ({error}); run the evaluation again") from error


if __name__ == "__main__":
    sys.exit(cli(main))
