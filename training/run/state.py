"""How far a run has come."""

from dataclasses import dataclass, field
from typing import Any

from training.curriculum import Curricula


@dataclass
class State:
    """What a checkpoint saves besides tensors. `step` counts finished steps, so it is also the index of the next."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    horizon: int = 0
    validation_bits_per_byte: float | None = None
    curriculum: Curricula = field(default_factory=Curricula)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "State":
        """From the JSON of a checkpoint."""
        return cls(**saved | {"curriculum": Curricula.of_json(saved["curriculum"])})
