"""The decoder before its first step: fills it with the layers of a shallower run."""

from pathlib import Path

from torch import Tensor

from data.tokenizer import Tokenizer
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.growth import grow
from training.objective import RELAY_HEAD
from training.run.checkpoint import file_sha256, load_state, newest_valid, refuse_damaged
from training.run.folder import check_same_data, read_facts, run_dir
from training.settings.schema import Settings


def grow_from_run(
    decoder: WindreachForCausalLM, settings: Settings, tokenizer: Tokenizer, resume: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Fill `decoder`, in place, with the layers of the run `model.init.grow_from`.

    Returns a fact about that run for run.json, and its relay head. Does nothing if no run is named or a checkpoint will
    be resumed. Every rank calls this and gets the same answer.
    Raises UserError if that run has no export, another tokenizer or other widths.
    """
    named = settings.model.init.grow_from
    if named is None or (resume != "never" and (resume != "auto" or newest_valid(run_dir(settings)))):
        return {}, {}
    run = Path(named).expanduser()
    export = run / "hf"
    try:
        if not export.is_dir():
            raise UserError("holds no hf/, the export of a finished run; train that one first")
        refuse_damaged(export)
        check_same_data(run, read_facts(run), {"tokenizer_sha256": tokenizer.sha256})
        grow(decoder, WindreachForCausalLM.from_pretrained(export))
        return {"grown_from_sha256": file_sha256(export / "model.safetensors")}, _relay_head(run, settings)
    except UserError as error:
        raise UserError(f"model.init.grow_from = {named!r}: {error}") from error


def _relay_head(run: Path, settings: Settings) -> dict[str, Tensor]:
    """The relay head of the run's last checkpoint, if both runs have one. A new head would mislead trained layers."""
    checkpoint = newest_valid(run) if settings.recall.enabled and settings.recall.relay_loss_weight else None
    head = load_state(checkpoint)[1].get(RELAY_HEAD) if checkpoint is not None else None
    if head is not None and len(head) != settings.recall.values:
        raise UserError(f"recall.values is {len(head)} there, {settings.recall.values} here")
    return {} if head is None else {RELAY_HEAD: head}
