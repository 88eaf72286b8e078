"""Steps whose loss or gradient is not finite: their batches are kept for a look; too many in a row end the run.

    skipped/step-000013-text-rank-0.safetensors   input_ids, documents, and what was scored, of every micro-batch
                                    ....json      loss, gradient norm, and the rows as text

Step 13 is the step that was skipped: the one that would have been the thirteenth update.
"""

from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from training.objective import Measured, MicroBatch, Objective
from training.processes.signals import TrainingFault
from training.run.checkpoint import write_json

KEPT_FILES = 200  # in a run's folder: a run that skips for hours must not fill the disk


def keep_batch(
    run_dir: Path,
    objective: Objective,
    measured: Measured,
    step: int,
    distances: Mapping[str, int],
    tokenizer: Tokenizer,
) -> str:
    """Write this rank's rows of a skipped step, made anew: they are a function of the step. Says where they are.

    `step` is the index from which batches are made, one less than the number of the step.
    """
    state, folder = PartialState(), run_dir / "skipped"
    folder.mkdir(exist_ok=True)
    if sum(1 for _ in folder.iterdir()) >= KEPT_FILES:
        return f"{folder} holds {KEPT_FILES} files already"
    plan = objective.plan(distances)
    ranges = plan.micro_ranges(state.process_index, state.num_processes)
    batches = [objective.micro_batch(step, plan, rows, distances) for rows in ranges]
    path = folder / f"step-{step + 1:06d}-{objective.name}-rank-{state.process_index}.safetensors"
    save_file({k: t.contiguous() for i, b in enumerate(batches) for k, t in _tensors(b, f"micro-{i}").items()}, path)
    facts = {
        "step": step + 1,
        "objective": objective.name,
        "distances": dict(distances),
        "rows": [r.start for r in ranges],
    }
    figures = {k: repr(v) for k, v in measured.columns(objective.name).items()}  # repr: JSON has no NaN
    text = [tokenizer.decode(row) for b in batches for row in b.input_ids.tolist()]
    write_json(path.with_suffix(".json"), facts | {"measured": figures, "text": text})
    return f"its batch is in {path}"


def stop_after(in_a_row: int, limit: int, step: int) -> None:
    """Raises `TrainingFault` once `limit` steps in a row were skipped, the last one `step`."""
    if in_a_row >= limit:
        raise TrainingFault(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite "
            f"(training.max_skipped_steps), the last one step {step}\n"
            "  their batches are in the run folder's skipped/, the checkpoints are from before;\n"
            "  lower training.optimizer.lr, or look at the data of these steps"
        )


def _tensors(batch: MicroBatch, prefix: str) -> dict[str, Tensor]:
    """What a forward pass was given, by name."""
    tensors = {f"{prefix}/input_ids": batch.input_ids}
    if batch.documents is not None:
        tensors[f"{prefix}/documents"] = batch.documents
    for term, target in batch.targets.items():
        tensors |= {f"{prefix}/{term}/index": target.index, f"{prefix}/{term}/labels": target.labels}
    return tensors
