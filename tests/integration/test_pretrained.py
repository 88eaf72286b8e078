"""A run that starts from a pretrained model, gets windows, and goes on without that model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.integration.test_sharding import train
from tests.integration.tiny_run import run, settings, write_text

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GENERATION = {"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 5]}
SINKS = [{"kind": "sliding", "sink": True}, {"kind": "full"}, {"kind": "sliding"}]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run with full layers, in bfloat16, with files that chat models have."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_text(folder)
    described = settings(folder, max_steps=2, save_every_steps=9)
    described["recall"]["curriculum"]["max_distance"] = 20
    described["model"] |= {"layers": [{"kind": "full"}], "tie_word_embeddings": True}
    (folder / "full.yaml").write_text(json.dumps(described))
    run(folder / "full.yaml")
    model = shutil.move(folder / "run/hf", folder / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, model / "model.safetensors")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "tokenizer.model").unlink()  # chat models are read from tokenizer.json
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def write_config(pretrained: Path, folder: Path, **training: Any) -> Path:
    described = settings(folder, **{"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 9} | training)
    described["model"] = {
        "init": {"from_pretrained": str(folder / "model")}, "sliding_window": 8, "layers": SINKS,
    }  # fmt: skip
    described["recall"]["curriculum"]["max_distance"] = 20
    del described["data"]["tokenizer"]
    shutil.copytree(pretrained / "model", folder / "model")
    for text in ("train.txt", "heldout.txt"):
        shutil.copy(pretrained / text, folder / text)
    (folder / "tuned.yaml").write_text(json.dumps(described))
    return folder / "tuned.yaml"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "two processes that share the weights"])
def test_training_starts_from_the_weights_and_new_sinks_from_0(pretrained: Path, tmp_path: Path, sharded: bool) -> None:
    config = write_config(pretrained, tmp_path, max_steps=2, optimizer={"lr": 1e-9})
    train(config, sharded=True) if sharded else run(config)
    theirs, ours = weights(tmp_path / "model"), weights(tmp_path / "run/hf")
    assert ours.keys() - theirs.keys() == {"model.layers.0.self_attn.sink_logits"}
    for name, weight in ours.items():
        expected = theirs[name].float() if name in theirs else torch.zeros_like(weight)
        torch.testing.assert_close(weight, expected, atol=1e-7, rtol=0)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert len(facts["pretrained_sha256"]) == 64


def test_a_run_goes_on_without_its_pretrained_model(pretrained: Path, tmp_path: Path) -> None:
    config = write_config(pretrained, tmp_path)
    run(config)
    whole = weights(tmp_path / "run/hf")
    shutil.rmtree(tmp_path / "model")
    run(config, "--resume", str(tmp_path / "run/checkpoints/step-000002"))
    resumed = weights(tmp_path / "run/hf")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    check_what_chat_models_have(tmp_path / "run/hf")
    saved = yaml.safe_load((tmp_path / "run/settings.yaml").read_text())
    assert saved["model"]["hidden_size"] == 32
    assert saved["data"]["tokenizer"]["model_file"] == str(tmp_path / "model")


def check_what_chat_models_have(export: Path) -> None:
    """The chat template and the generation config are those of the pretrained model."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == TEMPLATE
    written = json.loads((export / "generation_config.json").read_text())
    assert GENERATION.items() <= written.items()


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(pretrained: Path, tmp_path: Path) -> None:
    config = write_config(pretrained, tmp_path)
    file = tmp_path / "model/model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "layers.1" not in name}, file)
    said = run(config, expect=2)
    assert f"model.init.from_pretrained = '{tmp_path}/model'" in said
    assert "weights and config.json don't belong together: model.layers.1." in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
