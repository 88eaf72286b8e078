import json
import re
import sys
from pathlib import Path

import pytest

from model.errors import UserError, cli
from scripts import plan, plans_page
from training.processes.precision import Machine
from training.settings.generate import ROOT

SEVEN_B = str(ROOT / "configs/mistral-7b.yaml")
TINY = str(ROOT / "configs/tiny.yaml")


def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    file = tmp_path / "plan.json"
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments, "--json", str(file)])
    assert cli(plan.main) == 0
    return json.loads(file.read_text())


def test_mistral_7b_on_8_h100s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    found = planned(tmp_path, monkeypatch, SEVEN_B, "--gpus", "8", "--mfu", "0.5")
    shown = capsys.readouterr().out
    assert sum(found["parameters"].values()) == 7_241_732_096
    assert (found["reach"], found["window_times_layers"]) == (131_040, 131_072)
    ways = {(m["sharding"], m["checkpointing"]): m["fits"] for m in found["memory"]}
    assert ways == {("ddp", False): False, ("ddp", True): False, ("fsdp2", False): False, ("fsdp2", True): True}
    rate = 8 * 989.4e12 * 0.5 / sum(found["flops_per_token"].values())
    assert found["pace"][0]["tokens_per_second"] == pytest.approx(rate)
    assert f"{rate:,.0f}" in shown
    assert "NVIDIA H100 (SXM5) data sheet" in shown
    assert "processor hours" in shown


def test_overrides_are_taken_and_the_table_names_each_part_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    overrides = ("training.precision=auto", "training.max_steps=7", "model.num_hidden_layers=5", "recall.enabled=false")
    found = planned(tmp_path, monkeypatch, TINY, "--gpu", "rtx-4090", *overrides)
    assert (found["work"][0]["steps"], found["reach"]) == (7, 5 * 7)
    for row in found["memory"]:
        assert row["total"] == sum(row[part] for part in plan.MEMORY_PARTS)
    shown = capsys.readouterr().out
    assert [part for part in plan.MEMORY_PARTS if part.replace("_", " ") not in shown] == []


def test_cpu_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.plan.measure", lambda device: Machine(1e11, 4e11))
    monkeypatch.setattr("scripts.plan.set_up_threads", lambda wanted, local_processes: 1)
    found = planned(tmp_path, monkeypatch, TINY, "--gpu", "cpu", "training.precision=auto", "recall.enabled=false")
    assert found["processor"]["flops"] == 4e11
    assert found["processor"]["source"] == "bf16 matmul measured just now"
    assert found["processor"]["memory"] > 2**30


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (["--gpus", "1024"], r"1,024 processors take 1 row each .* a step has 16,777,216 tokens of text, not"),
        (["--gpu", "rtx-4090"], "nothing fits: take more GPUs, or lower training.micro_batch_tokens or data.seq_len"),
        (["model.attention_backend=blocked"], "on a GPU it keeps its weights for the backward pass; auto takes a"),
    ],
)
def test_what_a_plan_warns_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], note: str) -> None:
    found = planned(tmp_path, monkeypatch, SEVEN_B, *arguments)
    assert any(re.search(note, said) for said in found["notes"]), found["notes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], r"--gpu h10: no such GPU in the table; did you mean h100\? known: a10, .* and cpu for"),
        (["--gpu", "zzz"], r"--gpu zzz: no such GPU in the table; known: a10, "),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--mfu", "1.5"], "--mfu 1.5: give a share above 0 and at most 1, such as 0.4"),
        (["training.precision=fp32"], "training.precision is fp32, but the rates known for h100 are those of bf16"),
        (["training.max_stebs=1"], r"did you mean training.max_steps\?"),
        (["--json", "/nowhere/plan.json"], "--json /nowhere/plan.json: /nowhere is no folder; name one that is there"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", TINY, "training.precision=auto", *arguments])
    with pytest.raises(UserError, match=message):
        plan.main()


def test_shipped_plans_say_what_the_command_says_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates and time; the bytes beside them follow the code, and are made anew by scripts/plans_page.py."""
    page = (ROOT / "docs" / "plans.md").read_text()
    assert page.startswith(plans_page.HEAD)
    assert re.findall(r"\$ python scripts/plan.py (.*)\n", page) == list(plans_page.COMMANDS.values())
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", str(plans_page.WIDTH))
    for command in plans_page.COMMANDS.values():
        planned(tmp_path, monkeypatch, *command.split())
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        for line in lines[:4] + [x for x in lines if re.match(r"  (nothing|layers) +[\d,]+ ", x)]:
            assert line in page, f"docs/plans.md is stale: {line}"
