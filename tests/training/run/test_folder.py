import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.token_store import TokenStore
from data.tokenizer import Tokenizer, train_tokenizer
from model.errors import UserError
from tests.training.conftest import Prepared
from training.run.checkpoint import save_checkpoint
from training.run.folder import (
    check_settings,
    check_start,
    data_hashes,
    decide_once,
    open_run,
    read_facts,
    run_dir,
    settings_hash,
)
from training.settings.schema import Settings

CPU = torch.device("cpu")


def changed(settings: Settings, **dotted: Any) -> Settings:
    """Settings with `training__max_steps=3` and the like."""
    tree = settings.model_dump()
    for name, value in dotted.items():
        *sections, key = name.split("__")
        section = tree
        for part in sections:
            section = section[part]
        section[key] = value
    return Settings.model_validate(tree)


@pytest.fixture
def settings(prepared: Prepared, tmp_path: Path) -> Settings:
    return changed(prepared.settings, run_dir=str(tmp_path / "run"))


def save(settings: Settings, step: int, **state: Any) -> Path:
    save_checkpoint(run_dir(settings), step, state, {"x": torch.zeros(1)}, lambda hf: (hf / "config.json").touch())
    return run_dir(settings) / f"checkpoints/step-{step:06d}"


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_fresh_folder_holds_the_settings_and_nothing_to_resume(settings: Settings) -> None:
    assert open_run(settings, "auto") is None
    saved = run_dir(settings) / "settings.yaml"
    assert Settings.model_validate(yaml.safe_load(saved.read_text())) == settings
    assert sorted(p.name for p in run_dir(settings).iterdir()) == ["checkpoints", "settings.yaml"]


def test_folder_is_named_by_the_run_unless_told_otherwise(settings: Settings) -> None:
    assert run_dir(changed(settings, run_dir=None)) == Path("runs/tiny")


def test_the_newest_checkpoint_is_resumed(settings: Settings) -> None:
    open_run(settings, "auto")
    save(settings, 1)
    newest = save(settings, 2)
    assert open_run(settings, "auto") == newest


def test_what_a_killed_write_left_is_cleared(settings: Settings) -> None:
    open_run(settings, "auto")
    left = run_dir(settings) / "checkpoints/.writing-step-000003"
    left.mkdir()
    open_run(settings, "auto")
    assert not left.exists()


