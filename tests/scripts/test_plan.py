import json
import re
import sys
from pathlib import Path

import pytest

from model.errors import cli
from scripts import plan
from training.settings.generate import ROOT

SEVEN_B = str(ROOT / "configs/mistral-7b.yaml")
TINY = str(ROOT / "configs/tiny.yaml")
MEMORY_PARTS = ("weights", "gradients", "optimizer", "exchange", "activations", "logits_and_scratch")


def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    file = tmp_path / "plan.json"
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments, "--json", str(file)])
    assert cli(plan.main) == 0
    return json.loads(file.read_text())


def test_mistral_7b_on_8_h100s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = planned(tmp_path, monkeypatch, SEVEN_B, "--gpus", "8", "--mfu", "0.5")
    shown = capsys.readouterr().out
    assert sum(result["parameters"].values()) == 7_241_732_096
    assert (result["reach"], result["window_times_layers"]) == (131_040, 131_072)
    ways = {(m["sharding"], m["checkpointing"]): m["fits"] for m in result["columns"]}
    assert ways == {("ddp", False): False, ("ddp", True): False, ("fsdp2", False): False, ("fsdp2", True): True}
    rate = 8 * 989.4e12 * 0.5 / sum(result["flops_per_token"].values())
    assert result["columns"][0]["tokens_per_second"] == pytest.approx(rate)
    assert f"{rate:,.0f}" in shown
    assert "NVIDIA H100 (SXM5) data sheet" in shown
    assert "GPU hours" in shown


def test_one_gpu_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = planned(tmp_path, monkeypatch, TINY, "training.precision=auto")
    assert [m["sharding"] for m in result["columns"]] == ["ddp", "ddp"]
    plain, recomputed = result["columns"]
    assert plain["gpu_hours"] == pytest.approx(plain["seconds"] / 3600)
    assert sum(w["flops"] for w in result["work"]) == pytest.approx(plain["seconds"] * 0.4 * 989.4e12)
    assert recomputed["tokens_per_second"] < plain["tokens_per_second"]


def test_overrides_are_taken_and_the_table_names_each_part_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    overrides = ("training.precision=auto", "training.max_steps=7", "model.num_hidden_layers=5", "recall.enabled=false")
    result = planned(tmp_path, monkeypatch, TINY, "--gpu", "rtx-4090", *overrides)
    assert (result["work"][0]["steps"], result["reach"]) == (7, 5 * 7)
    for column in result["columns"]:
        assert column["total"] == sum(column[part] for part in MEMORY_PARTS)
    shown = capsys.readouterr().out
    assert [part for part in MEMORY_PARTS if part.replace("_", " ") not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], r"argument --gpu: invalid choice: 'h10' \(choose from '?a10'?"),
        (["--gpus", "0"], "argument --gpus: '0': give a whole number of at least 1"),
        (["--mfu", "1.5"], "--mfu 1.5: give a share above 0 and at most 1, such as 0.4"),
        (["--json", "/nowhere/plan.json"], "--json /nowhere/plan.json: can't be written; name a file"),
        (["training.precision=fp32"], "training.precision is fp32, but the known rates of GPUs are those of bf16"),
        (["training.max_stebs=1"], r"did you mean training.max_steps\?"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", TINY, "training.precision=auto", *arguments])
    with pytest.raises(SystemExit, match="2"):
        sys.exit(cli(plan.main))
    assert re.search(message, capsys.readouterr().err)


def test_the_page_of_plans_shows_what_its_commands_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "plans.md").read_text()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    tables = re.findall(r"```\n(.*?)\n```\n`python scripts/(plan.py [^`]*)`\n", page, re.DOTALL)
    assert len(tables) == page.count(" H100s\n")
    for table, command in tables:
        monkeypatch.setattr(sys, "argv", command.split())
        plan.main()
        shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
        assert shown.strip() == table.strip(), f"docs/plans.md is stale: {command}"
