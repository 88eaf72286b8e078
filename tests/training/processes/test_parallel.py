"""What a launch file may ask for; sharding itself needs processes: tests/integration/test_sharding.py."""

import pytest
import torch
from torch import nn

from model.errors import UserError
from training.processes.parallel import as_placed, load_whole, local, spread, whole_weights


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_config.fsdp_version is 1 in the accelerate config file; set it to 2"),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_config.fsdp_activation_checkpointing is true in the accelerate config file; "
            "remove it and set training.activation_checkpointing: true",
        ),
    ],
)
def test_launch_file_that_asks_for_what_we_do_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], told: str
) -> None:
    """What `accelerate launch` hands on from its file is the environment."""
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | asked).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        spread(nn.Linear(2, 2), "fp32")
    assert str(refusal.value) == told


def test_without_shards_whole_is_what_is_there_and_nothing_is_copied() -> None:
    layer = nn.Linear(2, 3)
    weights = whole_weights(layer, keep=True)
    assert weights["weight"].data_ptr() == layer.weight.data_ptr() == local(layer.weight).data_ptr()
    assert whole_weights(layer, keep=False) == {}
    assert as_placed(layer.bias, layer.weight) is layer.bias
    load_whole(layer.state_dict(), {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert layer.weight.eq(1).all()
