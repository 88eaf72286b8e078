"""Prints what a run needs on any number of GPUs: memory by part, FLOPs, days. Nothing is trained.

    python scripts/plan.py configs/mistral-7b.yaml --gpus 64 --gpu h100
    python scripts/plan.py configs/small.yaml --gpu l4 training.max_steps=1000 --json plan.json

Peak rates come from data sheets (training/planning/gpus.py). For this machine: `train.py CONFIG --dry-run`.
The docstring of training/planning/formulas.py says what is counted and what is assumed.
Exit codes: 0 done, 2 the input is wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.command import at_least
from model.errors import UserError, cli
from scripts.bench import check_writable
from training.planning.gpus import GPUS


def main() -> None:
    arguments = parse(sys.argv[1:])
    from training.settings.config_file import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    if settings.training.precision == "fp32":
        raise UserError("training.precision is fp32, but the known rates of GPUs are those of bf16; set it to bf16")
    from training.planning.dry_run import cluster_plan, print_plan  # imports torch, which takes seconds

    plan = cluster_plan(settings, arguments.gpu, arguments.gpus, arguments.mfu)
    print_plan(settings, plan)
    if arguments.json:
        arguments.json.write_text(json.dumps(plan, indent=1) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.max_steps=1000")
    parser.add_argument("--gpus", type=at_least(1), default=1, metavar="N", help="number of GPUs; default: %(default)s")
    parser.add_argument("--gpu", default="h100", choices=GPUS, help="default: %(default)s")
    parser.add_argument("--mfu", type=float, default=0.4, help="reached share of the peak; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_intermixed_args(argv)
    if not 0 < arguments.mfu <= 1:
        parser.error(f"--mfu {arguments.mfu}: give a share above 0 and at most 1, such as 0.4")
    check_writable(arguments.json)
    return arguments


if __name__ == "__main__":
    sys.exit(cli(main))
