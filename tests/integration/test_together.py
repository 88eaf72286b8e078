"""One run that does everything at once: a pretrained model, conversations, adapters, stages and distillation.

Each of them is tested alone elsewhere. Here processes share the work in every way, and the run goes on at a border.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.test_sharding import train
from tests.integration.tiny_run import metrics, run, write_chat

STAGES = [{"start": 2, "set": {"data.seq_len": 128, "model.rope_scaling": {"factor": 2.0, "rope_type": "yarn"}}}]
OPTIONS = {
    "max_steps": 4, "save_every_steps": 1, "keep_checkpoints": 9, "validate_every_steps": 2, "stages": STAGES,
    "lora": {"rank": 2, "alpha": 8}, "distillation": {"weight": 0.5, "temperature": 2.0}, "optimizer": {"lr": 0.02},
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with full layers, as a run has exported it."""
    folder = tmp_path_factory.mktemp("pretrained")
    path = write_chat(folder, max_steps=2)
    described = json.loads(path.read_text())
    described["model"] |= {"layers": [{"kind": "full"}], "tie_word_embeddings": True}
    path.write_text(json.dumps(described))
    run(path)
    return folder / "run/hf"


def write_everything(folder: Path, pretrained: Path, **training: Any) -> Path:
    path = write_chat(folder, **OPTIONS | training)
    described = json.loads(path.read_text())
    layers = [{"kind": "full"}, {"global_tokens": 2}, {}]
    described["model"] = {"init": {"from_pretrained": str(pretrained)}, "sliding_window": 8, "layers": layers}
    del described["data"]["tokenizer"], described["data"]["chat_template"]  # both are the model's
    path.write_text(json.dumps(described))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(write_everything(folder, pretrained))
    return folder


def figures(folder: Path) -> list[float]:
    names = ("loss_text", "loss_distillation", "accuracy_distillation", "grad_norm_text")
    trained = [row[name] for row in metrics(folder).values() for name in names]
    return trained + [row["bits_per_byte"] for row in metrics(folder, "validation").values()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/hf/model.safetensors")


def test_the_teacher_sees_what_the_pretrained_model_saw_and_both_differ(alone: Path) -> None:
    divergences = [row["loss_distillation"] for row in metrics(alone).values()]
    assert len(divergences) == 4
    assert min(divergences) > 1e-5


def test_frozen_weights_are_those_of_the_pretrained_model(alone: Path, pretrained: Path) -> None:
    before, after = load_file(pretrained / "model.safetensors"), weights(alone)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_processes_that_share_each_row_equal_one(
    tmp_path: Path, alone: Path, pretrained: Path, sharded: bool
) -> None:
    config = write_everything(tmp_path, pretrained, context_parallel=2, activation_checkpointing=True)
    train(config, sharded=True) if sharded else run(config, processes=2)
    assert figures(tmp_path) == pytest.approx(figures(alone), rel=1e-3)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopped_before_at_and_after_the_border_it_goes_on_bit_by_bit(tmp_path: Path, alone: Path, step: int) -> None:
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    for name in ("tiny.yaml", "run/settings.yaml"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(str(alone), str(tmp_path)))
    config = tmp_path / "tiny.yaml"
    run(config, "--resume", str(tmp_path / f"run/checkpoints/step-00000{step}"))
    assert figures(tmp_path) == figures(alone)
    assert all(torch.equal(weight, weights(alone)[name]) for name, weight in weights(tmp_path).items())


def test_adapters_and_a_tied_matrix_go_on_without_the_pretrained_model(tmp_path: Path, pretrained: Path) -> None:
    model = shutil.copytree(pretrained, tmp_path / "model")
    config = write_everything(tmp_path, model, distillation=None, train_only=["lm_head.weight"])
    run(config)
    whole, before = weights(tmp_path), load_file(model / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], whole[name])}
    assert changed == {name for name in before if "_proj." in name or "embed_tokens" in name}
    shutil.rmtree(model)
    run(config, "--resume", str(tmp_path / "run/checkpoints/step-000001"))
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(tmp_path).items())
