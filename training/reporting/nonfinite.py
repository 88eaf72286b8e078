"""Steps whose loss or gradient is not finite: their batches are saved for inspection; too many in a row end the run.

    skipped/step-000013-text-rank-0.safetensors   input_ids, documents and scored positions of every micro-batch
                                    ....json      loss, gradient norm, and the sequences as text

Steps count from 1 here: step 13 is the one that would have been the thirteenth update.
"""

from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

from data.tokenizer import Tokenizer
from training.objective import Measured, Objective
from training.processes.signals import TrainingFault
from training.run.checkpoint import write_json

KEPT_FILES = 200  # so that a run that skips for hours does not fill the disk


def keep_batch(
    run_dir: Path,
    objective: Objective,
    measured: Measured,
    step: int,
    distances: Mapping[str, int],
    tokenizer: Tokenizer,
) -> str:
    """Save this rank's sequences of a skipped step. Returns a sentence that says where they are.

    `step` is the index from which batches are made, one less than the number of the step.
    """
    rank, folder = PartialState().process_index, run_dir / "skipped"
    folder.mkdir(exist_ok=True)
    if sum(1 for _ in folder.iterdir()) >= KEPT_FILES:
        return f"{folder} holds {KEPT_FILES} files already"
    batches = objective.micro_batches(step, distances, rank)
    tensors = {}
    for number, batch in enumerate(batches):
        tensors[f"micro-{number}/input_ids"] = batch.input_ids.contiguous()
        if batch.documents is not None:
            tensors[f"micro-{number}/documents"] = batch.documents.contiguous()
        for term, target in batch.targets.items():
            tensors[f"micro-{number}/{term}/index"] = target.index.contiguous()
            tensors[f"micro-{number}/{term}/labels"] = target.labels.contiguous()
    path = folder / f"step-{step + 1:06d}-{objective.name}-rank-{rank}.safetensors"
    save_file(tensors, path)
    facts = {
        "step": step + 1,
        "objective": objective.name,
        "distances": dict(distances),
        "rows": [rows.start for rows in objective.plan(distances).micro_ranges(rank, objective.ranks)],
        "measured": {k: repr(v) for k, v in measured.columns(objective.name).items()},  # repr: JSON has no NaN
        "text": [tokenizer.decode(ids) for batch in batches for ids in batch.input_ids.tolist()],
    }
    write_json(path.with_suffix(".json"), facts)
    return f"its batch is in {path}"


def stop_after(in_a_row: int, limit: int, step: int) -> None:
    """Raises TrainingFault once `limit` steps in a row were skipped, the last one `step`."""
    if in_a_row >= limit:
        raise TrainingFault(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite "
            f"(training.max_skipped_steps), the last one step {step}\n"
            "  their batches are in the run folder's skipped/, the checkpoints are from before;\n"
            "  lower training.optimizer.lr, or look at the data of these steps"
        )
