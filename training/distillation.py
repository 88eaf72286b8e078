"""The teacher of a distillation: a model that never changes, the distribution of which the text objective also learns.

Its layers see what they saw in its own checkpoint. It reads the same batches, without gradients. Every process holds a
whole copy of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.folders import file_hashes
from data.pretrained import checkpoint_config, checkpoint_folder
from data.sources import HASHES
from data.tokenizer import FILE, JSON_FILE, Tokenizer, load_tokenizer
from model import hub
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.packing import Packing
from training.cross_entropy import Lesson
from training.settings.schema import DistillationSettings, Settings
from training.settings.stages import stretches_of


@dataclass(frozen=True)
class Teacher:
    """A plain object, no module: the teacher's weights are neither trained nor saved nor exchanged."""

    decoder: WindreachForCausalLM
    settings: DistillationSettings

    def lesson(self, input_ids: Tensor, packing: Packing, index: Tensor) -> Lesson:
        """What it says at the scored positions `index` of a batch."""
        with torch.no_grad():
            hidden = self.decoder.model(input_ids, packing=packing).last_hidden_state.flatten(0, 1)
        weight, temperature = self.settings.weight, self.settings.temperature
        return Lesson(hidden.index_select(0, index), self.decoder.lm_head.weight, weight, temperature)

    def waits(self, dtype: torch.dtype) -> bool:
        """Whether its attention, with matrix products in `dtype`, reads the device."""
        weight = self.decoder.lm_head.weight
        with torch.no_grad():
            return any(plan.waits for plan in self.decoder.model.plans(weight.new_empty(0, dtype=dtype)))


def teacher_name(settings: Settings) -> str | None:
    """The name of the teacher, as `model.init.from_pretrained` takes it. None without distillation."""
    chosen = settings.training.distillation
    return None if chosen is None else chosen.teacher or settings.model.init.from_pretrained


def teacher_config(settings: Settings) -> WindreachConfig | None:
    """The teacher as its config.json describes it. Raises UserError if there is none, or none that we can read."""
    if (name := teacher_name(settings)) is None:
        return None
    with _named(name):
        config = hub.decoder_config(checkpoint_config(name), "config.json")
        _check_rows(config, settings)
        return config


def teacher_hash(settings: Settings) -> str | None:
    """The hash of the teacher's weights; of several files, their hashes in order. None without distillation."""
    if (name := teacher_name(settings)) is None:
        return None
    with _named(name):
        files = hub.weight_files(checkpoint_folder(name))
        return " ".join(file_hashes(files, Path(settings.data.cache_dir) / HASHES))


def load_teacher(settings: Settings, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Teacher | None:
    """The teacher in evaluation mode. Raises UserError if its vocabulary is not that of the model."""
    chosen, name = settings.training.distillation, teacher_name(settings)
    if chosen is None or name is None:
        return None
    with _named(name):
        folder = checkpoint_folder(name)
        _check_vocabulary(folder, tokenizer, vocab_size)
        _check_rows(hub.load_config(folder), settings)
        decoder = WindreachForCausalLM.from_pretrained(folder)
    decoder.requires_grad_(False).to(device)
    return Teacher(decoder, chosen)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A UserError that is raised inside begins with the setting."""
    try:
        yield
    except UserError as error:
        raise UserError(f"training.distillation: the teacher {name!r}: {error}") from error


def _check_rows(teacher: WindreachConfig, settings: Settings) -> None:
    """Farther back than it was trained a teacher says nonsense, which the model would learn."""
    longest, most = max(s.settings.data.seq_len for s in stretches_of(settings)), teacher.max_position_embeddings
    if longest > most:
        what = f"its context is {most:,} tokens, and rows have data.seq_len = {longest:,}"
        raise UserError(f"{what}\n  give a teacher with a longer context, or shorter rows in every stage")


def _check_vocabulary(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Probabilities of other tokens can't be compared."""
    has_tokenizer = any((folder / name).is_file() for name in (FILE, JSON_FILE))
    if (theirs := hub.load_config(folder).vocab_size) != vocab_size:
        what = f"it has {theirs:,} tokens and the model {vocab_size:,}"
    elif has_tokenizer and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        what = "its tokenizer has other tokens"
    else:
        return
    remedy = "give a teacher with the same vocabulary, or data.tokenizer.model_file the tokenizer of the teacher"
    raise UserError(f"{what}\n  {remedy}")
