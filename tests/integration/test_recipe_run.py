"""A run with every switch of the recipe turned on in its YAML."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.tiny_run import ROOT, metrics, write_config

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
    run = tmp_path / "run"
    assert [row["lr"] for row in metrics(tmp_path).values()] == pytest.approx([0.0015, 0.00225, 0.00075, 0.0], abs=1e-9)
    assert json.loads((run / "hf/config.json").read_text())["model_type"] == "qwen3"
    trace = json.loads(gzip.decompress((run / "profile/trace.json.gz").read_bytes()))
    silus = sum(event.get("name") == "aten::silu" for event in trace["traceEvents"])
    assert silus == 2 * 2 * 3 * 2  # steps, objectives, layers; each computed again for its backward pass
