"""What a run exports is a Hugging Face checkpoint to a process that has never seen this repository."""

import subprocess
import sys
from pathlib import Path

from tests.integration.tiny_run import run, write_config

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the sea was calm", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    print(type(model).__name__, model.config.sliding_window, bool(logits.isfinite().all()), len(ids[0]) > 1)
"""


def test_export_loads_in_a_process_without_this_repository(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_steps=2))
    folders = [str(tmp_path / "run" / folder) for folder in ("hf", "checkpoints/step-000002/hf")]
    command = [sys.executable, "-c", PROGRAM, *folders]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True).stdout
    assert out.splitlines() == ["MistralForCausalLM 8 True True"] * 2
