"""CUDA graphs of whole steps, and when they are made."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.attention import AttentionPlan
from model.errors import UserError
from model.packing import Packing
from model.windows import LayerSpec
from tests.training.test_step import Reads, inputs_of, make_trainer
from training.captured import WARM_CALLS, Captured, check_graphs, worth_capturing


def ranks(device: str, processes: int = 1) -> Any:
    return SimpleNamespace(device=torch.device(device), num_processes=processes)


@pytest.mark.parametrize(
    ("setting", "device", "processes", "seconds", "captured"),
    [
        (True, "cuda", 1, 1e-5, True),
        (True, "cuda", 1, 1e-2, False),
        (True, "cuda", 8, 1e-5, False),
        (True, "cpu", 1, 1e-5, False),
        (False, "cuda", 1, 1e-5, False),
        ("reduce-overhead", "cuda", 1, 1e-2, True),
        ("max-autotune", "cuda", 1, 1e-2, True),
    ],
)
def test_thin_stacks_on_one_gpu_become_graphs(
    setting: bool | str, device: str, processes: int, seconds: float, captured: bool
) -> None:
    assert worth_capturing(setting, ranks(device, processes), seconds, waits=False) == captured


@pytest.mark.parametrize(("device", "processes"), [("cpu", 1), ("cuda", 2)])
def test_a_graph_that_is_asked_for_and_cannot_be_made_is_refused(device: str, processes: int) -> None:
    message = f"training.compile is 'reduce-overhead', .* {processes} process(es)? on {device}; set it to true"
    with pytest.raises(UserError, match=message):
        check_graphs("reduce-overhead", ranks(device, processes), waits=False)


def test_a_step_that_reads_the_device_does_not_become_a_graph() -> None:
    assert not worth_capturing(True, ranks("cuda"), 1e-5, waits=True)
    with pytest.raises(UserError, match=r"1 process on cuda, and attention that reads the device .*; set it to true"):
        check_graphs("reduce-overhead", ranks("cuda"), waits=True)


@pytest.mark.parametrize(
    ("backend", "spec"),
    [
        ("blocked", LayerSpec("sliding", 4)),
        ("blocked", LayerSpec("sliding", 4, global_tokens=1)),
        ("blocked", LayerSpec("dilated", 4, dilation=2)),
        ("blocked", LayerSpec("chunked", 4)),
        ("blocked", LayerSpec("full")),
        ("flash", LayerSpec("sliding", 4)),
        ("reference", LayerSpec("sliding", 4, global_tokens=1)),
    ],
)
def test_a_plan_says_whether_it_reads_where_documents_lie(backend: str, spec: LayerSpec) -> None:
    packing = Packing.of_documents(torch.tensor([[0] * 9 + [1] * 23, [0] * 32]))
    plan = AttentionPlan(spec, backend, "", "cpu")
    with Reads() as reads:
        plan.prepare(packing, batch_size=2)
    assert bool(reads.counted) == plan.waits


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_replayed_steps_have_the_bits_of_steps_that_run_as_they_are(tmp_path: Path, kind: str) -> None:
    training = {"optimizer": {"kind": kind}, "deterministic": True, "precision": "bf16", "compile": "reduce-overhead"}
    results = []
    for name, warm in (("captured", WARM_CALLS), ("plain", 1000)):
        (tmp_path / name).mkdir()
        trainer = make_trainer(tmp_path / name, **training)
        assert isinstance(trainer.update, Captured)
        trainer.update.calls, trainer.update.warm_calls = {}, warm
        figures = [trainer.update(inputs_of(trainer, step)).clone() for step in range(8)]
        assert bool(trainer.update.graphs) == (name == "captured")
        results.append([torch.stack(figures), *(p.detach().clone() for p in trainer.scorer.parameters())])
    for captured, plain in zip(*results, strict=True):
        assert torch.equal(captured, plain)


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, "reduce-overhead"])
def test_a_step_never_waits_for_the_gpu(tmp_path: Path, compiled: bool | str) -> None:
    trainer = make_trainer(tmp_path, compile=compiled, precision="bf16")
    inputs = [inputs_of(trainer, step) for step in range(5)]
    for each in inputs[:4]:
        trainer.update(each)
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = trainer.update(inputs[4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(figures.isfinite().all())
