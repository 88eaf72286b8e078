"""A grid of runs from one YAML file: each is trained and evaluated, then all are put side by side.

    python scripts/sweep.py configs/sweeps/law.yaml --dry-run
    python scripts/sweep.py configs/sweeps/law.yaml --jobs 2
    python scripts/sweep.py configs/sweeps/smoke.yaml training.max_steps=20

Run it again at any time: what is done is skipped, what was stopped goes on from its checkpoint. `--jobs` runs share the
cores out evenly, or take a GPU each. The file's form: the head of `training/sweeps/grid.py`. Results: sweep.json,
sweep.md and sweep.png in runs/sweeps/NAME, one folder a run beside them.

Exit codes: 0 all done; 1 a run failed (the others went on); 2 the input is wrong; 75 stopped by a signal, run it again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from eval import sweep_results
from eval.plots import save
from model.errors import UserError, cli
from model.flops import count_parameters
from model.windows import reach
from training.planning.cluster import work
from training.planning.dry_run import vocab_size
from training.processes.signals import STOPPED
from training.run.checkpoint import write_json, write_text
from training.settings.build import model_config
from training.settings.consistency import last_distance
from training.settings.schema import Settings
from training.sweeps.grid import Run, Sweep, checked_settings, load_sweep, runs
from training.sweeps.jobs import DONE, FAILED, INTERRUPTED, WAITING, Jobs, Outcome, is_finished, last_words, slots


def main() -> int:
    arguments = parse(sys.argv[1:])
    console = Console()
    sweep = load_sweep(arguments.sweep)
    folder = Path(arguments.out or f"runs/sweeps/{sweep.name}")
    found = runs(sweep, arguments.sweep, folder, arguments.overrides)
    settings = checked_settings(found)
    if arguments.dry_run:
        console.print(plan_table(found, settings), f"{len(found)} runs in {folder}; nothing was started", sep="\n")
        return 0
    _make(folder)
    outcomes = run_all(sweep, found, settings, arguments.jobs, console)
    write_results(sweep, outcomes, folder, " ".join(["python scripts/sweep.py", *sys.argv[1:]]), console)
    return exit_code(outcomes, console)


def run_all(
    sweep: Sweep, found: list[Run], settings: dict[str, Settings], wanted_jobs: int | None, console: Console
) -> list[Outcome]:
    """Run what is not finished; outcomes of all, in order."""
    finished = [run for run in found if is_finished(run, sweep.evaluate)]
    left = [run for run in found if run not in finished]
    devices = visible_devices()
    places = slots(min(wanted_jobs or max(1, len(devices)), max(1, len(left))), devices)
    console.print(f"{sweep.name}: {len(found)} runs, {len(finished)} done before; {len(places)} at a time")
    if left:
        prepare(left, settings)
    count = len(finished)

    def tell(outcome: Outcome) -> None:
        nonlocal count
        count += outcome.state == DONE
        where = "" if outcome.state == DONE else f" in {outcome.stage}, exit code {outcome.code}"
        console.print(
            f"[{count}/{len(found)}] {outcome.run.name}: {outcome.state}{where}", markup=False, soft_wrap=True
        )

    outcomes = Jobs(sweep.evaluate, tell).work(left, places)
    by_name = {o.run.name: o for o in outcomes} | {run.name: Outcome(run, DONE) for run in finished}
    return [by_name[run.name] for run in found]


def prepare(left: Sequence[Run], settings: dict[str, Settings]) -> None:
    """Text and tokenizer of every run, one after another: runs that start together must not make the same ones."""
    from data.token_store import prepare_tokens
    from data.tokenizer import prepare_tokenizer

    seen = set()
    for run in left:
        s = settings[run.name]
        needs = f"{s.data.model_dump_json()} {s.recall.values}"
        if needs not in seen:
            prepare_tokens(s, prepare_tokenizer(s))
            seen.add(needs)


def visible_devices() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them; empty without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return [d.strip() for d in named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]


# -- what comes of it -------------------------------------------------------------------------------------------------


def write_results(sweep: Sweep, outcomes: list[Outcome], folder: Path, command: str, console: Console) -> None:
    rows = [sweep_results.row(o.run.labels, o.run.folder, o.state) for o in outcomes]
    write_json(folder / "sweep.json", {"name": sweep.name, "command": command, "runs": rows})
    write_text(folder / "sweep.md", sweep_results.markdown(sweep.name, rows, command))
    picture = sweep_results.figure(rows)
    if picture is not None:
        save(picture, folder / "sweep.png")
    console.print(sweep_results.table(rows))
    console.print(f"Written: {folder}/sweep.json, sweep.md" + (", sweep.png" if picture else ""))


def exit_code(outcomes: list[Outcome], console: Console) -> int:
    """1 where a run failed, else 75 where one was stopped or did not start."""
    for o in outcomes:
        if o.state == FAILED:
            log = o.run.folder / f"{o.stage}.log"
            console.print(
                f"\n{o.run.name} failed in {o.stage} with exit code {o.code}; the end of {log}:", markup=False
            )
            console.print(last_words(o.run, o.stage), markup=False, highlight=False)
    states = {o.state for o in outcomes}
    if states & {INTERRUPTED, WAITING}:
        console.print("stopped; run the same command again to go on")
    return 1 if FAILED in states else STOPPED if states != {DONE} else 0


def plan_table(found: list[Run], settings: dict[str, Settings]) -> Table:
    """What each run would be."""
    table = Table(title="Runs; text and recall in tokens", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for name in ("parameters", "R", "last D", "text", "recall", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in found:
        s = settings[run.name]
        config = model_config(s, vocab_size(s))
        works = {w.name: w for w in work(s, 1)}
        table.add_row(
            run.name,
            f"{count_parameters(config):,}",
            f"{reach(config.specs):,}" if reach(config.specs) else "unbounded",
            f"{last_distance(s):,}" if s.recall.enabled else "–",
            *(f"{works[name].tokens:,.0f}" if name in works else "–" for name in ("text", "recall")),
            f"{sum(w.flops(config) for w in works.values()):.2e}",
        )
    return table


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--out {folder}: can't be made: {problem.strerror}; name a folder you may write") from problem


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="a file of configs/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--dry-run", action="store_true", help="check every run, list them and leave")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: one, or one a GPU")
    parser.add_argument("--out", metavar="DIR", help="default: runs/sweeps/NAME")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: give at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(cli(main))
