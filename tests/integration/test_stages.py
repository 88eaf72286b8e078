"""A run in stages, with a teacher: every stop is resumed bit by bit, and processes share the work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.integration.tiny_run import losses, metrics, run, settings, write_text
from training.run.checkpoint import checkpoints

STAGES = [
    {"start": 3, "set": {"data.seq_len": 128, "model.rope_theta": 50000.0, "recall.seq_len": 128}},
    {"start": 6, "set": {"model.layers": [{"kind": "full"}, {"window": 4}, {"window": 4}], "recall.weight": [[0, 0.5]],
                         "recall.curriculum.max_distance": 9}},
]  # fmt: skip


def write_staged(folder: Path, teacher: Path, **training: Any) -> Path:
    """Nine steps in three stages. The second has longer rows, the third other layers and a smaller last distance."""
    if not (folder / "train.txt").exists():
        write_text(folder)
    described = settings(folder, max_steps=9, save_every_steps=1, keep_checkpoints=99, validate_every_steps=4)
    described["training"] |= {"distillation": {"weight": 0.5, "temperature": 2.0, "teacher": str(teacher)}}
    described["training"] |= {"stages": STAGES} | training
    described["recall"]["curriculum"] = {"accuracy": 0.0, "smoothing": 0.0, "growth": 1.5}  # D grows with every step
    described["data"]["cache_dir"] = str(teacher.parents[1] / "cache")
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(described))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run that was stopped after two steps: one full layer on two sliding ones."""
    folder = tmp_path_factory.mktemp("teacher")
    write_text(folder)
    described = settings(folder, max_steps=2)
    described["model"] |= {"layers": [{}, {}, {"kind": "full"}], "hidden_size": 16}
    described["recall"] = {"enabled": False}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(described))
    run(folder / "tiny.yaml")
    return folder / "run/hf"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = run(write_staged(folder, teacher))
    assert "stage 2 from step 4: R = 21, rows of 128 tokens" in output
    assert "stage 3 from step 7: R = unbounded, rows of 128 tokens" in output
    return folder


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_stopped_before_at_and_after_a_border_the_run_goes_on_bit_by_bit(
    tmp_path: Path, undisturbed: Path, teacher: Path, step: int
) -> None:
    checkpoint = undisturbed / f"run/checkpoints/step-{step:06d}"
    config = write_staged(tmp_path, teacher)
    for name in ("train.txt", "heldout.txt"):  # the same text, at the path that the settings name
        assert (tmp_path / name).read_text() == (undisturbed / name).read_text()
    files = [f"data.{part}_files=['{undisturbed}/{part}.txt']" for part in ("train", "heldout")]
    output = run(config, *files, "--resume", str(checkpoint))
    assert f"at step {step}" in output
    expected = {number: row for number, row in losses(undisturbed).items() if number > step}
    assert losses(tmp_path) == expected
    ours, theirs = (load_file(folder / "run/hf/model.safetensors") for folder in (tmp_path, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_checkpoint_has_the_config_of_its_stage(undisturbed: Path) -> None:
    configs = {
        int(c.name[-2:]): json.loads((c / "hf/config.json").read_text()) for c in checkpoints(undisturbed / "run")
    }
    assert [configs[step]["rope_theta"] for step in range(1, 10)] == [10000.0] * 3 + [50000.0] * 6
    assert [configs[step]["model_type"] for step in range(1, 10)] == ["mistral"] * 6 + ["ministral"] * 3
    export = json.loads((undisturbed / "run/hf/config.json").read_text())
    assert export["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]


def test_the_curriculum_follows_the_reach_of_each_stage(undisturbed: Path) -> None:
    distances = [row["distance"] for row in losses(undisturbed).values()]
    assert distances[:6] == sorted(distances[:6])
    assert max(distances[:6]) > 9
    assert distances[6:] == [9, 9, 9]
    probed = metrics(undisturbed, "probe")
    assert (list(probed[4]["accuracy"]), list(probed[9]["accuracy"])) == (["8", "16", "21"], ["8", "9"])


def test_the_distillation_is_logged_and_learned(undisturbed: Path) -> None:
    rows = losses(undisturbed)
    assert rows[9]["loss_distillation"] < rows[1]["loss_distillation"]
    assert all(0.0 <= row["accuracy_distillation"] <= 1.0 for row in rows.values())


def test_two_processes_equal_one_in_every_stage(tmp_path: Path, undisturbed: Path, teacher: Path) -> None:
    output = run(write_staged(tmp_path, teacher), processes=2)
    assert output.count("stage 3 from step 7") == 1
    names = ("loss_text", "loss_distillation", "loss_answer", "loss_relay", "grad_norm_text", "grad_norm_recall")
    ours, theirs = ([row[name] for row in losses(f).values() for name in names] for f in (tmp_path, undisturbed))
    assert ours == pytest.approx(theirs, rel=3e-3)


def test_before_a_border_a_stage_changes_nothing(tmp_path: Path, undisturbed: Path, teacher: Path) -> None:
    run(write_staged(tmp_path, teacher, stages=[]))
    ours, theirs = losses(tmp_path), losses(undisturbed)
    assert [ours[step] for step in (1, 2, 3)] == [theirs[step] for step in (1, 2, 3)]
    assert ours[4] != theirs[4]


def test_a_teacher_with_other_weights_is_refused_on_resuming(tmp_path: Path, teacher: Path) -> None:
    changed = tmp_path / "teacher/run/hf"
    changed.mkdir(parents=True)
    for file in teacher.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    config = write_staged(tmp_path, changed, max_steps=2, stages=[])
    run(config)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    output = run(config, expect=2)
    assert "the weights of the teacher (training.distillation) have changed" in output
    assert "put the old weights back into the folder of the teacher, or start a run under another name" in output
