"""Every YAML that we ship."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.windows import reach
from training.settings.build import model_config
from training.settings.config_file import load_settings
from training.settings.consistency import recall_seq_len
from training.settings.generate import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TWINS = sorted((ROOT / "configs" / "twins").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
SIZES = {"cpu": (1, 1), "ddp-cpu-2": (2, 1), "fsdp2-cpu-2": (2, 1), "gpu-8": (8, 1), "fsdp2": (8, 1),
         "fsdp2-nodes": (32, 4)}  # fmt: skip


def name(path: Path) -> str:
    return path.stem


def differing(a: Any, b: Any, path: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return {d for k in a.keys() | b.keys() for d in differing(a.get(k), b.get(k), f"{path}.{k}" if path else k)}
    return set() if a == b else {path}


@pytest.mark.parametrize("path", CONFIGS + TWINS, ids=name)
def test_config_loads_and_describes_a_model(path: Path) -> None:
    settings = load_settings(path)
    config = model_config(settings, 32000)
    assert len(config.specs) == settings.model.num_hidden_layers
    if path.stem != "base":
        assert settings.name == (f"quickstart-{path.stem}" if path in TWINS else path.stem)


@pytest.mark.parametrize("path", CONFIGS + TWINS, ids=name)
def test_config_names_its_schema(path: Path) -> None:
    schema = "../schema.json" if path in TWINS else "schema.json"
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={schema}"


@pytest.mark.parametrize("path", CONFIGS + TWINS + SWEEPS + LAUNCHES, ids=name)
def test_file_opens_with_its_purpose_a_command_and_what_to_expect(path: Path) -> None:
    head = [line for line in path.read_text().partition("\n\n")[0].splitlines() if line.startswith("#")]
    purpose, *rest = [line for line in head if "$schema" not in line and line != "#"]
    assert purpose[2].isupper() or purpose[2].isdigit()
    assert any(line.startswith("#   ") and str(path.relative_to(ROOT)) in line for line in rest)
    assert any("Expect" in line for line in rest) or path in LAUNCHES  # whose runs are those of other files


@pytest.mark.parametrize("path", LAUNCHES, ids=name)
def test_launch_file_is_one_that_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # training.precision decides
    assert f"configs/accelerate/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", LAUNCHES, ids=name)
def test_launch_file_starts_the_processes_and_the_sharding_that_its_name_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment that `accelerate launch` would give to the processes, made by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    )
    assert (arguments.num_processes, arguments.num_machines) == SIZES[path.stem]
    assert arguments.use_fsdp == path.stem.startswith("fsdp2")
    if arguments.use_fsdp:
        environment = prepare_multi_gpu_env(arguments)
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert (environment["FSDP_VERSION"], environment["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "true")


def test_every_key_of_base_is_a_default() -> None:
    base = load_settings(ROOT / "configs/base.yaml")
    given = {"name": base.name, "model": {}, "training": {"max_steps": base.training.max_steps}}
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "sliding_window"):
        given["model"][key] = getattr(base.model, key)
    assert type(base).model_validate(given) == base


def test_quickstart_is_32_windows_of_16_and_reaches_480() -> None:
    config = model_config(load_settings(ROOT / "configs/quickstart.yaml"), 2048)
    assert {spec.window for spec in config.specs} == {16}
    assert reach(config.specs) == 480


@pytest.mark.parametrize(
    ("twin", "expected"),
    [("hybrid-4", None), ("hybrid-8", None), ("global", None), ("sinks", 480), ("chunked", 15), ("growing", 480),
     ("dilated", 720)],
)  # fmt: skip
def test_the_reach_that_the_head_of_a_twin_promises(twin: str, expected: int | None) -> None:
    config = model_config(load_settings(ROOT / f"configs/twins/{twin}.yaml"), 2048)
    assert reach(config.specs) == expected


@pytest.mark.parametrize(
    ("twin", "differences"),
    [
        ("twins/full", {"name", "model.layers"}),
        ("twins/text-only", {"name", "recall.enabled", "training.text_weight"}),
        ("twins/hybrid-4", {"name", "model.layers"}),
        ("twins/hybrid-8", {"name", "model.layers"}),
        ("twins/global", {"name", "model.layers"}),
        ("twins/sinks", {"name", "model.layers"}),
        ("twins/growing", {"name", "model.layers"}),
        ("twins/dilated", {"name", "model.layers"}),
        (
            "twins/chunked",
            {"name", "model.layers", *(f"recall.curriculum.{k}_distance" for k in ("start", "max"))},
        ),
    ],
)
def test_twin_differs_from_the_quickstart_in_one_thing(twin: str, differences: set[str]) -> None:
    a, b = (load_settings(ROOT / f"configs/{name}.yaml") for name in ("quickstart", twin))
    assert differing(a.model_dump(), b.model_dump()) == differences


def test_full_twin_has_the_recall_rows_of_the_quickstart() -> None:
    a, b = (load_settings(ROOT / f"configs/{name}.yaml") for name in ("quickstart", "twins/full"))
    assert recall_seq_len(a) == recall_seq_len(b)


def test_published_model_has_the_published_shape() -> None:
    m = load_settings(ROOT / "configs/mistral-7b.yaml").model
    assert yaml.safe_dump(
        m.model_dump(include={"hidden_size", "intermediate_size", "sliding_window", "vocab_size"})
    ) == ("hidden_size: 4096\nintermediate_size: 14336\nsliding_window: 4096\nvocab_size: 32000\n")
