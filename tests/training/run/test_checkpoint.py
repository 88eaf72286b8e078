import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from model.errors import UserError
from training.run.checkpoint import (
    checkpoints,
    file_sha256,
    load_state,
    newest_valid,
    problem_with,
    prune,
    refuse_damaged,
    save_checkpoint,
    save_export,
    write_json,
)  # fmt: skip


def write_hf(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))


def rewrite(path: Path, **files: Any) -> None:
    """Change what the manifest lists."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | files))


FILES = ["hf/config.json", "hf/model.safetensors", "trainer.safetensors", "state.json", "manifest.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 1)


def save(run: Path, step: int) -> Path:
    save_checkpoint(run, step, {"step": step}, {"moment": torch.full((3,), float(step))}, write_hf)
    return run / "checkpoints" / f"step-{step:06d}"


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state, tensors = load_state(save(tmp_path, 7))
    assert state == {"step": 7}
    assert tensors["moment"].tolist() == [7.0, 7.0, 7.0]


def test_newest_valid_is_chosen_and_step_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    newest = save(tmp_path, 1_000_000)
    assert newest_valid(tmp_path) == newest


@pytest.mark.parametrize("file", ["hf/model.safetensors", "trainer.safetensors", "state.json", "manifest.json"])
def test_cut_short_file_is_said_aloud_and_the_older_checkpoint_used(tmp_path: Path, file: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    data = (newer / file).read_bytes()
    (newer / file).write_bytes(data[: len(data) // 2])
    said: list[str] = []
    assert newest_valid(tmp_path, said.append) == older
    assert len(said) == 1
    assert str(newer) in said[0]


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    data = bytearray((path / "hf/model.safetensors").read_bytes())
    data[100] ^= 1
    (path / "hf/model.safetensors").write_bytes(data)
    assert problem_with(path) == "hf/model.safetensors has another size or sha256 than when it was written"


@hypothesis_settings(max_examples=200)
@given(data=st.data())
def test_any_flipped_bit_is_found_or_changes_nothing(checkpoint: Path, data: st.DataObject) -> None:
    """Nothing: white space of the manifest, its step, which the folder's name has too, or a name nobody reads."""
    file = checkpoint / data.draw(st.sampled_from(FILES))
    before = file.read_bytes()
    at, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(before)
    changed[at] ^= 1 << bit
    try:
        file.write_bytes(changed)
        problem = problem_with(checkpoint)
        if problem is None:
            assert file.name == "manifest.json"
            assert json.loads(changed)["files"] == json.loads(before)["files"]
    finally:
        file.write_bytes(before)


def test_missing_file_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "hf/config.json").unlink()
    assert problem_with(path) == "hf/config.json is missing"


