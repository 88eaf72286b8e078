"""What leaves a run: a Hugging Face checkpoint with its tokenizer."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data.tokenizer import Tokenizer
from model import hub
from model.decoder import WindreachForCausalLM

Weights = Mapping[str, Tensor]


def write_hf(decoder: WindreachForCausalLM, weights: Weights, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights, config and tokenizer into an existing folder; the relay head stays behind."""
    hub.save_hf(decoder, folder, weights)
    tokenizer.save(folder)


def replace_export(decoder: WindreachForCausalLM, weights: Weights, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` anew; the old one stays until the new one is complete."""
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write_hf(decoder, weights, tokenizer, aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
