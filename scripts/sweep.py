"""Trains and evaluates a grid of runs from one YAML file, then shows the results side by side.

    python scripts/sweep.py configs/sweeps/law.yaml --dry-run
    python scripts/sweep.py configs/sweeps/law.yaml --jobs 2
    python scripts/sweep.py configs/sweeps/smoke.yaml training.max_steps=20

Run it again at any time: it skips what is finished, and stopped runs continue from their checkpoint. The runs at work
share the cores evenly, or take a GPU each. docs/sweep.md describes the file.
Results: sweep.json, sweep.md and sweep.png in runs/sweeps/NAME, beside the folders of the runs.

Exit codes: 0 all done; 1 a run failed (the others continued); 2 the input is wrong; 75 stopped by a signal (run it
again).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.command import at_least
from model.errors import UserError, cli


def main() -> int:
    arguments = parse(sys.argv[1:])
    from training.sweeps.grid import checked_settings, load_sweep, runs

    sweep = load_sweep(arguments.sweep)
    folder = Path(arguments.out or f"runs/sweeps/{sweep.name}")
    listed = runs(sweep, arguments.sweep, folder, arguments.overrides)
    settings = checked_settings(listed)

    from rich.console import Console  # these import torch and matplotlib, which takes seconds

    from eval.sweep_results import write_results
    from training.run.writer import Writer
    from training.sweeps.jobs import exit_code, plan_table, run_all

    console = Console()
    if arguments.dry_run:
        console.print(plan_table(listed, settings))
        print(f"{len(listed)} runs in {folder}; nothing was started")
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer = Writer(folder, "put this sweep elsewhere with --out DIR")
    except OSError as problem:
        remedy = "name a folder that you may write"
        raise UserError(f"--out {folder}: can't be created: {problem.strerror}; {remedy}") from problem
    outcomes = run_all(sweep, listed, settings, arguments.jobs, console)
    states = [(o.run.labels, o.run.folder, o.state) for o in outcomes]
    write_results(sweep.name, states, folder, " ".join(["python scripts/sweep.py", *sys.argv[1:]]), console)
    writer.close()
    return exit_code(outcomes, console)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="a file of configs/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    parser.add_argument("--dry-run", action="store_true", help="check and list all runs, start none")
    parser.add_argument("--jobs", type=at_least(1), metavar="N", help="runs at a time; default: one, or one per GPU")
    parser.add_argument("--out", metavar="DIR", help="folder of the results; default: runs/sweeps/NAME")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(cli(main))
