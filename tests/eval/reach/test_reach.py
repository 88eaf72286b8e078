"""The command `eval.reach`: what it writes, what it says, and how it ends."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval import command
from eval.haystack import open_haystack
from eval.models import Examined, load_model
from eval.reach import __main__ as reach
from eval.reach import cliff
from model import hub
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM, build_model
from model.errors import cli
from model.windows import LayerSpec


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reach", *map(str, arguments)])
    return cli(reach.main)


@pytest.fixture(scope="module")
def examined(untrained_run: Path) -> Examined:
    return load_model(str(untrained_run), "cpu")


def measured(examined: Examined) -> tuple[dict[str, Any], str]:
    """The result, and what the terminal shows of it."""
    result = reach.measure(examined, open_haystack(examined), texts=2)
    console = Console(record=True, width=160, file=io.StringIO())
    reach.print_result(result, console)
    return result, console.export_text()


def of_layers(examined: Examined, folder: Path, layers: list[dict[str, Any]]) -> Examined:
    """A run like `examined` with other layers."""
    fields = {**examined.model.config.to_dict(), "layers": layers, "num_hidden_layers": len(layers)}
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")}
    hub.save_hf(build_model(WindreachConfig(**fields)), folder)
    model = WindreachForCausalLM.from_pretrained(folder)
    return replace(examined, model=model, specs=model.config.specs, folder=folder, settings={})


def test_the_command_writes_figures_and_pictures(
    monkeypatch: pytest.MonkeyPatch, untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, untrained_run, "--out", tmp_path, "--plot", "--texts", 2, "--device", "cpu") == 0
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"reach.json", "reach.png", "mask.png", "layers.png", "cone.png"}
    result = json.loads((tmp_path / "reach.json").read_text())
    assert (result["reach"], result["receptive_field"], result["window_times_layers"]) == (21, 22, 24)
    assert result["cliff_holds"] is True
    assert [LayerSpec(**layer) for layer in result["layer_specs"]] == [LayerSpec("sliding", 8)] * 3
    assert set(result["gradient"]) >= {"before", "after"}
    assert len(result["alpha"]["residual_share_by_layer"]) == 3
    said = capsys.readouterr().out
    assert "W = 8; reach R = 21 tokens back" in said
    assert "token by token" in said


def test_global_tokens_are_told_apart_from_all_others(examined: Examined, tmp_path: Path) -> None:
    layers = [{"window": 6, "global_tokens": 2}, {"window": 4}]
    result, said = measured(of_layers(examined, tmp_path, layers))
    assert result["reach"] is None
    assert result["reach_of_other_tokens"] == 8
    assert "the reach is unbounded for global tokens and 8 tokens back for all others" in said
    assert result["cliff_holds"] is True
    assert any(row["expected"] for row in result["cliff"] if row["path"] == "forward, blocked")


def test_a_full_layer_is_said_to_leave_no_distance_to_test(examined: Examined, tmp_path: Path) -> None:
    result, said = measured(of_layers(examined, tmp_path, [{"window": 6}, {"kind": "full"}]))
    assert result["cliff_note"] == "a full layer sees every earlier token: no distance is beyond the reach"
    assert f"Cliff test: {result['cliff_note']}" in said
    assert "the reach is unbounded" in said
    assert result["cliff_holds"] is True
    assert {row["changed"] for row in result["cliff"]} == {"the whole document before"}


def test_a_stack_of_unbounded_reach_gets_texts_as_long_as_its_sliding_twin(examined: Examined) -> None:
    unbounded = replace(examined, specs=(LayerSpec("full"), *examined.specs[1:]))
    assert reach.field_length(examined, 8192) == reach.field_length(unbounded, 8192) == 21 + 2 * 8
    assert reach.field_length(unbounded, 20) == 20


def test_why_a_path_can_not_be_had_is_shown(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cliff, "BACKENDS", ["reference", "nothing"])
    monkeypatch.setattr(cliff, "DENSE_LIMIT", 30)
    result, said = measured(examined)
    reasons = {row["path"]: row["unavailable"] for row in result["cliff"] if "unavailable" in row}
    assert reasons["forward, reference"] == "the dense mask of 36 tokens would not fit"
    assert reasons["forward, nothing"].startswith("model.attention_backend is 'nothing'; choose one of")
    assert "not available: the dense mask of 36 tokens would not fit" in said
    assert "not available: model.attention_backend is 'nothing'" in said


def test_a_model_that_sees_beyond_its_reach_ends_with_a_fault(
    monkeypatch: pytest.MonkeyPatch, untrained_run: Path, tmp_path: Path
) -> None:
    def lies(name: str, device: str | None) -> Examined:
        return replace(load_model(name, device), specs=(LayerSpec("sliding", 7),) * 3)

    monkeypatch.setattr(command, "load_model", lies)
    with pytest.raises(SystemExit, match="a token beyond the reach changed the output"):
        call(monkeypatch, untrained_run, "--out", tmp_path, "--texts", 2, "--device", "cpu")
    assert json.loads((tmp_path / "reach.json").read_text())["cliff_holds"] is False


def test_a_model_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path / "none") == 2
    assert "no such folder" in capsys.readouterr().err
