import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.cache import RingCache
from model.config import WindreachConfig
from model.decoder import build_model
from model.flops import count_parameters, flops_per_token, parameters
from model.hub import save_hf
from tests.model.tiny import tiny_config
from training.planning.dry_run import plan_text, size, vocab_size
from training.planning.formulas import Setup, memory
from training.planning.stages import largest_memory, stage_works
from training.processes.precision import Machine
from training.settings.build import model_config
from training.settings.config_file import load_settings
from training.settings.generate import ROOT

SMOKE = ROOT / "configs" / "smoke.yaml"


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.planning.dry_run.measure", lambda device: Machine(1e11, 4e11))
    monkeypatch.setattr("training.planning.dry_run.set_up_threads", lambda wanted, local_processes: 1)


def plan(name: str, *overrides: str) -> dict[str, str]:
    """Lines of the plan by their name; several layer kinds are joined."""
    lines: dict[str, str] = {}
    for line in plan_text(load_settings(ROOT / "configs" / f"{name}.yaml", overrides)).splitlines()[1:]:
        key, _, text = line.strip().partition("  ")
        lines[key] = lines.get(key, "") + text.strip() + "\n"
    return lines


def test_mistral_7b_is_planned_as_published() -> None:
    lines = plan("mistral-7b")
    assert lines["parameters"].startswith("7,241,732,096 (")
    assert lines["reach"].startswith("R = 131,040 tokens")
    assert lines["W x layers"].startswith("131,072,")
    assert lines["layers"].startswith("32 x sliding, window=4096; backend blocked (auto on cpu); 512 MiB of cache")


