"""Stages: what each stretch of steps is trained with, and what a stage can't change."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.settings.test_config_file import GOOD, good, refusal
from training.settings.config_file import load_settings
from training.settings.stages import Stretch, stretches_of

__all__ = ["good"]  # a fixture


def stages(*each: dict[str, Any]) -> str:
    return f"training.stages={yaml.safe_dump(list(each), default_flow_style=True, width=9999).strip()}"


def loaded(path: Path, *each: dict[str, Any]) -> list[Stretch]:
    return stretches_of(load_settings(path, [stages(*each)]))


def test_a_run_without_stages_is_one_stretch(good: Path) -> None:
    settings = load_settings(good)
    assert stretches_of(settings) == [Stretch(settings, 0, 200, 0)]


def test_a_stage_keeps_what_the_stage_before_it_set_and_ends_where_the_next_begins(good: Path) -> None:
    longer, wider = {"data.seq_len": 128}, {"model": {"sliding_window": 16, "rope_theta": 5e5}}
    first, second, third = loaded(good, {"start": 0.25, "set": longer}, {"start": 150, "set": wider})
    assert [(s.first, s.end) for s in (first, second, third)] == [(0, 50), (50, 150), (150, 200)]
    assert [s.settings.data.seq_len for s in (first, second, third)] == [64, 128, 128]
    assert [s.settings.model.sliding_window for s in (first, second, third)] == [8, 8, 16]
    assert third.settings.model.rope_theta == 5e5
    assert not any(s.settings.training.stages for s in (first, second, third))


def test_the_order_of_text_begins_anew_where_rows_or_tokens_of_a_step_change_and_nowhere_else(good: Path) -> None:
    each = (
        {"model.rope_theta": 5e5},
        {"data.seq_len": 128},
        {"model.sliding_window": 4},
        {"training.tokens_per_step": 1024},
    )
    listed = loaded(good, *({"start": 20 * i, "set": one} for i, one in enumerate(each, 1)))
    assert [s.text_first for s in listed] == [0, 0, 40, 40, 80]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"start": 200, "set": {"data.seq_len": 128}},
         "training.stages.0.start = 200  (override {}\n    the stage begins at step 200, and the run has "
         "training.max_steps = 200; lower it"),
        ({"start": 0.5, "set": {"model.hidden_size": 64}},
         "training.stages.0.set.model.hidden_size = 64  (override {}\n    it decides what weights the model has, and "
         "these stay the same through a run; a stage may set data.seq_len, model.layers"),
        ({"start": 0.5, "set": {"seed": 1}}, "it stays the same through a run; a stage may set data.seq_len"),
        ({"start": 0.5, "set": {"data.seqlen": 128}}, "unknown setting; did you mean data.seq_len?"),
        ({"start": 0.5, "set": {"data.sources.0.weight": 1}},
         "sources stay the same through a run; give the source a weight that changes: points [share of all steps"),
        ({"start": 0.5, "set": {"data.seq_len": 100}},
         "training.stages.0  (override {}\n    from this stage on training.tokens_per_step = 512: not a multiple of "
         "data.seq_len = 100; use 500 for example"),
        ({"start": 0.5, "set": {"data.seq_len": "long"}},
         "from this stage on data.seq_len = 'long': expected a whole number; write it in digits"),
        ({"start": 0.5, "set": {"model.layers": [{"sink": True}]}},
         "from this stage on model.layers: layer 0 would gain or lose its sink, which is a weight; keep `sink`"),
        ({"start": 0.5, "set": {"model.rope_scaling": {"factor": "four"}}},
         "from this stage on model.rope_scaling.factor = 'four': expected"),
        ({"start": 0.5, "set": {"model.rope_scaling": 4}}, "from this stage on model.rope_scaling = 4: expected"),
        ({"start": 1.5, "set": {"data.seq_len": 128}}, "training.stages.0.start = 1.5"),
    ],
)  # fmt: skip
def test_what_a_stage_can_not_change_is_refused(good: Path, stage: dict[str, Any], expected: str) -> None:
    override = stages(stage)
    assert expected.replace("{}", f"{override})") in refusal(good, override)


def test_stages_come_in_order_and_the_second_builds_on_the_first(good: Path) -> None:
    late, early = {"start": 100, "set": {"data.seq_len": 128}}, {"start": 0.5, "set": {"model.rope_theta": 3}}
    refused = refusal(good, stages(late, early))
    assert f"training.stages.1.start = 0.5  (override {stages(late, early)})\n" in refused
    assert "the stage begins at step 100, and the one before it at step 100; raise it" in refused
    farther = {"start": 150, "set": {"recall.curriculum.max_distance": 40}}
    assert "no token farther back than R = 28" in refusal(good, stages(farther))
    loaded(good, {"start": 100, "set": {"model.sliding_window": 16}}, farther)


def test_stages_survive_settings_yaml(good: Path, tmp_path: Path) -> None:
    settings = load_settings(good, [stages({"start": 0.5, "set": {"model.layers": [{"kind": "full"}, {"window": 4}]}})])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(saved) == settings
    assert [layer.kind for layer in stretches_of(settings)[1].settings.model.layers] == ["full", "sliding"]


def test_a_stage_can_be_changed_on_the_command_line(tmp_path: Path) -> None:
    listed = [{"start": 0.5, "set": {"data.seq_len": 128}}]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"training": GOOD["training"] | {"stages": listed}}))
    settings = load_settings(path, ["training.stages.0.start=20", "training.stages.0.set.model.rope_theta=7"])
    assert [(s.first, s.settings.data.seq_len, s.settings.model.rope_theta) for s in stretches_of(settings)] == [
        (0, 64, 10000.0),
        (20, 128, 7.0),
    ]


def test_a_longest_row_that_a_stage_sets_is_kept(good: Path) -> None:
    change = {"model.rope_scaling": {"factor": 1e5}, "model.max_position_embeddings": 99999}
    _, after = loaded(good, {"start": 0.5, "set": change})
    assert after.settings.model.max_position_embeddings == 99999


@pytest.mark.parametrize(
    ("scaling", "original", "longest"),
    [
        ({"factor": 4}, 64, 131072),
        ({"rope_type": "linear", "factor": 4.0}, None, 131072),
        ({"factor": 4.0, "original_max_position_embeddings": 65536}, 65536, 4 * 65536),
    ],
)
def test_scaled_positions_start_from_the_rows_before_and_the_longest_row_grows(
    good: Path, scaling: dict[str, Any], original: int | None, longest: int
) -> None:
    _, after = loaded(good, {"start": 0.5, "set": {"model.rope_scaling": scaling}})
    assert after.settings.model.rope_scaling is not None
    assert after.settings.model.rope_scaling.original_max_position_embeddings == original
    assert after.settings.model.max_position_embeddings == longest


def test_distillation_without_any_teacher_is_refused(good: Path) -> None:
    refused = refusal(good, "training.distillation={weight: 0.5}")
    assert "training.distillation = {" in refused
    assert "the run starts from no pretrained model, so there is no teacher" in refused
    assert "give training.distillation.teacher, or model.init.from_pretrained" in refused
