"""What a launch file of accelerate may ask for. `accelerate launch` hands it to the processes in their environment."""

import os

from model.errors import UserError

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed_config",
    "ACCELERATE_USE_MEGATRON_LM": "megatron_lm_config",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def check_launch(precision: str) -> None:
    """Raises UserError for what we don't do, or what the settings decide. `precision` is `training.precision`."""
    if asked := [name for variable, name in ENGINES.items() if _value(variable) == "true"]:
        remedy = "start with configs/accelerate/fsdp2.yaml to share a model out over several GPUs"
        raise UserError(f"{asked[0]} is set in the accelerate config file, and is not supported; {remedy}")
    if (backend := _value("ACCELERATE_DYNAMO_BACKEND", "no")) != "no":
        raise _conflict("dynamo_config.dynamo_backend", backend, "remove it and set training.compile: true")
    if (mixed := _value("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", precision):
        raise _conflict("mixed_precision", mixed, f"remove it and set training.precision (now {precision})")
    if _value("ACCELERATE_USE_FSDP") != "true":
        return
    if (version := _value("FSDP_VERSION", "1")) != "2":
        raise _conflict("fsdp_config.fsdp_version", version, "set it to 2")
    if _value("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        remedy = "remove it and set training.activation_checkpointing: true"
        raise _conflict("fsdp_config.fsdp_activation_checkpointing", "true", remedy)


def _value(variable: str, default: str = "false") -> str:
    return os.environ.get(variable, default).lower()


def _conflict(option: str, value: str, remedy: str) -> UserError:
    return UserError(f"{option} is {value} in the accelerate config file; {remedy}")
