import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.integration.tiny_run import (
    CHAT_TEMPLATE,
    kill_after_step,
    losses,
    metrics,
    run,
    start,
    write_chat,
    write_config,
    write_mixture,
)
from training.run.checkpoint import file_sha256


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    output = run(write_config(folder, max_steps=40))
    return {"folder": folder, "output": output, "losses": losses(folder)}


def test_killed_twice_and_resumed_every_later_step_is_bit_equal(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    config = write_config(tmp_path, max_steps=40)
    for step in (8, 20):
        assert kill_after_step(tmp_path, config, step, signal.SIGKILL) == -signal.SIGKILL
    assert "resumed" in run(config)
    assert losses(tmp_path) == uninterrupted["losses"]
    weights = [load_file(f / "run/hf/model.safetensors") for f in (tmp_path, uninterrupted["folder"])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [True, "reduce-overhead"])
def test_on_a_gpu_a_deterministic_run_is_resumed_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, compiled: bool | str
) -> None:
    training = {"max_steps": 24, "precision": "bf16", "compile": compiled, "deterministic": True}
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("whole-gpu", "killed-gpu"))
    assert ("each step is a CUDA graph" in run(write_config(whole, **training))) == bool(compiled)
    assert kill_after_step(killed, write_config(killed, **training), 11, signal.SIGKILL) == -signal.SIGKILL
    assert "resumed" in run(killed / "tiny.yaml")
    assert losses(killed) == losses(whole)


def mixed_config(folder: Path) -> Path:
    """All tasks that rows of 64 tokens hold, each with a curriculum that moves at a pace of its own."""
    config = write_config(folder, max_steps=24)
    described = yaml.safe_load(config.read_text())
    described["recall"] |= {"tasks": dict.fromkeys(["needle", "keys", "induction", "instruction"], 1.0), "keys": 8}
    described["recall"] |= {"questions": {"span_pairs": 2, "pairs": 2, "rules": 2}}
    config.write_text(yaml.safe_dump(described))
    return config


def test_a_mixture_of_tasks_is_resumed_bit_equal_with_every_curriculum_where_it_was(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("mixed", "killed"))
    run(mixed_config(whole))
    assert kill_after_step(killed, mixed_config(killed), 11, signal.SIGKILL) == -signal.SIGKILL
    assert "resumed" in run(mixed_config(killed))
    assert losses(killed) == losses(whole)
    last = losses(whole)[24]
    each = {name: last[f"distance_{name}"] for name in ("needle", "keys", "induction", "instruction")}
    assert last["distance"] == max(each.values())
    assert len(set(each.values())) > 1
    assert {f"accuracy_{name}" for name in each} <= last.keys()
    assert metrics(whole, "probe")[24]["by_task"].keys() == each.keys()


def test_a_mixture_of_sources_is_resumed_bit_equal_and_logged_by_source(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("sources", "killed"))
    output = run(write_mixture(whole, max_steps=24))
    assert kill_after_step(killed, write_mixture(killed, max_steps=24), 11, signal.SIGKILL) == -signal.SIGKILL
    assert "resumed" in run(killed / "tiny.yaml")
    assert losses(killed) == losses(whole)
    last, validated = losses(whole)[24], metrics(whole, "validation")[24]
    for source in ("web", "books"):
        assert {f"loss_text_{source}", f"accuracy_text_{source}"} <= last.keys()
        assert f"  {source} {validated[f'bits_per_byte_{source}']:.3f}" in output
    assert last["loss_text_web"] != last["loss_text_books"]
    each = [last[f"loss_text_{source}"] for source in ("web", "books")]
    assert min(each) < last["loss_text"] < max(each)


def test_a_run_on_conversations_is_resumed_bit_equal_and_refuses_another_template(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("conversations", "killed"))
    run(write_chat(whole))
    assert kill_after_step(killed, write_chat(killed), 5, signal.SIGKILL) == -signal.SIGKILL
    assert "resumed" in run(killed / "tiny.yaml")
    assert losses(killed) == losses(whole)
    assert (whole / "run/hf/chat_template.jinja").read_text() == CHAT_TEMPLATE
    (killed / "chat.jinja").write_text(CHAT_TEMPLATE.replace(":", " says:"))
    assert "the text under this run has changed since it began" in run(killed / "tiny.yaml", expect=2)


def test_a_checkpoint_with_another_order_of_rows_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=3)
    run(config)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    assert state.pop("row_order") == 2
    rewrite(checkpoint, state)
    output = run(config, expect=2)
    assert "step-000003: was written by a version that reads the rows of text in another order" in output
    assert "go on with that version (commit a715185), or start a run under another name, or --resume never" in output


