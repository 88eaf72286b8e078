"""Tells whether this machine is all right: versions, devices, attention, speed, and how to fix what is wrong.

    python scripts/doctor.py                  about a minute on a CPU, a few on a GPU
    python scripts/doctor.py --json doctor.json

Every form of attention that can run here is compared with the oracle, forward and backward. Training and decoding are
timed beside `transformers` with the same weights. The last lines list the problems, each with its remedy.
Exit codes: 0 attention is right (there may be other problems), 1 a form of attention is wrong, 2 a wrong argument.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.errors import cli
from scripts.bench import check_writable
from scripts.checks import Section
from training.run.checkpoint import finite

if TYPE_CHECKING:
    import torch

Checks = dict[str, Callable[["torch.device"], Section]]
REPORT = "report this with the versions above"
REMEDIES = {"Compiler": "install a C++ compiler (g++), for a GPU triton and gcc; or set training.compile to false"}


def main() -> int:
    arguments = parse(sys.argv[1:])
    from scripts.benchmarks.timing import set_up

    console, sections = Console(), list[Section]()
    for section in run(checks(), set_up(arguments.device)):
        console.print(table_of(section))
        sections.append(section)
    problems = [problem for section in sections for problem in section.problems]
    console.print(f"Problems: {len(problems) or 'none'}")
    numbered = Table.grid(padding=(0, 1))
    for number, problem in enumerate(problems, 1):
        numbered.add_row(f"{number}.", escape(f"{problem['what']}\nRemedy: {problem['remedy']}"))
    console.print(numbered)
    if arguments.json:
        arguments.json.write_text(json.dumps(finite(list(map(asdict, sections))), indent=1) + "\n")
    return int(any(section.wrong for section in sections))


def checks() -> Checks:
    from scripts.checks import forms, machine, speed

    return {
        "Versions": machine.versions, "Devices": machine.devices, "Matrix products": machine.matmul,
        "Compiler": machine.compiler, "Backends": forms.backends, "Choice of attention": forms.choices,
        "Attention": forms.forms, "Training": speed.training, "Decoding": speed.decoding,
    }  # fmt: skip


def run(checks: Checks, device: "torch.device") -> Iterator[Section]:
    """The section of each check. One that raises becomes a problem, so that the others still run."""
    from scripts.benchmarks.timing import reason

    for title, check in checks.items():
        try:
            section = check(device)
        except Exception as error:
            section = Section(title)
            section.problem(f"{title} could not be checked: {reason(error)}", REMEDIES.get(title, REPORT))
        yield section


def table_of(section: Section) -> Table:
    columns = list(section.rows[0]) if section.rows else []
    table = Table(*columns, title=section.title, title_justify="left", box=SIMPLE_HEAD)
    for row in section.rows:
        table.add_row(*(shown(row[column]) for column in columns))
    return table


def shown(value: Any) -> str:
    """
    >>> shown(12345.6), shown(2.345), shown("full"), shown(None)
    ('12,346', '2.35', 'full', '–')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write tables and problems to FILE")
    arguments = parser.parse_args(argv)
    check_writable(arguments.json)
    return arguments


if __name__ == "__main__":
    sys.exit(cli(main))
