import pytest
import torch

from training.processes import ranks
from training.processes.ranks import lost_rank_is_fault
from training.processes.signals import TrainingFault

LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.parametrize(
    ("use_cpu", "gpu", "on_cpu"), [("true", True, True), ("false", True, False), ("", False, True)]
)
def test_a_run_is_on_the_cpu_without_a_gpu_or_where_the_launch_file_says_so(
    monkeypatch: pytest.MonkeyPatch, use_cpu: str, gpu: bool, on_cpu: bool
) -> None:
    monkeypatch.setattr(ranks, "PartialState", lambda cpu, timeout: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if use_cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    assert bool(ranks.join_ranks()) == on_cpu


def test_the_end_of_another_rank_is_a_fault_and_says_so() -> None:
    with pytest.raises(TrainingFault) as caught, lost_rank_is_fault():
        raise RuntimeError(LOST)
    assert f"another process of this run has ended, so this one ends too: {LOST}" in str(caught.value)
    assert "the same command goes on from the last checkpoint" in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), lost_rank_is_fault():
        raise RuntimeError("shapes do not match")
