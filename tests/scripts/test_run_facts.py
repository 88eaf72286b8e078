import json
from pathlib import Path

import pytest
import yaml

from model.errors import UserError
from scripts import run_facts
from training.settings.config_file import load_settings


def write_results(run: Path, h90: int | None) -> None:
    task = {"h90": h90, "u90": None if h90 is None else h90 / 480}
    recall = {"window": 16, "reach": 480, "window_times_layers": 512, "tasks": {"needle": task}}
    (run / "recall.json").write_text(json.dumps(recall))
    (run / "loss.json").write_text(json.dumps({"bits_per_byte": 2.4321}))


def test_headline_gives_the_three_figures_and_the_report(tmp_path: Path) -> None:
    write_results(tmp_path, 256)
    assert run_facts.headline(tmp_path).splitlines() == [
        "recall (needle)        H90 = 256 tokens = 16.0 W, U90 = 0.53 of R",
        "held-out text          2.432 bits per byte",
        "exact reach            R = 480 tokens, headline W·k = 512 tokens",
        f"report                 {tmp_path / 'report.html'}",
    ]


def test_no_horizon_is_said_in_words(tmp_path: Path) -> None:
    write_results(tmp_path, None)
    assert "below 90 % at the shortest distance" in run_facts.headline(tmp_path)


def config_of(tmp_path: Path) -> str:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    settings = {"name": "x", "model": sizes | {"sliding_window": 4}, "training": {"max_steps": 1000}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "config.yaml")


def test_the_run_folder_follows_the_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, folder in ([], "runs/x"), (["name=y"], "runs/y"), ([f"run_dir={tmp_path}/z"], f"{tmp_path}/z"):
        monkeypatch.setattr("sys.argv", ["run_facts.py", config_of(tmp_path), *overrides])
        run_facts.main()
        assert capsys.readouterr().out == f"{folder}\n"


def test_a_run_folder_with_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = config_of(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "settings.yaml").write_text(yaml.safe_dump(load_settings(config).model_dump(mode="json")))
    monkeypatch.setattr("sys.argv", ["run_facts.py", config, f"run_dir={run}"])
    run_facts.main()
    monkeypatch.setattr("sys.argv", ["run_facts.py", config, f"run_dir={run}", "model.sliding_window=8"])
    with pytest.raises(UserError, match=r"model\.sliding_window: 4 there, 8 now"):
        run_facts.main()


def test_a_pretrained_model_stands_on_a_second_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        "name: x\nmodel: {init: {from_pretrained: smollm2}}\ntraining: {max_steps: 1000}\n"
    )
    monkeypatch.setattr("sys.argv", ["run_facts.py", str(tmp_path / "config.yaml")])
    run_facts.main()
    assert capsys.readouterr().out == "runs/x\nsmollm2\n"


def test_the_headline_of_an_adapted_model_is_its_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "receipt.json").write_text("{}")
    monkeypatch.setattr("eval.receipt.findings.finding", lambda receipt: "The windows cost nothing.")
    assert run_facts.headline(tmp_path).splitlines() == [
        "The windows cost nothing.", f"receipt                {tmp_path / 'receipt.html'}",
    ]  # fmt: skip
