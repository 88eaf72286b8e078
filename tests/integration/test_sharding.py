"""Weights and moments in shards (FSDP2): the run of one process, resumed and exported.

The first run is launched as a user does it. The others are forks with the environment that the launcher sets.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.tiny_run import ROOT, losses, metrics, run, write_config

OPTIONS = {"max_steps": 5, "save_every_steps": 3, "keep_checkpoints": 9, "optimizer": {"kind": "muon", "lr": 0.003}}
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2-cpu-2.yaml"]


SHARDED = {
    "ACCELERATE_USE_CPU": "True", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def train(config: Path, *arguments: str, sharded: bool) -> str:
    """Muon steps its matrices and AdamW the rest, so both optimizers meet shards."""
    return run(config, *arguments, **{"processes": 2, "environment": SHARDED} if sharded else {})


def figures(rows: dict[int, dict[str, Any]]) -> list[float]:
    names = ("loss_text", "loss_answer", "loss_relay", "grad_norm_text", "grad_norm_recall")
    return [row[name] for row in rows.values() for name in names]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, *LAUNCH, "train.py", str(write_config(folder, **OPTIONS))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(write_config(folder, **OPTIONS), sharded=False)
    return folder


def resumed(before: Path, folder: Path, *, sharded: bool) -> Path:
    """A copy of the run, resumed at step 3 of 5."""
    shutil.copytree(before / "run", folder / "run")
    for part in ("train.txt", "heldout.txt"):
        shutil.copy(before / part, folder / part)
    shutil.copytree(before / "cache", folder / "cache")
    for settings in ("tiny.yaml", "run/settings.yaml"):
        (folder / settings).write_text((before / settings).read_text().replace(str(before), str(folder)))
    output = train(folder / "tiny.yaml", "--resume", str(folder / "run/checkpoints/step-000003"), sharded=sharded)
    assert "at step 3" in output
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/hf/model.safetensors")


def test_two_processes_that_hold_half_of_everything_equal_one_that_holds_it_all(sharded: Path, alone: Path) -> None:
    assert figures(metrics(sharded)) == pytest.approx(figures(metrics(alone)), rel=3e-4)
    assert metrics(sharded, "validation")[5]["bits_per_byte"] == pytest.approx(
        metrics(alone, "validation")[5]["bits_per_byte"], rel=1e-4
    )


def test_each_process_writes_its_half_of_the_moments(sharded: Path, alone: Path) -> None:
    folder = sharded / "run/checkpoints/step-000003"
    names = ["hf", "manifest.json", "shard-00001-model-00001-of-00001.safetensors",
             "shard-00002-model-00001-of-00001.safetensors", "state.json"]  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == names
    sizes = [(folder / name).stat().st_size for name in names[2:4]]
    whole = (alone / "run/checkpoints/step-000003/trainer.safetensors").stat().st_size
    assert max(sizes) < 0.6 * whole
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) > set(names[2:4])


def test_sharded_run_resumes_bit_for_bit(sharded: Path, tmp_path: Path) -> None:
    again = resumed(sharded, tmp_path, sharded=True)
    assert losses(again) == losses(sharded)
    assert len(list((again / "run/checkpoints/step-000005").glob("shard-*"))) == 2
    assert all(torch.equal(w, weights(sharded)[name]) for name, w in weights(again).items())


def test_one_process_goes_on_with_what_two_sharded_ones_saved(sharded: Path, tmp_path: Path) -> None:
    again = resumed(sharded, tmp_path, sharded=False)
    assert figures(metrics(again)) == pytest.approx(figures(metrics(sharded)), rel=3e-4)


def test_two_sharded_processes_go_on_with_what_one_saved(alone: Path, tmp_path: Path) -> None:
    again = resumed(alone, tmp_path, sharded=True)
    assert figures(metrics(again)) == pytest.approx(figures(metrics(alone)), rel=3e-4)


def test_export_of_a_sharded_run_is_one_checkpoint_for_transformers(sharded: Path, alone: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(sharded / "run/hf")
    assert type(theirs).__name__ == "MistralForCausalLM"
    for name, expected in AutoModelForCausalLM.from_pretrained(alone / "run/hf").state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], expected, atol=3e-3, rtol=0)  # one step moves by 3e-3


def test_bf16_accumulation_and_recomputation_work_on_shards(tmp_path: Path, alone: Path) -> None:
    options = {"micro_batch_tokens": 64, "activation_checkpointing": True, "precision": "bf16", "max_steps": 2}
    train(write_config(tmp_path, **OPTIONS | options), sharded=True)
    first_two = figures(metrics(alone))[: len(figures(metrics(tmp_path)))]
    assert figures(metrics(tmp_path)) == pytest.approx(first_two, rel=2e-2)
