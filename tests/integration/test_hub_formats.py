"""What a run exports is a Hugging Face checkpoint to a process that has never seen this repository."""

import subprocess
import sys
from pathlib import Path

from tests.integration.tiny_run import run, write_config

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the sea was calm", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
print(type(model).__name__, model.config.sliding_window, bool(logits.isfinite().all()), len(ids[0]) > 1)
"""


def test_export_loads_in_a_process_without_this_repository(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_steps=2))
    for folder in ("hf", "checkpoints/step-000002/hf"):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "run" / folder)],
            capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True,
        ).stdout  # fmt: skip
        assert out.split() == ["MistralForCausalLM", "8", "True", "True"]
