"""Learning rate and weights of objectives as pure functions of the step, so a resume has nothing to restore."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from training.settings.schema import ScheduleSettings


def rate_factor(schedule: ScheduleSettings, step: int, max_steps: int) -> float:
    """Share of the peak learning rate at `step` (0-based; the last step is `max_steps - 1`).

    wsd: linear warmup, constant, then linear decay over the last `decay_fraction` of all steps.
    cosine: linear warmup, then half a cosine. Both end at `min_lr_ratio`.
    """
    warmup = min(1.0, (step + 1) / (schedule.warmup_steps + 1))
    if schedule.kind == "constant":
        return warmup
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, round(max_steps * (1 - schedule.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start + 1) / max(1, max_steps - start)))
    fall = progress if schedule.kind == "wsd" else (1 - math.cos(math.pi * progress)) / 2
    return warmup * (1 - fall * (1 - schedule.min_lr_ratio))


def interpolate(points: Sequence[tuple[float, float]], step: float, max_steps: int) -> float:
    """Value at `step` of `[share of all steps, value]` points; constant before the first and after the last.

    >>> interpolate([(0.5, 0.0), (1.0, 0.4)], step=75, max_steps=100)
    0.2
    >>> interpolate([(0.5, 0.0), (1.0, 0.4)], step=10, max_steps=100)
    0.0
    """
    ordered, share = sorted(points), step / max_steps
    after = bisect_right([x for x, _ in ordered], share)
    if after in (0, len(ordered)):
        return ordered[max(0, after - 1)][1]
    (x0, y0), (x1, y1) = ordered[after - 1 : after + 1]
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
