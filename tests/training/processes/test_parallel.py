"""Without several processes; sharding itself needs them: tests/integration/test_sharding.py."""

import pytest
import torch
from torch import nn

from training.processes.parallel import as_placed, load_whole, local, spread, whole_weights


def test_gradients_are_not_divided_by_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator, layer = spread(nn.Linear(1, 1, bias=False), "fp32")
    accelerator.backward(layer(torch.ones(1, 1)).sum())
    (weight,) = layer.parameters()
    assert weight.grad is not None
    assert weight.grad.item() == 1.0


def test_without_shards_whole_is_what_is_there_and_nothing_is_copied() -> None:
    layer = nn.Linear(2, 3)
    weights = whole_weights(layer, keep=True)
    assert weights["weight"].data_ptr() == layer.weight.data_ptr() == local(layer.weight).data_ptr()
    assert whole_weights(layer, keep=False) == {}
    assert as_placed(layer.bias, layer.weight) is layer.bias
    load_whole(layer.state_dict(), {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert layer.weight.eq(1).all()