def rewrite(checkpoint: Path, state: dict[str, Any]) -> None:
    """Replace state.json, and its hash in the manifest."""
    file, manifest = checkpoint / "state.json", json.loads((checkpoint / "manifest.json").read_text())
    file.write_text(json.dumps(state))
    manifest["files"]["state.json"] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_the_comparison_can_fail(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    run(write_config(tmp_path, max_steps=40), "seed=1")
    assert losses(tmp_path) != uninterrupted["losses"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_exits_75_and_the_next_start_goes_on(
    tmp_path: Path, uninterrupted: dict[str, Any], number: signal.Signals
) -> None:
    config = write_config(tmp_path, max_steps=40)
    assert kill_after_step(tmp_path, config, 4, number) == 75
    stopped_at = max(metrics(tmp_path))
    assert (tmp_path / f"run/checkpoints/step-{stopped_at:06d}/manifest.json").is_file()
    assert f"at step {stopped_at}" in run(config)
    assert losses(tmp_path) == uninterrupted["losses"]


def test_a_signal_before_the_first_step_ends_the_run_at_once_and_nothing_is_lost(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    config = write_config(tmp_path, max_steps=40)
    process = start(config)
    while process.poll() is None and not (tmp_path / "run/settings.yaml").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "SIGTERM: stopped before the first step; run the same command again to go on" in errors
    assert "resumed" not in run(config)
    assert losses(tmp_path) == uninterrupted["losses"]


def test_a_checkpoint_of_another_run_is_gone_on_from_when_settings_agree_and_refused_when_not(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    other = uninterrupted["folder"]
    before = [p.name for p in (other / "run/checkpoints").iterdir()]
    checkpoint = str(other / "run/checkpoints/step-000039")
    arguments = (other / "tiny.yaml", f"run_dir={tmp_path}/run", "--resume", checkpoint)
    assert "model.hidden_size: 32 there, 64 now" in run(*arguments, "model.hidden_size=64", expect=2)
    assert "at step 39" in run(*arguments, "--resume", checkpoint)
    assert losses(tmp_path) == {40: uninterrupted["losses"][40]}
    assert [p.name for p in (other / "run/checkpoints").iterdir()] == before


def test_flipped_bit_in_the_newest_checkpoint_is_said_aloud_and_the_older_used(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    config = write_config(tmp_path, max_steps=40)
    kill_after_step(tmp_path, config, 8, signal.SIGTERM)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    data = bytearray((newest / "trainer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "trainer.safetensors").write_bytes(data)
    output = run(config)
    assert f"passed over: {newest}" in output
    assert "resumed" in output
    assert losses(tmp_path) == uninterrupted["losses"]


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_micro_batches(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    config = write_config(tmp_path, max_steps=40)
    assert kill_after_step(tmp_path, config, 30, signal.SIGTERM) == 75
    stopped_at = max(metrics(tmp_path))
    assert f"at step {stopped_at}" in run(config, "training.micro_batch_tokens=64")
    for step, row in losses(tmp_path).items():
        expected = uninterrupted["losses"][step]
        if step <= stopped_at:
            assert row == expected
        for name in ("loss_text", "loss_answer", "grad_norm_text", "grad_norm_recall"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3)
    assert losses(tmp_path) != uninterrupted["losses"]  # it was cut into other micro-batches


def test_finished_run_started_again_trains_nothing(uninterrupted: dict[str, Any]) -> None:
    before = (uninterrupted["folder"] / "run/metrics.jsonl").read_bytes()
    assert "done: 40 steps" in run(uninterrupted["folder"] / "tiny.yaml")
    assert (uninterrupted["folder"] / "run/metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused_and_named(uninterrupted: dict[str, Any]) -> None:
    output = run(uninterrupted["folder"] / "tiny.yaml", "training.optimizer.lr=0.5", expect=2)
    assert "training.optimizer.lr: 0.003 there, 0.5 now" in output
    assert "--resume never" in output
    assert "Traceback" not in output


def test_resume_never_sets_the_folder_aside(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=2)
    run(config)
    output = run(config, "--resume", "never", "training.optimizer.lr=0.001")
    assert "run.old-1" in output
    assert (tmp_path / "run.old-1/hf/model.safetensors").is_file()
    assert (tmp_path / "run/hf/model.safetensors").is_file()


def test_resume_from_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    output = run(write_config(tmp_path), "--resume", str(tmp_path / "nowhere"), expect=2)
    assert "nowhere: no such folder" in output


def test_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = run(write_config(tmp_path), f"run_dir={tmp_path}/file/run", expect=2)
    assert "can't be read, written or set aside" in output
    assert "run_dir=PATH" in output