def test_train_py_plans_mistral_7b_in_seconds() -> None:
    """Seconds of CPU, so that a busy machine does not fail it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/mistral-7b.yaml"), "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "7,241,732,096" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@pytest.mark.parametrize("name", ["quickstart", "twins/global", "twins/hybrid-4"])
def test_the_ring_holds_the_bytes_that_the_plan_foretells(name: str) -> None:
    settings = load_settings(ROOT / "configs" / f"{name}.yaml")
    model = build_model(model_config(settings, vocab_size(settings))).bfloat16().eval()
    cache, ids = RingCache(model.config), torch.zeros(1, settings.data.seq_len, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    held = dict.fromkeys(model.config.specs, 0)
    for layer in cache.layers:
        held[layer.slots.spec] += layer.bytes
    lines = plan(name)["layers"].strip().splitlines()
    assert len(lines) == len(held)
    for line, spec in zip(lines, held, strict=True):
        assert f"; {size(held[spec])} of cache" in line


def test_every_layer_kind_has_its_line() -> None:
    pattern = "[{kind: sliding, window: 8}, {kind: dilated, window: 4, dilation: 3}, {kind: full, sink: true}]"
    lines = plan("smoke", f"model.layers={pattern}", "model.attention_backend=reference", "data.seq_len=256")["layers"]
    sliding, dilated, full = lines.strip().splitlines()
    assert sliding.startswith("2 x sliding, window=8; backend reference")
    assert dilated.startswith("1 x dilated, window=4, dilation=3")
    assert full.startswith("1 x full, sink=True")
    assert "at 256 tokens, growing" in full


def test_full_attention_has_no_bound_and_no_headline() -> None:
    lines = plan("twins/full")
    assert lines["reach"] == "unbounded\n"
    assert "W x layers" not in lines


def test_window_lowers_the_flops() -> None:
    sliding, full = (int(plan(c)["FLOPs"].split()[0].replace(",", "")) for c in ("quickstart", "twins/full"))
    assert sliding < full


def test_time_is_labelled_as_a_bound() -> None:
    assert "if all were bare bf16 matmuls at the rate measured just now; steps are slower" in plan("smoke")["time"]


def test_precision_says_what_was_asked_and_measured() -> None:
    expected = "bf16 (training.precision is auto; matmul here fp32 100, bf16 400 GFLOP/s)\n"
    assert plan("smoke")["precision"] == expected


def test_moments_and_gradients_are_counted_per_objective() -> None:
    n = sum(parameters(WindreachConfig()).values())
    one = plan("mistral-7b")["memory"]
    assert f"weights {4 * n / 2**30:,.1f} GiB, gradients {4 * n / 2**30:,.1f} GiB" in one
    two = plan("mistral-7b", "recall.enabled=true", "data.seq_len=16384")["memory"]
    assert f"gradients {8 * n / 2**30:,.1f} GiB, optimizer {16 * n / 2**30:,.1f} GiB" in two


def test_text_off_for_part_of_the_run_is_not_counted() -> None:
    line = plan(
        "smoke",
        "data.seq_len=128",
        "training.tokens_per_step=1024",
        "training.text_weight=[[0, 0], [0.5, 0], [0.5, 1]]",
        "training.max_steps=100",
    )["text"]
    assert line.endswith("50 steps = 51,200 tokens\n")


def test_vocabulary_is_the_given_one_else_that_of_the_tokenizer_to_train() -> None:
    assert vocab_size(load_settings(SMOKE, ["model.vocab_size=5000"])) == 5000
    assert vocab_size(load_settings(SMOKE, ["data.tokenizer.vocab_size=1234"])) == 1234


LAYERS = "model.layers: [{kind: full}, {}, {}], recall.curriculum.max_distance: 21"
STAGES = f"training.stages=[{{start: 0.5, set: {{data.seq_len: 128, {LAYERS}}}}}]"


def test_stages_are_listed_with_their_reach_rows_tokens_and_flops() -> None:
    alone, lines = plan("tiny"), plan("tiny", STAGES)
    assert not [name for name in alone if name.startswith("stage")]
    assert lines["stage 1"].startswith("steps 1 to 30: R = 21; 15,360 tokens of text in rows of 64, 15,360 tokens of r")
    assert lines["stage 2"].startswith("steps 31 to 60: R unbounded; 15,360 tokens of text in rows of 128, ")
    settings = load_settings(ROOT / "configs" / "tiny.yaml", [STAGES])
    first, second = stage_works(settings, 512, ranks=1)
    assert (first.config.specs[0].kind, second.config.specs[0].kind) == ("sliding", "full")
    for stage, (text, recall) in ((first, first.works), (second, second.works)):
        per_token = flops_per_token(stage.config, text.first.seq_len)
        assert text.flops(stage.config) == pytest.approx(15_360 * per_token)
        assert stage.flops == text.flops(stage.config) + recall.flops(stage.config)


def test_the_memory_is_that_of_the_stage_with_the_largest_micro_batch() -> None:
    larger = STAGES.replace("data.seq_len: 128", "training.tokens_per_step: 1024")
    settings = load_settings(ROOT / "configs" / "tiny.yaml", [larger])
    stages = stage_works(settings, 512, ranks=1)
    needed = [sum(memory(s.stretch.settings, s.config, Setup("fp32")).values()) for s in stages]
    assert needed[0] < needed[1] == sum(largest_memory(stages, Setup("fp32")).values())


def test_a_teacher_is_counted_in_flops_and_memory(tmp_path: Path) -> None:
    teacher = tiny_config(vocab_size=512)
    save_hf(build_model(teacher), tmp_path)
    taught = f"training.distillation.teacher={tmp_path}"
    settings = load_settings(ROOT / "configs" / "tiny.yaml", [taught])
    (with_it,), (without,) = (stage_works(s, 512, 1) for s in (settings, load_settings(ROOT / "configs" / "tiny.yaml")))
    tokens = with_it.works[0].tokens
    extra = with_it.flops - without.flops
    assert extra == pytest.approx(tokens * flops_per_token(teacher, settings.data.seq_len, training=False))
    assert plan("tiny", taught)["teacher"].startswith(f"{count_parameters(teacher):,} parameters, ")
    assert memory(settings, with_it.config, Setup("fp32"))["teacher"] == 4 * count_parameters(teacher)