def test_an_older_checkpoint_is_resumed_and_newer_ones_are_set_aside(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are compared as numbers, and a path is the same folder however it is written."""
    open_run(settings, "auto")
    older, newer = (save(settings, step) for step in (999_999, 1_000_000))
    monkeypatch.chdir(run_dir(settings))
    assert open_run(settings, f"checkpoints/{older.name}") == Path("checkpoints") / older.name
    assert f"{newer} is newer than the checkpoint resumed" in capsys.readouterr().out
    assert open_run(settings, "auto") == older
    assert (newer.parent / f"not-resumed-{newer.name}.old-1").is_dir()


def test_never_sets_the_folder_aside_again_and_again(settings: Settings) -> None:
    for number in (1, 2):
        open_run(settings, "auto")
        save(settings, number)
        assert open_run(settings, "never") is None
        assert (run_dir(settings).with_name(f"run.old-{number}") / f"checkpoints/step-{number:06d}").is_dir()


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "no such folder"), (".", "manifest.json can't be read")])
def test_a_path_that_is_no_checkpoint_is_refused(settings: Settings, tmp_path: Path, name: str, reason: str) -> None:
    refused = rf"{reason}(.|\n)*give a folder such as runs/NAME/checkpoints/step-000200"
    with pytest.raises(UserError, match=refused):
        open_run(settings, str(tmp_path / name))
    if reason == "no such folder":
        with pytest.raises(UserError, match=refused):
            check_start(settings, str(tmp_path / name))


def test_a_start_is_checked_without_writing_anything(settings: Settings) -> None:
    for resume in ("auto", "never"):
        check_start(settings, resume)
    assert not run_dir(settings).exists()
    open_run(settings, "auto")
    with pytest.raises(UserError, match="  seed: 0 there, 7 now"):
        check_start(changed(settings, seed=7), "auto")
    check_start(changed(settings, seed=7), "never")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_that_decide_the_weights_are_refused_and_each_is_named(settings: Settings) -> None:
    open_run(settings, "auto")
    other = changed(settings, training__optimizer__lr=0.5, seed=7, training__keep_checkpoints=9)
    with pytest.raises(UserError) as caught:
        open_run(other, "auto")
    message = str(caught.value)
    assert message.startswith(f"run folder {run_dir(settings)} holds a run with other settings:\n")
    assert "  seed: 0 there, 7 now\n  training.optimizer.lr: 0.003 there, 0.5 now\n" in message
    assert "keep_checkpoints" not in message
    assert "use another name=..., or --resume never" in message


def test_settings_that_decide_no_weight_are_free_and_the_hash_knows_them(settings: Settings) -> None:
    open_run(settings, "auto")
    free = changed(settings, name="b", tracking__wandb_mode="offline", training__save_every_steps=1)
    assert open_run(free, "auto") is None
    assert settings_hash(free) == settings_hash(settings)
    assert settings_hash(changed(settings, data__seq_len=32)) != settings_hash(settings)


@pytest.mark.parametrize(
    "change",
    [
        {"training__micro_batch_tokens": 64},
        {"training__activation_checkpointing": True},
        {"training__compile": True},
        {"training__num_threads": 2},
        {"model__attention_backend": "reference"},
    ],
)
def test_settings_that_change_weights_by_rounding_alone_may_change_on_resume(
    settings: Settings, change: dict[str, Any]
) -> None:
    open_run(settings, "auto")
    newest = save(settings, 1)
    other = changed(settings, **change)
    assert other != settings
    assert open_run(other, "auto") == newest
    assert yaml.safe_load((run_dir(settings) / "settings.yaml").read_text()) == other.model_dump(mode="json")


def write_saved(settings: Settings, change: Callable[[dict[str, Any]], object]) -> Path:
    """A run folder whose settings.yaml another version has written."""
    open_run(settings, "auto")
    tree = settings.model_dump(mode="json")
    change(tree)
    path = run_dir(settings) / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_setting_that_is_newer_than_the_run_has_its_default_there(settings: Settings) -> None:
    write_saved(settings, lambda tree: (tree["training"].pop("z_loss_weight"), tree["model"]["layers"][0].pop("sink")))
    assert check_settings(run_dir(settings), settings) == []
    with pytest.raises(UserError, match=r"\n  training.z_loss_weight: 0.0 there, 0.1 now\n"):
        open_run(changed(settings, training__z_loss_weight=0.1), "auto")


def test_a_setting_that_no_longer_exists_is_ignored_with_a_sentence(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_saved(
        settings, lambda tree: (tree["training"].update(old=3), tree["model"]["layers"][0].update(odd=1))
    )
    assert open_run(settings, "auto") is None
    said = capsys.readouterr().out
    for key in ("training.old", "model.layers.0.odd"):
        assert f"{path}: {key} is ignored, because this version has no such setting" in said
    assert check_settings(run_dir(settings), settings) == []  # the file is written anew


def test_saved_settings_that_this_version_cannot_read_are_a_sentence(settings: Settings) -> None:
    path = write_saved(settings, lambda tree: tree["training"].update(max_steps="many", old=3))
    with pytest.raises(
        UserError, match=rf"{path}: this version can't read the settings of that run: training.max_steps"
    ):
        open_run(settings, "auto")


def test_a_folder_without_saved_settings_fits_all_settings(settings: Settings) -> None:
    open_run(settings, "auto")
    (run_dir(settings) / "settings.yaml").unlink()
    newest = save(settings, 1)
    assert open_run(changed(settings, seed=7), "auto") == newest


def test_a_checkpoint_of_another_run_is_taken_where_settings_agree_and_refused_with_their_names_where_not(
    settings: Settings, tmp_path: Path
) -> None:
    open_run(settings, "auto")
    path = save(settings, 3, settings_sha256=settings_hash(settings))
    elsewhere = changed(settings, run_dir=str(tmp_path / "elsewhere"))
    wider = changed(elsewhere, model__hidden_size=64)
    with pytest.raises(UserError, match=r"holds a run with other settings:\n  model.hidden_size: 32 there, 64 now"):
        open_run(wider, str(path))
    assert not (run_dir(wider) / "settings.yaml").exists()
    assert open_run(elsewhere, str(path)) == path
    (run_dir(settings) / "settings.yaml").unlink()  # a checkpoint that was carried elsewhere without its run
    assert open_run(elsewhere, str(path)) == path
    with pytest.raises(
        UserError, match=r"was written by a run with other settings(.|\n)*copy that run's settings.yaml"
    ):
        open_run(changed(wider, run_dir=str(tmp_path / "third")), str(path))


# -- what is decided once ---------------------------------------------------------------------------------------------


def decide(
    settings: Settings, prepared: Prepared, checkpoint: Path | None = None, **stores: TokenStore
) -> dict[str, Any]:
    sources = {name: source._replace(**stores) for name, source in prepared.sources.items()}
    return decide_once(settings, prepared.tokenizer, sources, CPU, checkpoint)


def test_a_second_start_finds_what_the_first_decided(settings: Settings, prepared: Prepared) -> None:
    open_run(settings, "auto")
    first, second = (decide(settings, prepared) for _ in range(2))
    for fact in ("precision", "wandb_id", "tokenizer_sha256", "data_sha256", "settings_sha256"):
        assert first[fact] == second[fact] == read_facts(run_dir(settings))[fact]
    assert first["matmul_rate"] > 0
    assert (run_dir(settings) / "tokenizer/tokenizer.model").is_file()


def test_precision_once_decided_holds_whatever_a_later_machine_would_choose(
    settings: Settings, prepared: Prepared
) -> None:
    auto = changed(settings, training__precision="auto")
    open_run(auto, "auto")
    chosen = decide(auto, prepared)["precision"]
    other = "fp32" if chosen == "bf16" else "bf16"
    facts = run_dir(auto) / "run.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"precision": other}))
    assert decide(auto, prepared)["precision"] == other


def test_a_run_that_goes_on_from_another_s_checkpoint_takes_its_precision(
    settings: Settings, prepared: Prepared
) -> None:
    open_run(settings, "auto")
    assert decide(settings, prepared, save(settings, 1, precision="bf16"))["precision"] == "bf16"


def test_other_text_is_refused_and_the_split_named(settings: Settings, prepared: Prepared) -> None:
    open_run(settings, "auto")
    decide(settings, prepared)
    with pytest.raises(
        UserError, match=r"the text under this run has changed since it began\n  heldout: sha256"
    ) as told:
        decide(settings, prepared, heldout=prepared.sources[""].train)
    assert "train: sha256" not in str(told.value)


def test_the_text_of_each_source_is_known_by_its_name(prepared: Prepared) -> None:
    alone = prepared.sources[""]
    two = data_hashes({"web": alone, "books": alone._replace(heldout=alone.train)})
    assert list(two) == ["web train", "web heldout", "books train", "books heldout"]
    assert two["books heldout"] == two["web train"] == data_hashes(prepared.sources)["train"]


def test_another_tokenizer_is_refused(settings: Settings, prepared: Prepared) -> None:
    open_run(settings, "auto")
    decide(settings, prepared)
    other: Tokenizer = train_tokenizer(["the sea was calm and a ship came slowly " * 50], 320)
    with pytest.raises(UserError, match=r"was trained with another tokenizer(.|\n)*data.tokenizer.model_file"):
        decide_once(settings, other, prepared.sources, CPU)
