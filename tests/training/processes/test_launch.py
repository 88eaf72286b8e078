"""What a launch file may ask for. What `accelerate launch` hands on from its file is the environment."""

import pytest

from model.errors import UserError
from training.processes.launch import check_launch

HERE = "in the accelerate config file"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            f"fsdp_config.fsdp_version is 1 {HERE}; set it to 2",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            f"fsdp_config.fsdp_activation_checkpointing is true {HERE}; "
            "remove it and set training.activation_checkpointing: true",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            f"deepspeed_config is set {HERE}, and is not supported; "
            "start with configs/accelerate/fsdp2.yaml to share a model out over several GPUs",
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            f"dynamo_config.dynamo_backend is inductor {HERE}; remove it and set training.compile: true",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            f"mixed_precision is fp16 {HERE}; remove it and set training.precision (now bf16)",
        ),
    ],
)
def test_what_we_do_not_do_is_refused(monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], told: str) -> None:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        check_launch("bf16")
    assert str(refusal.value) == told


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_what_agrees_with_the_settings_is_fine(monkeypatch: pytest.MonkeyPatch, mixed: str) -> None:
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
    for name, value in (fsdp | {"ACCELERATE_MIXED_PRECISION": mixed, "ACCELERATE_DYNAMO_BACKEND": "NO"}).items():
        monkeypatch.setenv(name, value)
    check_launch("bf16")
