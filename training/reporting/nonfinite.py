"""Steps whose loss or gradient is not finite: their batches are saved for inspection; too many in a row end the run.

    skipped/step-000013-text-rank-0.json    loss, gradient norm, and every micro-batch as token ids and as text

Steps count from 1 here: step 13 is the one that would have been the thirteenth update.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from data.tokenizer import Tokenizer
from training.objective import Measured, MicroBatch, Objective
from training.processes.signals import TrainingFault
from training.run.checkpoint import write_text

KEPT_FILES = 200  # so that a run that skips for hours does not fill the disk


def keep_batch(
    run_dir: Path, objective: Objective, measured: Measured, step: int, distances: Mapping[str, int],
    tokenizer: Tokenizer,
) -> str:  # fmt: skip
    """Save this rank's sequences of a skipped step, whose index (from 0) is `step`. Returns where, in a sentence."""
    rank, folder = PartialState().process_index, run_dir / "skipped"
    folder.mkdir(exist_ok=True)
    if sum(1 for _ in folder.iterdir()) >= KEPT_FILES:
        return f"{folder} holds {KEPT_FILES} files already"
    group = rank // objective.settings.training.context_parallel
    batches = objective.micro_batches(step, distances, group)
    facts = {
        "step": step + 1,
        "objective": objective.name,
        "distances": dict(distances),
        "rows": [rows.start for rows in objective.plan(distances).micro_ranges(group, objective.ranks)],
        "measured": {k: repr(v) for k, v in measured.columns(objective.name).items()},  # repr: JSON has no NaN
        "text": [tokenizer.decode(ids) for batch in batches for ids in batch.input_ids.tolist()],
        "micro_batches": [_contents(batch) for batch in batches],
    }
    path = folder / f"step-{step + 1:06d}-{objective.name}-rank-{rank}.json"
    write_text(path, json.dumps(facts, default=Tensor.tolist))
    return f"its batch is in {path}"


def _contents(batch: MicroBatch) -> dict[str, Any]:
    """`targets` are the scored positions and their labels. Without `documents` each sequence is one document."""
    return {"input_ids": batch.input_ids, "documents": batch.packing.documents, "targets": batch.targets}


def stop_after(in_a_row: int, limit: int, step: int) -> None:
    """Raises TrainingFault once `limit` steps in a row were skipped, the last one `step`."""
    if in_a_row >= limit:
        what = f"{in_a_row} steps in a row had a loss or gradient that is not finite (training.max_skipped_steps)"
        raise TrainingFault(
            f"{what}, the last one step {step}\n"
            "  their batches are in the run folder's skipped/, the checkpoints are from before;\n"
            "  lower training.optimizer.lr, or look at the data of these steps"
        )
