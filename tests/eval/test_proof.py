"""The relay that is set by hand: it reaches what the masks allow, on every path, and a wrong mask is noticed."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.proof import __main__ as command
from eval.proof.measure import VALUE, arrivals, export, holds, logits_of, plantings, prove
from eval.proof.weights import FILLER, relay_model
from model import windows
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import cli
from model.windows import LayerSpec
from tests.model.test_windows import layers

SLIDING = LayerSpec("sliding", 5)
STACKS = {
    "sliding": [SLIDING] * 6,
    "W = 1": [LayerSpec("sliding", 1), LayerSpec("sliding", 9)],
    "growing": [LayerSpec("sliding", w) for w in (2, 4, 8, 33)],
    "dilated": [LayerSpec("dilated", 3, dilation=4), SLIDING, LayerSpec("dilated", 5, dilation=3)],
    "dilated alone": [LayerSpec("dilated", 4, dilation=3)] * 4,
    "chunked": [LayerSpec("chunked", 6)] * 4,
    "chunked and sliding": [LayerSpec("chunked", 6), SLIDING, LayerSpec("chunked", 4), LayerSpec("sliding", 3)],
    "global": [replace(SLIDING, global_tokens=2)] * 4,
    "some global": [SLIDING, replace(SLIDING, global_tokens=3), LayerSpec("chunked", 4, global_tokens=1)],
    "full": [LayerSpec("full")] * 2,
    "hybrid": [SLIDING, LayerSpec("full", rope=False), SLIDING],
    "hybrid with RoPE": [SLIDING, LayerSpec("full"), SLIDING],
    "sinks": [replace(SLIDING, sink=True)] * 5,
    "no RoPE": [replace(SLIDING, rope=False), SLIDING] * 3,
    "one radian a token": [LayerSpec("sliding", 50, rope_theta=1.0), LayerSpec("full", rope_theta=1.0)],
}
PATHS = command.PATHS


def relay(specs: list[LayerSpec], **fields: Any) -> WindreachForCausalLM:
    return relay_model(
        WindreachConfig(num_hidden_layers=len(specs), layers=[vars(spec) for spec in specs], **fields)
    )  # fmt: skip


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_a_value_reaches_what_the_masks_allow_on_every_path(stack: str, qk_norm: bool) -> None:
    specs = STACKS[stack]
    results = prove(relay(specs, qk_norm=qk_norm), specs, PATHS)
    assert len(results) == len(PATHS) * len(plantings(specs))
    assert holds(results, specs), results
    assert all(result["recalled"] == result["reachable"] for result in results)
    assert all(result["identical"] == result["unreachable"] for result in results)


@settings(max_examples=25)
@given(st.lists(layers(bounded=True), min_size=1, max_size=5))
def test_the_reach_that_is_shown_is_the_reach_that_is_computed(specs: list[LayerSpec]) -> None:
    (result,) = prove(relay(specs), specs, ["forward"])
    assert result["farthest"] == windows.reach(specs)
    assert holds([result], specs)


@settings(max_examples=25)
@given(st.lists(layers(), min_size=1, max_size=5), st.integers(1, 40))
def test_the_last_token_recalls_from_the_distances_that_can_reach_it_and_from_no_other(
    specs: list[LayerSpec], length: int
) -> None:
    ids = torch.full((length, length), FILLER)
    ids.fill_diagonal_(VALUE)  # row i has the value at position i
    with torch.inference_mode():
        recalled = relay(specs)(ids).logits[:, -1].argmax(-1) == VALUE
    assert recalled.flip(0).tolist() == windows.reachable(specs, length).tolist()
    paths = torch.stack([arrivals(specs, at, length, rows=7)[-1] for at in range(length)])
    assert paths.tolist() == recalled.tolist()


@pytest.mark.parametrize("off", [1, -1])
@pytest.mark.parametrize("path", ["forward", "reference"])
@pytest.mark.parametrize("stack", ["sliding", "growing", "dilated", "chunked"])
def test_attention_whose_window_is_one_token_off_is_noticed(stack: str, path: str, off: int) -> None:
    specs = STACKS[stack]
    model = relay(specs)
    first = model.model.kinds[0]
    assert first.window is not None
    model.model.kinds = (replace(first, window=first.window + off), *model.model.kinds[1:])
    (result,) = prove(model, specs, [path])
    assert not holds([result], specs)
    if stack != "chunked":  # whose blocks all move
        assert bool(result["leaks"]) == (off == 1)
        assert bool(result["missing"]) == (off == -1)


def test_a_cache_that_forgets_a_token_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = STACKS["sliding"]
    monkeypatch.setattr(LayerSpec, "ring_slots", property(lambda spec: spec.window - 2))
    results = prove(relay(specs), specs, ["forward", "token"], tokens=40)
    forward, token = (holds([result], specs) for result in results)
    assert forward
    assert not token


def test_cache_and_export_give_the_logits_of_the_forward_pass() -> None:
    model = relay(STACKS["sliding"])
    exported = export(model)
    assert type(exported).__name__ == "MistralForCausalLM"
    assert type(export(relay([SLIDING, LayerSpec("full")]))).__name__ == "MinistralForCausalLM"
    assert type(export(relay(STACKS["hybrid"]))).__name__ == "SmolLM3ForCausalLM"
    assert type(export(relay(STACKS["sliding"], qk_norm=True))).__name__ == "Qwen3ForCausalLM"
    assert type(export(relay([LayerSpec("sliding", 4, sink=True)]))).__name__ == "WindreachForCausalLM"
    ids = torch.full((1, 40), FILLER).index_fill(1, torch.tensor(3), VALUE)
    expected = logits_of(model, ids)
    assert expected.abs().max() > 1
    for other, size in (model, 1), (model, 4), (model, 13), (exported, None), (exported, 1), (exported, 13):
        torch.testing.assert_close(logits_of(other, ids, size), expected)


def test_flex_carries_as_far() -> None:
    specs = STACKS["sliding"]
    results = prove(relay(specs, attention_backend="flex"), specs, ["forward"])
    assert holds(results, specs)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["proof", *map(str, arguments)])
    return cli(command.main)


def test_the_command_says_what_was_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--layers", 4, "--window", 8, "--out", tmp_path / "new") == 0
    result = json.loads((tmp_path / "new" / "proof.json").read_text())
    assert result["holds"]
    assert [row["farthest"] for row in result["results"]] == [result["reach"]] * len(PATHS) == [28] * len(PATHS)
    shown = " ".join(capsys.readouterr().out.split())
    assert "each of the 28 distances that have a path, up to R = 28 tokens. At 29 and beyond" in shown
    assert call(monkeypatch, "configs/twins/hybrid-8.yaml", "--paths", "forward", "--out", tmp_path) == 0
    assert "with a full layer the reach is unbounded" in " ".join(capsys.readouterr().out.split())


def test_the_command_fails_where_the_proof_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.proof.weights.CARRIED", range(1, 3))  # the mark and one bit of four
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "--layers", 2, "--window", 4, "--paths", "forward", "--out", tmp_path)
    assert stopped.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_refuses_what_it_can_not_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (), ("--layers", 3), ("configs/tiny.yaml", "--layers", 3, "--window", 4):
        assert call(monkeypatch, *arguments) == 2
        assert "give either CONFIG.yaml or both --layers and --window" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert call(monkeypatch, "--layers", 3, "--window", 4, "--out", tmp_path / "file") == 2
    assert "can't be created (File exists); choose another folder" in capsys.readouterr().err
    assert call(monkeypatch, "--layers", 3, "--window", 4, "--backend", "cudnn", "--out", tmp_path) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
