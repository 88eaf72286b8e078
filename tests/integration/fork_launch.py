"""`accelerate launch` as it is, but for one thing: its ranks are forks of it, so that nothing is imported again.

It is started by template.py, which has imported everything: `Forked(["tests.integration.fork_launch.py", ...])`.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed.run as torch_run
from accelerate.commands import launch

import train
from model.errors import cli

Parsed = tuple[Any, Callable[..., Any], list[str]]  # launch settings, what a rank runs, its arguments


def main() -> None:
    parse = torch_run.config_from_args

    def config_from_args(arguments: Any) -> Parsed:
        config, _program, of_rank = parse(arguments)
        config.start_method = "fork"
        return config, run_rank, of_rank[of_rank.index("train.py") :]

    torch_run.config_from_args = config_from_args
    launch.main()


def run_rank(*arguments: str) -> int:
    """Train as one rank; the launcher passes on its place among the others in the environment."""
    sys.argv = [*arguments]
    if code := cli(train.main):
        os._exit(code)
    return code
