"""What goes wrong under a run: killed in mid-write, no room, a batch that gives NaN, other text, a tracker failing."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from data.tokenizer import load_tokenizer
from tests.integration.template import ROOT
from tests.integration.tiny_run import kill_after_step, losses, metrics, run, start, wait_for_step, write_config
from training.run.checkpoint import checkpoints, problem_with

STEPS = 9


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(write_config(folder, max_steps=STEPS))
    return folder


def test_killed_while_a_checkpoint_is_written_the_run_goes_on_from_the_one_before(
    tmp_path: Path, uninterrupted: Path
) -> None:
    config = write_config(tmp_path, max_steps=STEPS)
    folder = tmp_path / "run/checkpoints"
    for _ in range(20):  # it may be finished between our look and our shot
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = start(config)
        while process.poll() is None and not list(folder.glob(".writing-step-000006*")):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        if list(folder.glob(".writing-step-000006*")):
            break
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000003"]
    assert "step-000003 at step 3" in run(config)
    assert losses(tmp_path) == losses(uninterrupted)
    assert not list(folder.glob(".*"))


# -- no room ----------------------------------------------------------------------------------------------------------

SMALL_DISK = """
set -e
mount -t tmpfs -o size=$1 tmpfs "$2"
set +e
shift; disk=$1; out=$2; shift 2
"$@"
code=$?
cp -a "$disk" "$out"
exit $code
"""


def run_on_small_disk(config: Path, disk: Path, size: str, out: Path) -> subprocess.CompletedProcess[str]:
    """A run on a tmpfs of `size` that only it and its shell can see; what it left is copied to `out`."""
    train = [sys.executable, "train.py", str(config), f"run_dir={disk}/run"]
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", size, str(disk), str(out), *train],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def can_mount() -> bool:
    trial = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
    return shutil.which("unshare") is not None and subprocess.run(trial, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this machine lets no user mount a tmpfs in a namespace of its own")
def test_full_disk_keeps_the_old_checkpoint_and_says_what_to_do(tmp_path: Path, uninterrupted: Path) -> None:
    config, disk, out = write_config(tmp_path, max_steps=STEPS), tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    size = sum(p.stat().st_size for p in (uninterrupted / "run/checkpoints/step-000006").rglob("*") if p.is_file())
    done = run_on_small_disk(config, disk, f"{int(1.9 * size) // 1024}k", out)
    assert done.returncode == 2, done.stderr
    assert "the checkpoint of step 6 could not be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "earlier checkpoints are untouched; make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (out / "run/checkpoints").iterdir()] == ["step-000003"]
    assert problem_with(out / "run/checkpoints/step-000003") is None

    shutil.move(out / "run", tmp_path / "run")
    assert "at step 3" in run(config, f"run_dir={tmp_path}/run")
    assert losses(tmp_path) == losses(uninterrupted)


# -- batches that give NaN --------------------------------------------------------------------------------------------

MARK = "\u20ac"  # in a few sentences of the text; the tokenizer writes it as three bytes that are nowhere else


def poison(checkpoint: Path, token: int | slice) -> None:
    """Make embeddings of a checkpoint NaN, and the manifest true again."""
    weights = checkpoint / "hf/model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = weights.read_bytes()
    manifest["files"]["hf/model.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def mark_text(file: Path) -> None:
    sentences = file.read_text().split("\n")
    for i in range(100, 3000, 400):
        sentences[i] += MARK
    file.write_text("\n".join(sentences))


def test_a_batch_that_gives_nan_is_skipped_counted_and_kept_and_the_run_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=40, save_every_steps=1, keep_checkpoints=99)
    mark_text(tmp_path / "train.txt")
    assert kill_after_step(tmp_path, config, 3, signal.SIGTERM) == 75
    token = load_tokenizer(tmp_path / "run/tokenizer").get_vocab()["<0xE2>"]
    poison(checkpoints(tmp_path / "run")[0], token)

    output = run(config)
    skipped = sorted({row["skipped_step"] for row in metrics(tmp_path, "skipped").values()})
    assert 0 < len(skipped) < 30
    assert f"{len(skipped)} skipped" in output
    assert all(f"step {step} skipped: loss or gradient of" in output for step in skipped)
    kept = sorted((tmp_path / "run/skipped").glob("*.json"))
    assert {int(path.name.split("-")[1]) for path in kept} == set(skipped)
    for path in kept:
        facts = json.loads(path.read_text())
        assert any(token in ids for ids in facts["micro_batches"][0]["input_ids"])
        assert "nan" in facts["measured"].values()
        assert any(MARK in row for row in facts["text"])
    whole, log = losses(tmp_path), (tmp_path / "run/metrics.jsonl").read_text()
    path = tmp_path / f"run/checkpoints/step-{skipped[0] + 1:06d}"  # the skipped step does not count yet
    assert not json.loads((path / "state.json").read_text())["progress"]["skipped"]
    run(config, "--resume", str(path))
    assert losses(tmp_path) == whole
    rows = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "skipped_step" in line]
    assert rows == [line for line in log.splitlines() if "skipped_step" in line]
    unharmed = [row for step, row in metrics(tmp_path).items() if step not in skipped]
    assert all(row["loss_text"] is not None and row["grad_norm_text"] is not None for row in unharmed)


def test_too_many_in_a_row_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    overflowing = write_config(tmp_path, max_steps=12, max_skipped_steps=4, optimizer={"lr": 1e30})
    output = run(overflowing, expect=1)
    assert "fault: 4 steps in a row had a loss or gradient that is not finite (training.max_skipped_steps)" in output
    assert "their batches are in the run folder's skipped/" in output
    assert "Traceback" not in output
    assert list((tmp_path / "run/skipped").glob("*.json"))


def test_while_steps_are_skipped_nothing_is_saved_and_nothing_pruned_but_at_the_end(tmp_path: Path) -> None:
    options = {"max_steps": 7, "save_every_steps": 1, "keep_checkpoints": 9, "max_skipped_steps": 99}
    config = write_config(tmp_path, **options, optimizer={"lr": 1e30})
    assert "6 skipped" in run(config)
    whole, log = losses(tmp_path), tmp_path / "run/metrics.jsonl"
    rows = [line for line in log.read_text().splitlines() if "skipped_step" in line]
    assert {json.loads(row)["skipped_step"] for row in rows} == set(range(2, 8))
    older, last = reversed(checkpoints(tmp_path / "run"))
    assert (older.name, last.name) == ("step-000001", "step-000007")
    assert "6 skipped" in run(config, "--resume", str(older))
    assert [line for line in log.read_text().splitlines() if "skipped_step" in line] == rows
    assert losses(tmp_path) == whole


def test_broken_weights_push_no_good_checkpoint_out(tmp_path: Path) -> None:
    options = {"save_every_steps": 1, "keep_checkpoints": 2, "max_skipped_steps": 4}
    config = write_config(tmp_path, max_steps=2000, **options)
    assert kill_after_step(tmp_path, config, 3, signal.SIGTERM) == 75
    before = checkpoints(tmp_path / "run")
    poison(before[0], slice(None))
    assert "4 steps in a row" in run(config, expect=1)
    assert checkpoints(tmp_path / "run") == before
    assert problem_with(before[1]) is None


# -- another process, another folder ----------------------------------------------------------------------------------


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=2000, save_every_steps=1000)
    first = start(config)
    wait_for_step(tmp_path, 2, [first])
    for resume in ("auto", "never"):
        said = run(config, "--resume", resume, expect=2)
        assert f"process {first.pid} on {socket.gethostname()} is writing here" in said
    first.send_signal(signal.SIGTERM)
    out, errors = first.communicate(timeout=300)
    assert first.returncode == 75, errors
    assert f"stopped at step {max(metrics(tmp_path))}" in out
    assert sorted(metrics(tmp_path)) == list(range(1, max(metrics(tmp_path)) + 1))


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))])
def test_a_run_folder_that_is_deleted_or_moved_ends_the_run(tmp_path: Path, gone: Callable[[Path], object]) -> None:
    process = start(write_config(tmp_path, max_steps=2000, save_every_steps=50))
    wait_for_step(tmp_path, 2, [process])
    gone(tmp_path / "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert f"{tmp_path}/run was deleted, moved or replaced while this run was training in it" in errors
    assert not (tmp_path / "run").exists()


# -- other text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_text_that_changed_under_a_run_is_refused(tmp_path: Path, split: str) -> None:
    config = write_config(tmp_path, max_steps=2)
    run(config)
    text = tmp_path / f"{split}.txt"
    before = text.read_text()
    text.write_text(before.replace("ship", "boat", 1))
    output = run(config, expect=2)
    assert "the text under this run has changed since it began" in output
    assert f"  {split}: sha256 " in output
    assert "--resume never" in output
    text.write_text(before)
    assert "resumed" in run(config)


# -- wandb ------------------------------------------------------------------------------------------------------------


def test_wandb_is_offline_by_default_and_gets_the_columns(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=2)
    config.write_text(config.read_text().replace("wandb_mode: disabled", "wandb_project: tiny"))
    run(config)
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_wandb_that_is_absent_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    output = run(write_config(tmp_path, max_steps=2), "tracking.wandb_mode=offline", absent=("wandb",))
    assert output.count("wandb is not available") == 1
    assert "done: 2 steps" in output


def test_wandb_that_cannot_start_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    """Online, without a key and with nobody at the keyboard."""
    environment = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    output = run(write_config(tmp_path, max_steps=2), "tracking.wandb_mode=online", environment=environment)
    assert output.count("wandb is not available") == 1
    assert "done: 2 steps" in output


def test_wandb_whose_service_dies_is_said_once_and_training_goes_on(tmp_path: Path, uninterrupted: Path) -> None:
    process = start(write_config(tmp_path, max_steps=STEPS), "tracking.wandb_mode=offline")
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and '"kind": "train"' in log.read_text()):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)  # or it might be through before its service is found
    services = [pid for pid in children(process.pid) if b"wandb" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (out + errors).count("wandb failed") == 1
    assert losses(tmp_path) == losses(uninterrupted)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
