"""The command, the fixture, wrapped models, and models of transformers and of our own."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from eval.conformance import __main__ as command
from eval.conformance.architectures import ARCHITECTURES
from eval.conformance.build import build, load
from eval.conformance.check import check
from eval.conformance.modes import MODES
from model.cache import RingCache
from model.errors import UserError
from model.windows import LayerSpec
from tests.eval.conformance.faults import PLANTED, SLIDING
from tests.eval.conformance.plain import PlainDecoder
from tests.model.tiny import tiny_model

ROOT = Path(__file__).parents[3]
pytest_plugins = ["eval.conformance.pytest_plugin"]
of_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def faults(report: dict[str, Any]) -> list[str]:
    return [f"{row['mode']}: {fault['name']}" for row in report["rows"] for fault in row["faults"]]


def test_a_right_architecture_is_as_asked_under_several_attention_implementations() -> None:
    report = check(build("gemma2"), ["eager", "flex_attention"], ["eval", "packed", "left-padded", "chunked"])
    assert not faults(report)
    assert [bool(row["ways"]) for row in report["rows"]] == [True] * 8


@pytest.mark.parametrize(
    ("name", "attention", "modes", "found"),
    [
        ("gpt_oss", "eager", ["train", "packed"], ["packed: documents leak"]),
        ("moshi", "sdpa", ["eval"], ["eval: window ignored"]),
        ("doge", "flex_attention", ["eval"], ["eval: not causal", "eval: window ignored"]),
        ("recurrent_gemma", "eager", ["packed"], ["packed: documents leak"]),
        ("gemma4_text", "eager", ["eval"], []),
        ("phimoe", "eager", ["train"], []),
    ],
)
def test_verdicts_of_docs(name: str, attention: str, modes: list[str], found: list[str]) -> None:
    """Of transformers 5.23. When this fails, correct docs/instruments.md."""
    assert faults(check(build(name, ARCHITECTURES[name]), [attention], modes)) == found


def test_a_model_that_returns_no_cache_is_refused_with_one() -> None:
    report = check(build("recurrent_gemma", ARCHITECTURES["recurrent_gemma"]), ["eager"], ["cached"])
    assert report["rows"][0]["refused"] == "the model returns no cache"


@pytest.mark.parametrize(
    "specs",
    [
        [{"window": 5}, {"kind": "full"}],
        [{"window": 5, "sink": True}, {"kind": "chunked", "window": 4}],
        [{"kind": "dilated", "window": 3, "dilation": 2}, {"window": 4, "global_tokens": 2}],
    ],
)
def test_our_decoder_is_as_asked(specs: list[dict[str, Any]]) -> None:
    report = check(tiny_model(specs))
    assert not faults(report)
    assert all("ways" in row for row in report["rows"])


@of_peft
def test_wrapped_models_are_checked_inside(assert_windows: Any) -> None:
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    report = assert_windows(get_peft_model(build("mistral"), adapters), modes=["train", "packed", "cached", "generate"])
    assert report["model"] == "MistralForCausalLM"
    prepared = Accelerator(cpu=True).prepare(torch.nn.DataParallel(PlainDecoder([SLIDING, SLIDING])))
    assert assert_windows(prepared, modes=["eval", "generate"])["model"] == "PlainDecoder"


def test_the_fixture_fails_with_the_likely_cause(assert_windows: Any) -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"eval: up to 12 keys are seen where the window is 8 \(layers 0, 1"
    ):
        assert_windows(PlainDecoder([LayerSpec("sliding", 12)] * 2), windows=[8, 8], modes=["eval"])


@of_peft
def test_a_check_leaves_the_model_as_it_was() -> None:
    model = get_peft_model(build("mistral"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)).train()
    dropout = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    check(model, ["sdpa", "eager"], ["eval"])
    assert dropout.p == 0.1
    assert dropout.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_model_refuses_is_no_fault_and_what_crashes_is_one() -> None:
    def refuses(self: PlainDecoder, *_: Any) -> Any:
        raise UserError("no cache")

    def crashes(self: PlainDecoder, *_: Any) -> Any:
        raise IndexError("out of range")

    rows = check(PlainDecoder([SLIDING], extend=refuses))["rows"]
    assert {row["mode"] for row in rows if "refused" in row} == {"cached", "chunked", "generate"}
    assert faults({"rows": rows}) == []
    assert "cached: does not run" in faults(check(PlainDecoder([SLIDING], extend=crashes)))


def test_a_model_whose_layers_are_not_to_be_had_is_refused() -> None:
    model = PlainDecoder([SLIDING])
    model.config = SimpleNamespace(num_hidden_layers=7, vocab_size=61, specs=model.config.specs)
    with pytest.raises(UserError, match=r"no nn.ModuleList of its 7 layers"):
        check(model)
    with pytest.raises(UserError, match=r"3 windows are given, but the model has 1 layers"):
        check(PlainDecoder([SLIDING]), windows=[SLIDING] * 3)


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "eval.conformance", *arguments, "--out", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_checks_weights_and_configs_and_its_exit_code_tells(tmp_path: Path) -> None:
    build("gpt_oss").save_pretrained(tmp_path / "oss")
    wrong = run(str(tmp_path / "oss"), "--window", "4", "--attention", "eager", "--modes", "packed", folder=tmp_path)
    assert wrong.returncode == 1, wrong.stderr
    assert "documents see each other: the mask of packed documents is dropped" in wrong.stdout
    assert json.loads((tmp_path / "conformance.json").read_text())["asked"] == ["4", "full"]
    right = run("--config", str(tmp_path / "oss"), "--attention", "eager", "--modes", "eval", folder=tmp_path)
    assert right.returncode == 0, right.stderr
    assert json.loads((tmp_path / "conformance.json").read_text())["asked"] == ["8", "full"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either MODEL or --config FOLDER"),
        (["--config", "no/such/folder"], "--config 'no/such/folder'"),
        (["--config", "mistral", "--modes", "trian"], "unknown 'trian'"),
        (["runs/no-such-run"], "no such folder"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run(*arguments, folder=tmp_path)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert words in result.stderr


def test_another_window_is_for_models_of_transformers(tmp_path: Path) -> None:
    from model import hub

    hub.save_hf(tiny_model([{"window": 5}, {"kind": "dilated", "window": 3, "dilation": 2}]), tmp_path)
    assert isinstance(load(str(tmp_path))(torch.ones(1, 2).long(), use_cache=True).past_key_values, RingCache)
    with pytest.raises(UserError, match=r"--window changes models of transformers only"):
        load(str(tmp_path), window=4)


def test_the_command_knows_the_modes() -> None:
    assert command.MODES == MODES
    assert len(PLANTED) >= 30
    assert len(ARCHITECTURES) > 40
