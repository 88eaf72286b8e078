"""How far a run has come, and whether another number of processes can go on with it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError
from training.curriculum import CurriculumState

if TYPE_CHECKING:
    from training.objective import Objective

FACTS_SAVED = ("data_sha256", "tokenizer_sha256", "settings_sha256", "precision", "wandb_id")  # with a checkpoint


@dataclass
class State:
    """Progress that a checkpoint saves besides tensors. `step` counts finished steps; it is the index of the next."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    horizon: int = 0
    validation_bits_per_byte: float | None = None
    curriculum: dict[str, CurriculumState] = field(default_factory=dict)  # by task

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "State":
        """From the JSON of a checkpoint. The first version kept the curriculum one level deeper."""
        states = saved["curriculum"].get("states", saved["curriculum"])
        return cls(**saved | {"curriculum": {task: CurriculumState(**state) for task, state in states.items()}})

    @property
    def distances(self) -> dict[str, int]:
        """D of each task, in tokens."""
        return {task: state.distance for task, state in self.curriculum.items()}

    def columns(self) -> dict[str, int]:
        """For the log: the largest D, and each task's where there are several."""
        each = {f"distance_{task}": d for task, d in self.distances.items()} if len(self.curriculum) > 1 else {}
        return {"distance": max(self.distances.values())} | each


def check_same_batches(
    path: Path, objectives: Sequence["Objective"], before: int, distances: Iterable[Mapping[str, int]]
) -> None:
    """Raises UserError if a step would have another number of sequences than with the `before` processes of `path`.

    Otherwise another number of processes changes nothing: each takes an equal share of the same sequences.
    `distances` are the values of D that are still to come, by task.
    """
    processes = "1 process" if before == 1 else f"{before} processes"
    for objective in objectives:
        now = objective.ranks
        for of_tasks in distances:
            rows = objective.plan(of_tasks, before).rows
            if rows != objective.plan(of_tasks).rows:
                at = f" at distance {max(of_tasks.values())}" if objective.name == "recall" else ""
                raise UserError(
                    f"{path}: was saved by {processes}; {now} would train on other batches\n"
                    f"  a step has {rows} rows of {objective.name}{at}, which {now} can't share equally\n"
                    f"  start it with {processes}, or with a number that divides {rows}"
                )
