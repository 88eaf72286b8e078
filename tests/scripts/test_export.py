from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM

from data.tokenizer import train_tokenizer
from eval.models import Examined
from model.config import WindreachConfig
from model.decoder import build_model
from model.errors import UserError
from scripts import export

TEXT = " ".join(f"ship {i} came slowly over the grey water of the bay while birds cried" for i in range(400))


def trained(config: WindreachConfig) -> Examined:
    tokenizer = train_tokenizer([TEXT], config.vocab_size)
    model = build_model(config, seed=1).eval()
    return Examined(name="tiny", model=model, tokenizer=tokenizer, specs=config.specs, folder=None, run_dir=None)


def test_the_export_is_a_mistral_with_the_same_logits(tiny_config: WindreachConfig, tmp_path: Path) -> None:
    tiny_config.vocab_size = 330
    examined = trained(tiny_config)
    assert export.export(examined, tmp_path / "out", "float32") == "mistral"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, MistralForCausalLM)
    ids = torch.tensor([examined.tokenizer.encode(TEXT[:200])])
    assert ids.shape[1] > 3 * tiny_config.sliding_window
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, examined.model(ids).logits, atol=1e-4, rtol=0)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_nothing_is_overwritten(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="is not empty; name a new folder, nothing is overwritten"):
        export.export(examined, tmp_path, "float32")


def test_gguf_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["export.py", "runs/x", "--format", "gguf", "--out", "out"])
    with pytest.raises(UserError, match="would see farther than the one that was trained; use --format hf"):
        export.main()
