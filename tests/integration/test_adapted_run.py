"""Runs with adapters, from the first step to what other programs load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import MistralForCausalLM

from eval.models import load_model
from model.decoder import WindreachForCausalLM
from model.errors import UserError, cli
from model.hub import SavedWeights, save_hf
from scripts import export
from tests.integration.test_sharding import figures, train
from tests.integration.tiny_run import losses, metrics, run, settings, write_config, write_text
from training.adaptation import FROZEN
from training.processes.parallel import load_weights

LORA = {"rank": 3, "alpha": 12, "dora": True}
OPTIONS = {"max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 9, "optimizer": {"lr": 0.02}, "lora": LORA}
of_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    run(write_config(folder, **OPTIONS))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/hf/model.safetensors")


def base(folder: Path) -> WindreachForCausalLM:
    """The model that the run began with, from the frozen weights of a checkpoint: all but the adapters."""
    model = WindreachForCausalLM.from_pretrained(folder / "run/hf")
    load_weights(model, SavedWeights(folder / "run/checkpoints/step-000004" / FROZEN))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(5, 55)[None]).logits
    return found


def test_a_checkpoint_holds_moments_of_adapters_alone_and_one_copy_of_what_is_frozen(adapted: Path) -> None:
    first, last = (adapted / "run/checkpoints" / f"step-00000{step}" for step in (2, 4))
    assert (first / FROZEN / "model.safetensors").samefile(last / FROZEN / "model.safetensors")
    moments = [name for name in load_file(last / "trainer.safetensors") if "/exp_avg/" in name]
    assert len(moments) == 2 * (3 * 7 * 3 + 1)  # objectives; layers, projections, A, B and lengths; the relay head
    assert all(".lora_" in name or name.endswith("relay_head.weight") for name in moments)
    assert not torch.equal(load_file(first / "hf/model.safetensors")["model.layers.0.mlp.up_proj.weight"],
                           weights(adapted)["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": LORA | {"dora": False, "dropout": 0.3}, "activation_checkpointing": True, "train_only": ["*norm*"]}],
    ids=["dora", "dropout, recomputed, and norms"],
)
def test_an_adapted_run_is_resumed_bit_equal(options: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, **OPTIONS | options)
    run(config)
    whole = losses(tmp_path), weights(tmp_path)
    output = run(config, "--resume", str(tmp_path / "run/checkpoints/step-000002"))
    assert "at step 2" in output
    assert losses(tmp_path) == whole[0]
    assert all(torch.equal(w, whole[1][name]) for name, w in weights(tmp_path).items())


def test_two_processes_and_two_with_shards_equal_one(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copies, shards = (tmp_path_factory.mktemp(name) for name in ("copies", "shards"))
    run(write_config(copies, **OPTIONS), processes=2)
    train(write_config(shards, **OPTIONS), sharded=True)
    for folder in (copies, shards):
        assert figures(metrics(folder)) == pytest.approx(figures(metrics(adapted)), rel=1e-3)
        for name, weight in weights(folder).items():
            torch.testing.assert_close(weight, weights(adapted)[name], atol=2e-2, rtol=0)  # an adapter moves by 0.02
    output = train(shards / "tiny.yaml", "--resume", str(shards / "run/checkpoints/step-000002"), sharded=False)
    assert "at step 2" in output
    assert figures(metrics(shards)) == pytest.approx(figures(metrics(adapted)), rel=1e-3)


@of_peft
@pytest.mark.parametrize("source", ["run", "run/checkpoints/step-000004", "run/checkpoints/step-000004/hf"])
def test_the_exports_of_a_run_are_the_model_and_its_adapters(
    adapted: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["--out", str(tmp_path / "whole")], ["--adapter", "--out", str(tmp_path / "adapter")]):
        monkeypatch.setattr("sys.argv", ["export.py", str(adapted / source), *arguments])
        assert cli(export.main) == 0
    expected = logits(load_model(str(adapted / source)).model)
    torch.testing.assert_close(logits(MistralForCausalLM.from_pretrained(tmp_path / "whole")), expected)
    save_hf(base(adapted), tmp_path / "base")
    theirs = MistralForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits(theirs), expected, atol=1e-2)
    wrapped = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert wrapped.peft_config["default"].target_modules >= {"q_proj", "down_proj"}
    torch.testing.assert_close(logits(wrapped), expected, atol=1e-4, rtol=1e-4)


def tuned(model: Path, folder: Path) -> Path:
    """The settings of a run that puts adapters on the checkpoint `model`."""
    write_text(folder)
    described = settings(folder, **OPTIONS | {"max_steps": 2})
    described["model"] = {"init": {"from_pretrained": str(model)}}
    del described["data"]["tokenizer"]
    (folder / "tuned.yaml").write_text(json.dumps(described))
    return folder / "tuned.yaml"


@of_peft
def test_adapters_on_a_pretrained_model_are_those_of_shards_and_of_transformers(
    adapted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, (alone, shards) = adapted / "run/hf", (tmp_path_factory.mktemp(name) for name in ("alone", "shards"))
    run(tuned(model, alone))
    train(tuned(model, shards), sharded=True)
    assert figures(metrics(shards)) == pytest.approx(figures(metrics(alone)), rel=1e-3)
    examined = load_model(str(alone / "run"))
    assert export.export_adapter(examined, alone / "adapter") == str(model)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(examined.model.config, "layers", [{"kind": "full"}] * 3)
        assert "gave that model other windows" in export.export_adapter(examined, alone / "again")
    theirs = AutoPeftModelForCausalLM.from_pretrained(alone / "adapter")
    expected = logits(examined.model)
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(load_model(str(model)).model), expected, atol=1e-2)


def test_an_adapter_is_refused_where_there_is_none_or_more_than_one_holds(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined = load_model(str(adapted / "run"))
    described = (adapted / "run/settings.yaml").read_text()
    examined.run_dir = tmp_path
    (tmp_path / "settings.yaml").write_text(described.replace("train_only: []", "train_only: ['*norm*']"))
    with pytest.raises(UserError, match="train_only trained parameters that no adapter holds"):
        export.export_adapter(examined, tmp_path / "out")
    examined.run_dir = None
    with pytest.raises(UserError, match=r"was trained without training\.lora; leave --adapter out"):
        export.export_adapter(examined, tmp_path / "out")


def test_muon_and_adapters_are_refused_and_a_pattern_without_parameters_too(tmp_path: Path) -> None:
    config = write_config(tmp_path, **OPTIONS)
    assert "training.optimizer.kind" in run(config, "training.optimizer.kind=muon", expect=2)
    for more in ([], ["--dry-run"]):
        output = run(config, "training.train_only=['*.attn.*']", *more, expect=2)
        assert "'*.attn.*' matches no parameter" in output


def test_the_dry_run_counts_what_is_trained(adapted: Path) -> None:
    checkpoint = adapted / "run/checkpoints/step-000004"
    moments, frozen = (
        load_file(checkpoint / "trainer.safetensors"),
        load_file(checkpoint / FROZEN / "model.safetensors"),
    )
    trained = sum(m.numel() for name, m in moments.items() if "text/exp_avg/decoder." in name)
    every = trained + sum(weight.numel() for weight in frozen.values())
    output = run(adapted / "tiny.yaml", "--dry-run")
    assert f"  trained     {trained:,} of {every:,} parameters, adapters included ({trained / every:.2%})\n" in output
