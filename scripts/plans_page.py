"""Make docs/plans.md anew: what `scripts/plan.py` says of Mistral-7B on 8 to 1,024 H100s.

python scripts/plans_page.py
"""

import io
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console

from model.errors import cli
from scripts.plan import parse, planned, print_plan

PAGE = ROOT / "docs/plans.md"
WIDTH = 120  # columns of the page
HEAD = """# Plans for Mistral-7B

What `configs/mistral-7b.yaml` (2.1 trillion tokens in rows of 16,384) needs on 8, 64, 256 and 1,024 H100s at an MFU
of 40 %. The figures are computed, not measured on such machines: peaks come from data sheets, the MFU is an
assumption, memory is counted on the code of this repository as [`training/planning/memory.py`](../training/planning/memory.py) says,
FLOPs count visible keys only. What is assumed of sharding and recomputation stands at the head of
[`training/planning/cluster.py`](../training/planning/cluster.py).

`python scripts/plans_page.py` makes this page anew. For another model, GPU or number: `python scripts/plan.py CONFIG
--gpus N --gpu NAME [--mfu 0.4] [key=value ...]`; `--gpu cpu` measures this machine's matmul, `--json FILE` writes the
figures.

- "recompute: layers" is `training.activation_checkpointing: true`. Only FSDP2 with it fits 80 GB at rows of 16,384
  tokens.
- The largest micro-batch is that of one GPU; `training.micro_batch_tokens` sets it.
- On small models planned bytes are compared with those of real steps on a CPU (`tests/training/planning/test_memory.py`), and
  FLOPs with torch's counter (`tests/model/test_flops.py`).
"""
LARGER_STEPS = "Each GPU takes a row, so a step has four times as many tokens, and the run a quarter as many steps.\n\n"
CONFIG = "configs/mistral-7b.yaml"
COMMANDS = {
    "8 H100s": f"{CONFIG} --gpus 8 --gpu h100",
    "64 H100s": f"{CONFIG} --gpus 64 --gpu h100",
    "256 H100s": f"{CONFIG} --gpus 256 --gpu h100",
    "1,024 H100s": f"{CONFIG} --gpus 1024 --gpu h100 training.tokens_per_step=16777216 training.max_steps=125000",
}


def page() -> str:
    sections = []
    for title, command in COMMANDS.items():
        note = LARGER_STEPS if "tokens_per_step" in command else ""
        sections.append(f"\n## {title}\n{note}```\n$ python scripts/plan.py {command}\n{said(command)}\n```\n")
    return HEAD + "".join(sections)


def said(command: str) -> str:
    """What the command prints, without blanks at line ends."""
    console = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=False)
    print_plan(planned(parse(shlex.split(command))), console)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()).strip()


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    sys.exit(cli(main))
