"""The doctor on this machine, on one whose attention is wrong, and on one where a check raises."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.attention import plan
from model.attention.reference import Dense
from model.errors import UserError
from model.packing import Packing
from model.windows import LayerSpec
from scripts import doctor
from scripts.benchmarks.timing import Row
from scripts.checks import Section, forms, machine, speed
from training.processes import allocator, precision
from training.processes.precision import Machine

CPU = torch.device("cpu")
TITLES = ["Versions", "Devices", "Matrix products", "Compiler", "Attention backends"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with known rates, nothing compiled, and the process left as it is."""
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(precision, "set_up_threads", lambda wanted, local_processes: 1)
    known = Machine(1e11, 1e11)
    for module in (machine, forms, speed):
        monkeypatch.setattr(module, "measure", lambda device: known)
    monkeypatch.setattr(machine, "compiler", lambda device: Section("Compiler"))
    monkeypatch.setattr(speed, "bench_train", lambda setup, only: [measured(0.1, 0.2)])
    monkeypatch.setattr(speed, "bench_decode", lambda *arguments, only: [measured(0.1, 0.2)])


def measured(ours: float, theirs: float | None, note: str = "") -> Row:
    ratio = theirs / ours if theirs else None
    return Row("train", "tiny", "transformers sdpa", ours, theirs, ratio, 2.0, None, None, "fp32", 1, note)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--device", "cpu", *arguments])
    return doctor.main()


def test_this_machine_is_examined_and_the_tables_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json", str(tmp_path / "doctor.json")) == 0
    sections = json.loads((tmp_path / "doctor.json").read_text())
    assert [s["title"] for s in sections][:5] == TITLES
    attention = sections[6]
    assert attention["title"] == "Relative error of attention, forward and backward; the limit is 0.0001"
    assert [row["layer"] for row in attention["rows"]] == list(forms.CASES)
    assert all(len(row["blocked"].split()) == 2 and len(row["flex"].split()) == 1 for row in attention["rows"])
    assert not attention["problems"]
    assert sections[7]["rows"] == [{"precision": "fp32", "ours": 10_240.0, "transformers sdpa": 5120.0, "ratio": 2.0}]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "bf16 is not clearly faster than fp32 on this machine" in printed


def test_attention_that_is_wrong_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_token_too_many(spec: LayerSpec, packing: Packing) -> Dense:
        return Dense.of(replace(spec, window=(spec.window or 0) + 1), packing, packing)

    monkeypatch.setattr(plan.Blocks, "of", one_token_too_many)
    plan._prepare_whole_rows.cache_clear()
    monkeypatch.setattr(forms, "CASES", {"W 128": forms.CASES["W 128"]})
    assert run(monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "blocked is wrong for W 128: relative error " in printed
    assert "Remedy: set model.attention_backend to another one; report this with the" in printed
    plan._prepare_whole_rows.cache_clear()


def test_attention_that_raises_or_gives_nan_is_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(forms, "CASES", {"W 128": forms.CASES["W 128"]})
    monkeypatch.setattr(forms, "relative_errors", broken)
    section = forms.forms(CPU)
    assert section.wrong
    assert section.rows == [{"layer": "W 128", "blocked": "fails", "flex": "fails"}]
    assert section.problems[0]["what"] == "blocked is wrong for W 128: RuntimeError: no kernel image"
    assert forms._error([torch.tensor([torch.nan])], [torch.ones(1)]) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_is_off_by_one_is_far_above_the_limit(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 700, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    packing = Packing.of_whole_rows(700, CPU)
    right, wrong = (Dense.of(LayerSpec("sliding", w), packing, packing)(q, k, v) for w in (128, 129))
    assert forms._error([wrong], [right.float()]) > 3 * forms.LIMITS[dtype]


def test_a_check_that_raises_becomes_a_problem_and_the_others_still_run() -> None:
    def raises(device: torch.device) -> Section:
        raise ValueError("no such device\nat all")

    first, second = doctor.run({"Compiler": raises, "Devices": machine.devices}, CPU)
    (problem,) = first.problems
    assert problem["what"] == "Compiler could not be checked: ValueError: no such device"
    assert problem["remedy"].startswith("install a C++ compiler")
    assert (first.wrong, second.title) == (False, "Devices")


def test_what_is_missing_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: {"torch": "2.11.0+cu130", "accelerate": "1.15.0"}.get(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    problems = machine.versions(torch.device("cuda")).problems
    assert [p["what"].split(",")[0] for p in problems] == [
        "torch is 2.11.0+cu130", "transformers is missing", "triton is missing", "nvidia-cudnn-frontend is missing"
    ]  # fmt: skip
    assert [p["remedy"] for p in problems[2:]] == ["pip install triton", "pip install -r requirements-gpu.txt"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (driver,) = machine.devices(CPU).problems
    assert driver["what"].startswith("there is an NVIDIA driver, but torch, the build for ")


def test_little_memory_and_slow_products_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    section = Section("Devices")
    machine._add_device(section, "GPU 0", "", 2**30, 80 * 2**30)
    assert section.rows[0]["free memory"] == "1.0 GiB of 80.0 GiB"
    assert section.problems[0]["what"] == "GPU 0 has only 1.0 GiB of free memory"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(machine, "measure", lambda device: Machine(5e13, 3e14))
    (slow,) = machine.matmul(torch.device("cuda")).problems
    assert slow["what"].startswith("bf16 products reach only 30% of the NVIDIA H100 (SXM5) data sheet")


def test_being_slower_than_the_peer_is_a_problem() -> None:
    slow = speed._compared("Training", measured(0.2, 0.1), 100)
    alone = speed._compared("Training", measured(0.2, None, "MemoryError: too much"), 100)
    assert [p["what"] for p in slow.problems + alone.problems] == [
        "Training is slower than transformers sdpa",
        "Training could not be compared with transformers sdpa: MemoryError: too much",
    ]
    assert alone.rows == [{"precision": "fp32", "ours": 500.0, "transformers sdpa": None, "ratio": None}]


def test_a_file_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--json .*: can't be written; name a file in a folder that exists$"):
        doctor.parse(["--json", str(tmp_path)])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_form_that_can_run_on_this_gpu_is_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "training_dtype", lambda device: dtype)
    assert not forms.forms(torch.device("cuda")).problems