def test_no_valid_checkpoint_left_is_a_user_error_with_a_remedy(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").write_text("")
    with pytest.raises(UserError, match=r"no valid checkpoint is left(.|\n)*--resume never"):
        newest_valid(tmp_path, lambda _: None)


def test_half_written_checkpoint_is_never_seen_and_goes_at_the_next_prune(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def killed(folder: Path) -> None:
        write_hf(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {}, {}, killed)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001"]
    prune(tmp_path, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_failed_write_keeps_the_old_ones_and_says_what_to_do(tmp_path: Path) -> None:
    kept = save(tmp_path, 1)

    def full_disk(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step 2 could not be written(.|\n)*make room"):
        save_checkpoint(tmp_path, 2, {}, {}, full_disk)
    assert newest_valid(tmp_path) == kept


def test_file_that_may_not_grow_keeps_the_old_ones_and_says_what_to_do(tmp_path: Path) -> None:
    """A real refusal of the system, where no small disk can be mounted."""
    kept = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128, hard))
    try:
        with pytest.raises(UserError, match=r"step 2 could not be written: (.|\n)*earlier checkpoints are untouched"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_valid(tmp_path) == kept
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_tensors_that_find_no_room_keep_the_old_ones_and_say_what_to_do(tmp_path: Path) -> None:
    """safetensors reports what the system refuses as an error of its own."""
    kept = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"step 2 could not be written: Error while serializing(.|\n)*make room"):
        save_checkpoint(tmp_path, 2, {}, {"moment": torch.zeros(3)}, lambda hf: take_name(hf.parent))
    assert newest_valid(tmp_path) == kept


def take_name(folder: Path) -> None:
    """A folder where the tensors' file should be."""
    (folder / "trainer.safetensors").mkdir()


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_keeps_the_newest_at_least_two_and_what_is_no_checkpoint_of_ours(tmp_path: Path, keep: int) -> None:
    others = ["step-000001-copy", "step-\u00b2", ".backup-step-000001", ".writing-step-000001-mine"]
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (1, 2, 3):
        save(tmp_path, step)
    prune(tmp_path, keep)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000003", "step-000002"]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {*others, "step-000003", "step-000002"}


def test_prune_deletes_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    elsewhere = save(tmp_path, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints/step-000001").symlink_to(elsewhere)
    save(tmp_path, 2), save(tmp_path, 3)
    prune(tmp_path, keep=2)
    assert problem_with(elsewhere) is None
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("odd", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_what_is_no_folder_is_no_checkpoint(tmp_path: Path, odd: Callable[[Path], None]) -> None:
    older = save(tmp_path, 1)
    odd(tmp_path / "checkpoints/step-000002")
    assert newest_valid(tmp_path, lambda _: None) == older
    assert save(tmp_path, 2).is_dir()


@pytest.mark.parametrize("file", ["hf/model.safetensors", "manifest.json"])
def test_a_file_that_can_not_be_read_is_that_checkpoint_s_problem(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails. The superuser may read every file, so permissions would not show it."""
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / file).unlink()
    os.mkfifo(newer / file)
    assert newest_valid(tmp_path, lambda _: None) == older


@pytest.mark.parametrize("extra", ["hf/model_old.safetensors", "hf/adapter_config.json", "shard-00003.safetensors"])
def test_an_extra_file_that_a_loader_could_take_is_a_problem(tmp_path: Path, extra: str) -> None:
    path = save(tmp_path, 1)
    (path / "notes.txt").touch()
    assert problem_with(path) is None
    (path / extra).touch()
    assert problem_with(path) == f"{extra} is not in manifest.json; move it elsewhere"


def test_a_manifest_without_the_files_of_a_checkpoint_or_with_others_is_a_problem(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    for name in ("state.json", "hf/model.safetensors", "trainer.safetensors"):
        rewrite(path, files={k: v for k, v in listed.items() if k != name})
        assert problem_with(path) == "manifest.json lists no complete checkpoint"
    rewrite(path, files={})
    assert problem_with(path) == "manifest.json lists no complete checkpoint"
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    rewrite(path, files=listed | {"../../outside": {"bytes": 0, "sha256": file_sha256(outside)}})
    assert problem_with(path) == "../../outside is missing"


def test_a_damaged_checkpoint_is_refused_by_all_who_load_from_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    refuse_damaged(path / "hf")
    refuse_damaged(tmp_path)
    (path / "hf/config.json").write_text("{ }")
    for folder in (path, path / "hf"):
        with pytest.raises(UserError, match=rf"{path}: hf/config.json has another size(.|\n)*take another checkpoint"):
            refuse_damaged(folder)


def test_an_export_with_other_weights_is_refused_and_its_other_files_are_the_user_s(tmp_path: Path) -> None:
    save_export(tmp_path / "hf", write_hf)
    (tmp_path / "hf/config.json").write_text('{"architectures": []}')
    refuse_damaged(tmp_path / "hf")
    weights = bytearray((tmp_path / "hf/model.safetensors").read_bytes())
    weights[100] ^= 1
    (tmp_path / "hf/model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"hf: model\.safetensors has another size or sha256 than when it was written"):
        refuse_damaged(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"hf: model\.safetensors can't be read \(No such file or directory\)"):
        refuse_damaged(tmp_path / "hf")


def test_checkpoints_that_are_deleted_meanwhile_lead_to_the_next_one(tmp_path: Path) -> None:
    """The training prunes while an evaluation looks for the newest."""
    (save(tmp_path, 1) / "state.json").write_text("")

    def train_on(_: str) -> None:
        for step in (2, 3, 4):
            save(tmp_path, step)
        prune(tmp_path, 2)

    newest = newest_valid(tmp_path, train_on)
    assert newest is not None
    assert newest.name == "step-000004"


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
    assert listed == there


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"bits": float("nan"), "rows": [{"low": float("-inf"), "n": 3}]})
    assert json.loads((tmp_path / "result.json").read_text()) == {"bits": None, "rows": [{"low": None, "n": 3}]}
