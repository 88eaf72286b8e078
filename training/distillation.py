"""The teacher of a distillation: a model that never changes, the distribution of which the text objective also learns.

Its layers see what they saw in its own checkpoint. It reads the same batches, without gradients. Every process holds a
whole copy of it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.folders import file_hashes
from data.tokenizer import FILE, JSON_FILE, Tokenizer, load_tokenizer
from model import hub
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.packing import Packing
from training.cross_entropy import Lesson
from training.settings.schema import DistillationSettings, Settings


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


def teacher_folder(settings: Settings) -> Path | None:
    """The folder of the teacher's checkpoint. None without distillation."""
    chosen = settings.training.distillation
    return None if chosen is None else Path(chosen.teacher or "").expanduser()


def teacher_config(settings: Settings) -> WindreachConfig | None:
    """The teacher as its checkpoint describes it. Raises UserError if there is none, or none that we can read."""
    folder = teacher_folder(settings)
    try:
        return None if folder is None else hub.load_config(folder)
    except UserError as error:
        raise UserError(f"training.distillation.teacher: {error}") from error


def teacher_hash(settings: Settings) -> str | None:
    """The hash of the teacher's weights; of several files, their hashes in order. None without distillation."""
    folder = teacher_folder(settings)
    remembered = Path(settings.data.cache_dir) / "teachers.json"
    return None if folder is None else " ".join(file_hashes(hub.weight_files(folder), remembered))


def load_teacher(settings: Settings, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Teacher | None:
    """The teacher in evaluation mode. Raises UserError if its vocabulary is not that of the model."""
    chosen, folder, config = settings.training.distillation, teacher_folder(settings), teacher_config(settings)
    if chosen is None or folder is None or config is None:
        return None
    _check_vocabulary(folder, config.vocab_size, tokenizer, vocab_size)
    decoder = WindreachForCausalLM.from_pretrained(folder)
    decoder.requires_grad_(False).to(device)
    return Teacher(decoder, chosen)


def _check_vocabulary(folder: Path, theirs: int, tokenizer: Tokenizer, ours: int) -> None:
    """Probabilities of other tokens can't be compared."""
    has_tokenizer = any((folder / name).is_file() for name in (FILE, JSON_FILE))
    if theirs != ours:
        what = f"it has {theirs:,} tokens and the model {ours:,}"
    elif has_tokenizer and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        what = "its tokenizer has other tokens"
    else:
        return
    remedy = "give a teacher with the same vocabulary, or data.tokenizer.model_file the tokenizer of the teacher"
    raise UserError(f"training.distillation.teacher = {str(folder)!r}: {what}\n  {remedy}")
