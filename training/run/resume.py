"""What must be as it was for a run to go on from a checkpoint: text, tokenizer, and how a step is cut into rows."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model.errors import UserError
from training.objective import Objective
from training.run.folder import check_data, check_tokenizer

FACTS_SAVED = ("data_sha256", "tokenizer_sha256", "settings_sha256", "precision", "wandb_id")  # with a checkpoint


def check_checkpoint(path: Path, saved: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises `UserError` where the checkpoint at `path`, whose state is `saved`, was made from other text or tokens."""
    check_data(path, saved["data_sha256"], facts["data_sha256"])
    check_tokenizer(path, saved["tokenizer_sha256"], facts["tokenizer_sha256"])


def check_same_batches(
    path: Path, then: list[Objective], now: list[Objective], distances: Iterable[Mapping[str, int]]
) -> None:
    """Another number of processes is fine while every step keeps its rows: each rank takes an equal share of them.

    `then` is for the processes of the checkpoint at `path`, `now` for those of this start; `distances` are the
    D of each task still to come. Raises `UserError` where steps would have other batches than those of the run so far.
    """
    for before, after in zip(then, now, strict=True):
        if before.ranks == after.ranks:
            return
        for of_tasks in distances:
            rows = before.plan(of_tasks).rows
            if rows != after.plan(of_tasks).rows:
                at = f" at distance {max(of_tasks.values())}" if before.name == "recall" else ""
                raise UserError(
                    f"{path}: was saved by {_processes(before.ranks)}; {after.ranks} would train on other batches\n"
                    f"  a step has {rows} rows of {before.name}{at}, which {after.ranks} can't share equally\n"
                    f"  start it with {_processes(before.ranks)}, or with a number that divides {rows}"
                )


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
