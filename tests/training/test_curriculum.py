from training.curriculum import Curriculum, CurriculumState
from training.settings.schema import CurriculumSettings


def rules(**settings: object) -> Curriculum:
    return Curriculum(CurriculumSettings(**settings), window=16, reach=480)


def test_starts_at_the_window_and_never_passes_the_reach() -> None:
    curriculum = rules(smoothing=0.0)
    state = curriculum.start()
    assert state.distance == 16
    for _ in range(100):
        state = curriculum.advance(state, 10, 10)
    assert state.distance == 480


def test_may_start_at_the_last_distance() -> None:
    assert rules(start_distance="last").start().distance == 480
    assert rules(start_distance="last", max_distance=300).start().distance == 300


def test_growth_forgets_the_accuracy_of_shorter_distances() -> None:
    curriculum = rules(smoothing=0.5, accuracy=0.7)
    once = curriculum.advance(curriculum.start(), 10, 10)
    assert once == CurriculumState(16, 0.5)
    assert curriculum.advance(once, 10, 10) == CurriculumState(19, 0.0)


def test_a_step_without_queries_changes_nothing() -> None:
    state = CurriculumState(40, 0.3)
    assert rules().advance(state, 0, 0) == state


def test_a_small_distance_grows_by_at_least_one() -> None:
    curriculum = rules(start_distance=1, growth=1.01, smoothing=0.0)
    assert curriculum.advance(curriculum.start(), 1, 1).distance == 2


def test_rows_are_short_while_distances_are_and_batches_grow() -> None:
    curriculum = rules(row_lengths=[128, 64], larger_batches=[(100, 2), (250, 4)])
    assert [curriculum.row_length(d, 512) for d in (16, 32, 33, 96, 97)] == [64, 64, 128, 128, 512]
    assert [curriculum.batch_factor(d) for d in (99, 100, 249, 250)] == [1, 2, 2, 4]
