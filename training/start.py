"""The decoder as training begins: drawn from the seed, or grown from a shallower run."""

from pathlib import Path

from data.tokenizer import Tokenizer
from model import hub
from model.decoder import InitOptions, WindreachForCausalLM, build_model
from model.errors import UserError
from model.growth import grow
from training.build import model_config
from training.checkpoint import file_sha256, newest_valid
from training.run_folder import check_tokenizer, read_facts, run_dir
from training.settings import Settings


def new_decoder(settings: Settings, tokenizer: Tokenizer) -> WindreachForCausalLM:
    """The decoder with weights drawn from the seed."""
    init = InitOptions(**settings.model.init.model_dump(exclude={"grow_from"}))
    return build_model(model_config(settings, tokenizer.vocab_size), init, settings.seed)


def grow_from_run(
    decoder: WindreachForCausalLM, settings: Settings, tokenizer: Tokenizer, resume: str
) -> dict[str, str]:
    """Grow `decoder`, in place, from the run that `model.init.grow_from` names; returns the hash of its weights.

    Nothing to do, and an empty answer, where none is named or where a checkpoint will be resumed. Raises UserError
    where that run is not there, or has another tokenizer or other widths.
    """
    named = settings.model.init.grow_from
    if named is None or (resume != "never" and (resume != "auto" or newest_valid(run_dir(settings)))):
        return {}
    run, export = Path(named), Path(named) / "hf"
    try:
        if not export.is_dir():
            raise UserError("holds no hf/, the export of a finished run; train that one first")
        check_tokenizer(run, read_facts(run).get("tokenizer_sha256"), tokenizer.sha256)
        grow(decoder, hub.load(export))
    except UserError as error:
        raise UserError(f"model.init.grow_from = {named!r}: {error}") from error
    return {"grown_from_sha256": file_sha256(export / "model.safetensors")}
