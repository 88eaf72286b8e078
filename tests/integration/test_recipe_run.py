"""A run with every switch of the recipe turned on in its YAML."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import prepare_tokenizer
from model.decoder import build_model
from tests.integration.tiny_run import ROOT, metrics, run, write_config
from training.settings.build import init_options, model_config
from training.settings.config_file import load_settings
from training.start import grow_from_run

SWITCHES = {
    "max_steps": 4,
    "activation_checkpointing": True,
    "z_loss_weight": 0.001,
    "optimizer": {"kind": "muon", "lr": 0.003},
    "schedule": {"kind": "cosine", "warmup_steps": 1, "min_lr_ratio": 0.0},
    "profile": {"start_step": 1, "steps": 2},
}


def test_switches_of_the_recipe_reach_the_run(tmp_path: Path) -> None:
    config = write_config(tmp_path, **SWITCHES)
    command = [sys.executable, str(ROOT / "train.py"), str(config), "model.qk_norm=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert [row["lr"] for row in metrics(tmp_path).values()] == pytest.approx([0.0015, 0.00225, 0.00075, 0.0], abs=1e-9)
    assert json.loads((folder / "hf/config.json").read_text())["model_type"] == "qwen3"
    trace = json.loads(gzip.decompress((folder / "profile/trace.json.gz").read_bytes()))
    silus = sum(event.get("name") == "aten::silu" for event in trace["traceEvents"])
    assert silus == 2 * 2 * 3 * 2  # steps, objectives, layers; each computed again for its backward pass


def test_a_run_grows_from_a_shallower_one_and_no_longer_needs_it_once_it_has_a_checkpoint(tmp_path: Path) -> None:
    config, shallow, deep = write_config(tmp_path, max_steps=2, save_every_steps=1), tmp_path / "run", tmp_path / "deep"
    grown = ["model.num_hidden_layers=5", f"model.init.grow_from={shallow}", f"run_dir={deep}"]
    assert f"model.init.grow_from = '{shallow}': holds no hf/" in run(config, *grown, expect=2)
    assert not deep.exists()
    run(config)
    run(config, *grown)
    assert len(json.loads((deep / "run.json").read_text())["grown_from_sha256"]) == 64
    settings = load_settings(config, grown)
    tokenizer = prepare_tokenizer(settings)
    decoder = build_model(model_config(settings, tokenizer.vocab_size), init_options(settings), settings.seed)
    _, auxiliary = grow_from_run(decoder, settings, tokenizer, "never")
    last = load_file(shallow / "checkpoints/step-000002/trainer.safetensors")
    assert torch.equal(auxiliary["relay_head"], last["relay_head"])
    assert "recall.values is 8 there, 7 here" in run(config, *grown, "recall.values=7", "--resume=never", expect=2)
    shutil.rmtree(shallow)
    (deep / "checkpoints/step-000002").rename(whole := tmp_path / "whole")
    assert "resumed" in run(config, *grown)
    first, again = (load_file(f / "hf/model.safetensors") for f in (whole, deep))
    assert all(torch.equal(first[name], again[name]) for name in first)
