"""A step as a function of tensors: nothing in it reads the device, and its outcome counts two steps later."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integration import tiny_run
from training.curriculum import Curriculum
from training.loop import Trainer
from training.objective import Measured
from training.processes.signals import StopRequest
from training.settings.config_file import load_settings
from training.step import DELAY, Inputs, Outcome, Update

READS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "unique", "masked_select")


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def make_trainer(folder: Path, **training: Any) -> Trainer:
    AcceleratorState._reset_state()  # one process of tests trains in several precisions
    return Trainer(load_settings(tiny_run.write_config(folder, **training)), "never", StopRequest())


def inputs_of(trainer: Trainer, step: int) -> Inputs:
    trainer.tokens, trainer.flops = 0, 0.0
    return trainer._inputs(step, 1e-3, {o.name: 1.0 for o in trainer.stage.objectives})


@pytest.mark.parametrize("training", [{}, {"micro_batch_tokens": 128, "optimizer": {"kind": "muon"}}])
def test_a_step_reads_nothing_from_the_device(tmp_path: Path, training: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **training)
    inputs = inputs_of(trainer, 0)
    with Reads() as reads:
        figures = trainer.update(inputs)
    assert reads.counted == {}
    with Reads() as reads:
        assert float(figures.sum()) > 0
    assert reads.counted == {"_local_scalar_dense": 1}


def shapes(inputs: Inputs) -> list[torch.Size]:
    return [x.shape for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]


def test_padded_targets_change_nothing_but_the_shape(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    inputs = inputs_of(trainer, 0)
    padded = inputs.padded()
    assert shapes(padded) != shapes(inputs)
    figures = []
    for each in (inputs, padded):
        weights = [p.detach().clone() for p in trainer.scorer.parameters()]
        still = each.__class__(each.works, torch.tensor(0.0), each.weights, each.asked_to_stop)
        figures.append(trainer.update(still))
        assert all(torch.equal(p, w) for p, w in zip(trainer.scorer.parameters(), weights, strict=True))
    torch.testing.assert_close(*figures, rtol=1e-6, atol=1e-6)


def test_padded_targets_have_at_most_four_lengths(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for step in range(20):
        for work in inputs_of(trainer, step).padded().works.values():
            for batch in work.micro_batches:
                parts = {batch.input_ids.numel() / len(labels) for _, labels, _ in batch.targets.values()}
                assert parts <= {1, 2, 4, 8}
                if answers := batch.targets.get("answer"):
                    assert len(answers.groups) == len(answers.labels)


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_layers_compile_once_for_each_shape_without_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text rows, and recall rows of two lengths, are three shapes."""
    trainer = make_trainer(tmp_path)
    torch._dynamo.reset()
    counters.clear()
    for layer in trainer.decoder.model.layers:
        layer.compile(backend="eager")
    for length in (48, 56, 48, 56):
        monkeypatch.setattr(Curriculum, "row_length", lambda *_, length=length: length)
        trainer.update(inputs_of(trainer, 0))
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()


def outcome(step: int, loss: float) -> Outcome:
    names = {"text": [("loss", "text"), ("right", "text"), ("count", "text"), ("grad_norm", "")]}
    return Outcome(step, {"needle": 8}, names, torch.tensor([0.0, loss, 3.0, 4.0, 1.5], dtype=torch.float64))


def test_an_outcome_names_its_figures_and_survives_a_checkpoint() -> None:
    first = outcome(7, 6.0)
    assert first.measured == {"text": Measured({"text": 6.0}, {"text": 3.0}, {"text": 4.0}, grad_norm=1.5)}
    assert first.finite
    assert not first.asked_to_stop
    assert not outcome(7, float("nan")).finite
    loaded = Outcome.load(json.loads(json.dumps(first.saved(), sort_keys=True)))
    assert (loaded.step, loaded.distances, loaded.measured) == (7, {"needle": 8}, first.measured)
    asked = outcome(7, 6.0)
    asked.figures[0] = 1.0
    assert asked.asked_to_stop
    assert not Outcome.load(asked.saved()).asked_to_stop
    assert not Outcome.load(json.loads(json.dumps(outcome(7, float("inf")).saved()))).finite


def test_a_curriculum_hears_of_a_step_two_steps_later(tmp_path: Path) -> None:
    """Every answer counts as right: D grows for the first time before the third step."""
    trainer = make_trainer(tmp_path, max_steps=4, schedule={"warmup_steps": 1})
    distances = []

    class AllRight(Update):
        def __call__(self, inputs: Inputs) -> torch.Tensor:
            distances.append(dict(trainer.state.distances)["needle"])
            figures = super().__call__(inputs)
            names = [name for o in self.objectives for name in Outcome.of(0, {}, [o], figures).names[o.name]]
            right, count = (1 + names.index((what, "needle")) for what in ("right", "count"))
            figures[right] = figures[count]
            return figures

    trainer.update = AllRight(trainer.stage.objectives, trainer.accelerator, trainer.wrapped, trainer.optimizer)
    assert trainer.run()
    assert DELAY == 2
    assert distances[0] == distances[1] < distances[2] < distances[3]


def test_a_rate_that_training_exceeds_is_not_believed(tmp_path: Path) -> None:
    """The machine was busy when its matrix products were timed."""
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.facts["matmul_rate"] = 1.0  # FLOP/s
    assert trainer.run()
    assert max(row["mfu"] for row in tiny_run.metrics(tmp_path).values()) == 1.0


def test_out_of_memory_says_what_to_lower_and_that_the_run_goes_on(tmp_path: Path, capsys: Any) -> None:
    from training.processes.precision import lack_of_memory_is_fault
    from training.processes.signals import TrainingFault

    settings = load_settings(tiny_run.write_config(tmp_path))
    problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")
    with pytest.raises(TrainingFault) as fault, lack_of_memory_is_fault(settings):
        raise problem
    said = str(fault.value)
    assert "the GPU has no memory left: CUDA out of memory\n" in said
    assert "training.micro_batch_tokens (now 512 tokens" in said
    assert "the same command then goes on" in said
    assert yaml.safe_load((tmp_path / "tiny.yaml").read_text())["training"]["tokens_per_step"] == 512


def test_a_resumed_run_also_waits_less_long_for_a_lost_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("training.loop.shorten_timeout", lambda: calls.append(1))
    first = make_trainer(tmp_path, max_steps=4, save_every_steps=2)
    assert first.run()
    first.writer.close()
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    assert Trainer(load_settings(tmp_path / "tiny.yaml"), str(checkpoint), StopRequest()).run()
    assert calls == [1, 1]
