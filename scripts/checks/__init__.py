"""The checks of `scripts/doctor.py`: the machine, attention against the oracle, and speed."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Section:
    """A table, whose columns are the keys of its rows, and what is not as it should be, each with its remedy.

    wrong: a form of attention computes wrong numbers, or fails.
    """

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)
    wrong: bool = False

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append({"what": what, "remedy": remedy})
