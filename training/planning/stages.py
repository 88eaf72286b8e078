"""The work of a run, stage by stage."""

from typing import NamedTuple

from model.config import WindreachConfig
from model.windows import reach
from training.distillation import teacher_config
from training.planning.formulas import Setup, Work, memory, work
from training.settings.build import model_config
from training.settings.schema import Settings
from training.settings.stages import Stretch, stretches_of


class StageWork(NamedTuple):
    """A stretch of steps, the decoder during these, the objectives, and the FLOPs of all, a teacher's included."""

    stretch: Stretch
    config: WindreachConfig
    works: list[Work]
    flops: float

    @property
    def tokens(self) -> float:
        return sum(w.tokens for w in self.works)

    def __str__(self) -> str:
        s, farthest = self.stretch, reach(self.config.specs)
        r = "R unbounded" if farthest is None else f"R = {farthest:,}"
        rows = ", ".join(f"{w.tokens:,.0f} tokens of {w.name} in rows of {w.last.seq_len:,}" for w in self.works)
        return f"steps {s.first + 1:,} to {s.end:,}: {r}; {rows}; {self.flops:.3g} FLOPs"


def stage_works(settings: Settings, vocab_size: int, ranks: int) -> list[StageWork]:
    """The stages of a run, at least one. Raises UserError for a stage whose model can't be built."""
    teacher, result = teacher_config(settings), []
    for stretch in stretches_of(settings):
        config = model_config(stretch.settings, vocab_size)
        works = work(stretch.settings, ranks, range(stretch.first, stretch.end))
        result.append(StageWork(stretch, config, works, sum(w.flops(config, teacher) for w in works)))
    return result


def largest_memory(stages: list[StageWork], setup: Setup) -> dict[str, int]:
    """`memory` of the stage that needs the most bytes."""
    return max((memory(s.stretch.settings, s.config, setup) for s in stages), key=lambda needed: sum(needed.values()))
