"""Train a model.

    accelerate launch [--config_file configs/accelerate/X.yaml] train.py CONFIG.yaml [key=value ...]
    python train.py configs/quickstart.yaml training.max_steps=100 --dry-run

Exit codes: 0 done; 2 the input is wrong; 75 stopped by a signal, run again to go on; 1 a fault.

This file is the command. The run itself is `training/loop.py`. It is imported late, because torch and transformers take
seconds to import: `--help` and mistakes in the arguments are answered before, and a signal ends the process cleanly.
"""

import argparse
import os
import sys
from pathlib import Path

from model.errors import cli
from training.processes.signals import StopRequest, TrainingFault, end_process, end_with_launcher


def main() -> int:
    arguments = parse_arguments()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by a launcher, which may be killed
        end_with_launcher()
    stop = StopRequest()
    from training.processes.allocator import keep_freed_memory
    from training.processes.launch import check_launch
    from training.run.folder import check_start
    from training.settings.config_file import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":  # only one of several launched processes prints
            from training.planning.dry_run import plan_text

            print(plan_text(settings))
        return 0
    check_launch(settings.training.precision)
    check_start(settings, arguments.resume)
    keep_freed_memory()
    try:
        from training.loop import train

        return train(settings, arguments.resume, stop)
    except TrainingFault as fault:
        print(f"fault: {fault}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a model. docs/configs.md explains every setting.")
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.sliding_window=32")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and leave")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): go on from the newest checkpoint; never: set the run folder aside and start anew; "
        "PATH: go on from this checkpoint",
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    end_process(cli(main))
