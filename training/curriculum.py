"""The recall curriculum: distances are drawn from [1, D], and D grows while accuracy holds."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from training.settings import CurriculumSettings


@dataclass(frozen=True)
class CurriculumState:
    """Saved with each checkpoint. `distance` is D in tokens; `accuracy` a running mean since D last grew."""

    distance: int
    accuracy: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Curriculum:
    """Pure: maps a state and what a step measured to the next state.

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
        return CurriculumState(min(self.settings.start_distance or self.window, self.last_distance))

    def advance(self, state: CurriculumState, correct: float, asked: float) -> CurriculumState:
        """The state after a step in which `correct` of `asked` queries were answered."""
        if asked == 0:
            return state
        past = self.settings.smoothing
        accuracy = past * state.accuracy + (1 - past) * correct / asked
        if accuracy < self.settings.accuracy or state.distance >= self.last_distance:
            return replace(state, accuracy=accuracy)
        grown = max(state.distance + 1, int(state.distance * self.settings.growth))
        return CurriculumState(min(grown, self.last_distance))

    def row_length(self, distance: int, full: int) -> int:
        """Tokens per recall row at D = `distance`."""
        enough = [n for n in self.settings.row_lengths if distance + 2 * self.window <= n < full]
        return min(enough, default=full)

    def batch_factor(self, distance: int) -> int:
        return max((factor for start, factor in self.settings.larger_batches if distance >= start), default=1)
