"""The recall curriculum, and the state of a run, which includes it.

Distances are drawn from [1, D], and D grows while accuracy holds. Each task has its own D.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from training.settings.schema import CurriculumSettings


@dataclass(frozen=True)
class CurriculumState:
    """State of one task, saved with each checkpoint: D in tokens, and the running mean accuracy since D last grew."""

    distance: int
    accuracy: float = 0.0


@dataclass(frozen=True)
class Curriculum:
    """The rules: they map a state and what a step measured to the next state. `window` and `reach` are tokens.

    >>> rules = Curriculum(CurriculumSettings(growth=1.5, accuracy=0.9, smoothing=0.0), window=16, reach=480)
    >>> rules.start()
    CurriculumState(distance=16, accuracy=0.0)
    >>> rules.advance(rules.start(), correct=19, asked=20)
    CurriculumState(distance=24, accuracy=0.0)
    >>> rules.advance(rules.start(), correct=10, asked=20)
    CurriculumState(distance=16, accuracy=0.5)
    """

    settings: CurriculumSettings
    window: int
    reach: int

    @property
    def last_distance(self) -> int:
        return self.settings.max_distance or self.reach

    def start(self) -> CurriculumState:
        start, last = self.settings.start_distance, self.last_distance
        return CurriculumState(last if start == "last" else min(start or self.window, last))

    def advance(self, state: CurriculumState, correct: float, asked: float) -> CurriculumState:
        """The state after a step that answered `correct` of `asked` queries."""
        if asked == 0:
            return state
        past = self.settings.smoothing
        accuracy = past * state.accuracy + (1 - past) * correct / asked
        if accuracy < self.settings.accuracy or state.distance >= self.last_distance:
            return replace(state, accuracy=accuracy)
        grown = max(state.distance + 1, int(state.distance * self.settings.growth))
        return CurriculumState(min(grown, self.last_distance))

    def row_length(self, distance: int, full: int, needed: int = 0) -> int:
        """Tokens of a recall sequence: the least of `row_lengths` that holds `distance` and `needed`, else `full`."""
        least = max(distance + 2 * self.window, needed)
        return min((n for n in self.settings.row_lengths if least <= n < full), default=full)

    def batch_factor(self, distance: int) -> int:
        """How many times `tokens_per_step` a step has at D = `distance`."""
        return max((factor for start, factor in self.settings.larger_batches if distance >= start), default=1)


@dataclass
class State:
    """Progress that a checkpoint saves besides tensors. `step` counts finished steps; it is the index of the next."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    horizon: int = 0
    validation_bits_per_byte: float | None = None
    curriculum: dict[str, CurriculumState] = field(default_factory=dict)  # by task

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "State":
        """From the JSON of a checkpoint. The first version kept the curriculum one level deeper."""
        states = saved["curriculum"].get("states", saved["curriculum"])
        return cls(**saved | {"curriculum": {task: CurriculumState(**state) for task, state in states.items()}})

    @property
    def distances(self) -> dict[str, int]:
        """D of each task, in tokens."""
        return {task: state.distance for task, state in self.curriculum.items()}

    def limit(self, last: int) -> None:
        """Lower every D to the last distance. The next stage of a run may have a smaller reach."""
        lower = {task: replace(state, distance=min(state.distance, last)) for task, state in self.curriculum.items()}
        self.curriculum = lower

    def columns(self) -> dict[str, int]:
        """For the log: the largest D, and each task's where there are several."""
        each = {f"distance_{task}": d for task, d in self.distances.items()} if len(self.curriculum) > 1 else {}
        return {"distance": max(self.distances.values())} | each
