import pytest

from training.schedule import interpolate, rate_factor
from training.settings.schema import ScheduleSettings


def test_wsd_warms_up_stays_and_decays_to_the_minimum() -> None:
    wsd = ScheduleSettings(kind="wsd", warmup_steps=4, decay_fraction=0.5, min_lr_ratio=0.1)
    rates = [rate_factor(wsd, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:10] == [1.0] * 6
    assert rates[10] < 1.0
    assert rates[-1] == pytest.approx(0.1)


def test_cosine_is_half_way_down_at_the_middle() -> None:
    cosine = ScheduleSettings(kind="cosine", warmup_steps=0, min_lr_ratio=0.0)
    assert rate_factor(cosine, 49, 100) == pytest.approx(0.5)
    assert rate_factor(cosine, 99, 100) == pytest.approx(0.0, abs=1e-12)


def test_constant_stays_after_warmup() -> None:
    constant = ScheduleSettings(kind="constant", warmup_steps=1)
    assert [rate_factor(constant, s, 10) for s in (0, 1, 9)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_rate_is_positive_at_every_step_with_a_warmup_longer_than_the_run(kind: str) -> None:
    schedule = ScheduleSettings(kind=kind, warmup_steps=50)
    assert all(rate_factor(schedule, s, 10) > 0 for s in range(10))


def test_points_may_come_in_any_order_and_are_flat_outside() -> None:
    points = [(0.8, 1.0), (0.2, 0.1)]
    assert interpolate(points, 0, 100) == 0.1
    assert interpolate(points, 50, 100) == pytest.approx(0.55)
    assert interpolate(points, 99, 100) == 1.0


def test_two_points_at_one_share_are_a_jump() -> None:
    points = [(0.5, 0.0), (0.5, 1.0)]
    assert (interpolate(points, 49, 100), interpolate(points, 50, 100)) == (0.0, 1.0)
