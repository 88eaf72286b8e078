import json
import os
import shutil
import socket
import subprocess
import sys
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
from tests.training.run.test_checkpoint import write_hf
from training.run.checkpoint import save_checkpoint
from training.run.folder import (
    FACTS_SAVED,
    check_settings,
    check_start,
    data_hashes,
    decide_once,
    open_run,
    read_facts,
    run_dir,
    settings_hash,
)  # fmt: skip
from training.settings.schema import Settings

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[3]


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


def opened(settings: Settings, resume: str) -> Path | None:
    """The checkpoint that a start resumes, after its process has ended."""
    checkpoint, writer = open_run(settings, resume)
    writer.close()
    return checkpoint


def save(settings: Settings, step: int, **state: Any) -> Path:
    state = {"settings_sha256": settings_hash(settings)} | state
    save_checkpoint(run_dir(settings), step, state, {"x": torch.zeros(1)}, write_hf)
    return run_dir(settings) / f"checkpoints/step-{step:06d}"


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_fresh_folder_holds_the_settings_and_nothing_to_resume(settings: Settings) -> None:
    assert opened(settings, "auto") is None
    saved = run_dir(settings) / "settings.yaml"
    assert Settings.model_validate(yaml.safe_load(saved.read_text())) == settings
    assert sorted(p.name for p in run_dir(settings).iterdir()) == [".lock", "checkpoints", "settings.yaml"]


def test_folder_is_named_by_the_run_unless_told_otherwise(settings: Settings) -> None:
    assert run_dir(changed(settings, run_dir=None)) == Path("runs/tiny")


def test_the_newest_checkpoint_is_resumed(settings: Settings) -> None:
    opened(settings, "auto")
    save(settings, 1)
    newest = save(settings, 2)
    assert opened(settings, "auto") == newest


def test_what_a_killed_write_left_is_cleared(settings: Settings) -> None:
    opened(settings, "auto")
    left = run_dir(settings) / "checkpoints/.writing-step-000003"
    left.mkdir()
    opened(settings, "auto")
    assert not left.exists()


def test_an_older_checkpoint_is_resumed_and_newer_ones_are_set_aside(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are compared as numbers, and a path is the same folder however it is written."""
    opened(settings, "auto")
    older, newer = (save(settings, step) for step in (999_999, 1_000_000))
    monkeypatch.chdir(run_dir(settings))
    assert opened(settings, f"checkpoints/{older.name}") == Path("checkpoints") / older.name
    assert f"{newer} is not resumed and is now not-resumed-{newer.name}.old-1" in capsys.readouterr().out
    assert opened(settings, "auto") == older
    assert (newer.parent / f"not-resumed-{newer.name}.old-1").is_dir()


def test_never_sets_the_folder_aside_again_and_again(settings: Settings) -> None:
    for number in (1, 2):
        opened(settings, "auto")
        save(settings, number)
        assert opened(settings, "never") is None
        assert (run_dir(settings).with_name(f"run.old-{number}") / f"checkpoints/step-{number:06d}").is_dir()


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "no such folder"), (".", "manifest.json can't be read")])
def test_a_path_that_is_no_checkpoint_is_refused(settings: Settings, tmp_path: Path, name: str, reason: str) -> None:
    refused = rf"{reason}(.|\n)*give a folder such as runs/NAME/checkpoints/step-000200"
    with pytest.raises(UserError, match=refused):
        opened(settings, str(tmp_path / name))
    if reason == "no such folder":
        with pytest.raises(UserError, match=refused):
            check_start(settings, str(tmp_path / name))


def test_a_start_is_checked_without_writing_anything(settings: Settings) -> None:
    for resume in ("auto", "never"):
        check_start(settings, resume)
    assert not run_dir(settings).exists()
    opened(settings, "auto")
    with pytest.raises(UserError, match="  seed: 0 there, 7 now"):
        check_start(changed(settings, seed=7), "auto")
    check_start(changed(settings, seed=7), "never")


def test_another_run_s_checkpoint_sets_aside_all_of_this_run(settings: Settings, tmp_path: Path) -> None:
    """Else the next start would resume a newer one, and the next checkpoint would be pruned at once."""
    elsewhere = changed(settings, run_dir=str(tmp_path / "elsewhere"))
    opened(elsewhere, "auto")
    other = save(elsewhere, 20)
    opened(settings, "auto")
    for step in (10, 60):
        save(settings, step)
    assert opened(settings, str(other)) == other
    left = sorted(path.name for path in (run_dir(settings) / "checkpoints").iterdir())
    assert left == ["not-resumed-step-000010.old-1", "not-resumed-step-000060.old-1"]


# -- one writer -------------------------------------------------------------------------------------------------------


def test_a_run_that_is_being_trained_is_refused_and_its_process_named(settings: Settings) -> None:
    """Also where the folder would be set aside. A killed process holds nobody up."""
    path, text = run_dir(settings), "import sys, pathlib\nfrom training.run.writer import Writer\n"
    text += "writer = Writer(pathlib.Path(sys.argv[1]), '')\nprint('ready', flush=True)\nsys.stdin.read()"
    opened(settings, "auto")
    holder = subprocess.Popen([sys.executable, "-c", text, path], stdin=-1, stdout=-1, text=True, cwd=ROOT)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        for resume in ("auto", "never"):
            with pytest.raises(UserError) as refusal:
                open_run(settings, resume)
            assert str(refusal.value) == (
                f"{path}: process {holder.pid} on {socket.gethostname()} is writing here\n"
                "  wait until it has ended, or start another run with name=NAME or run_dir=PATH"
            )
        holder.kill()
    assert opened(settings, "never") is None


def test_a_folder_that_is_moved_or_deleted_is_noticed(settings: Settings) -> None:
    _, writer = open_run(settings, "auto")
    assert writer.still_there()
    moved = run_dir(settings).rename(run_dir(settings).with_name("moved"))
    assert not writer.still_there()
    opened(settings, "auto")  # another run in its place
    assert not writer.still_there()
    writer.close()
    _, writer = open_run(changed(settings, run_dir=str(moved)), "auto")
    shutil.rmtree(moved)
    assert not writer.still_there()
    writer.close()


# -- what is not ours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_with_other_files_is_refused_and_left_as_it_is(settings: Settings, resume: str) -> None:
    folder = run_dir(settings)
    folder.mkdir()
    for name in ("index.md", "metrics.jsonl"):
        (folder / name).write_text("mine")
    for call in (check_start, open_run):
        with pytest.raises(UserError, match=r"holds no run of ours \(it has no run.json\), but other files"):
            call(settings, resume)
    assert sorted(path.name for path in folder.iterdir()) == ["index.md", "metrics.jsonl"]


def test_what_a_sweep_or_a_killed_start_left_is_no_other_file(settings: Settings) -> None:
    folder = run_dir(settings)
    folder.mkdir()
    for name in ("train.log", "sweep.json", ".lock", ".writing-settings.yaml"):
        (folder / name).write_text("")
    assert opened(settings, "auto") is None


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("checkpoints", Path.touch, "a folder"),
        ("hf", Path.touch, "a folder"),
        ("run.json", Path.mkdir, "a file"),
        ("metrics.jsonl", os.mkfifo, "a file"),
        ("settings.yaml", lambda path: path.symlink_to("nowhere"), "a file"),
    ],
)
def test_a_file_where_a_folder_should_be_is_refused(
    settings: Settings, name: str, wrong: Callable[[Path], object], right: str
) -> None:
    opened(settings, "auto")
    path = run_dir(settings) / name
    aside = path.with_name("aside")
    if path.exists():
        path.rename(aside)
    (run_dir(settings) / "run.json").touch() if name != "run.json" else None
    wrong(path)
    with pytest.raises(UserError, match=f"{path} should be {right}\n  move it elsewhere"):
        opened(settings, "auto")


def test_the_home_folder_is_where_the_shell_would_look(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert run_dir(changed(settings, run_dir="~/runs/a")) == Path("/home/me/runs/a")
    with pytest.raises(UserError, match="run_dir: ~nobody-here/a names the home folder of nobody here"):
        run_dir(changed(settings, run_dir="~nobody-here/a"))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_that_decide_the_weights_are_refused_and_each_is_named(settings: Settings) -> None:
    opened(settings, "auto")
    other = changed(settings, training__optimizer__lr=0.5, seed=7, training__keep_checkpoints=9)
    with pytest.raises(UserError) as caught:
        opened(other, "auto")
    message = str(caught.value)
    assert message.startswith(f"run folder {run_dir(settings)} holds a run with other settings:\n")
    assert "  seed: 0 there, 7 now\n  training.optimizer.lr: 0.003 there, 0.5 now\n" in message
    assert "keep_checkpoints" not in message
    assert "use another name=..., or --resume never" in message


def test_settings_that_decide_no_weight_are_free_and_the_hash_knows_them(settings: Settings) -> None:
    opened(settings, "auto")
    free = changed(settings, name="b", tracking__wandb_mode="offline", training__save_every_steps=1)
    assert opened(free, "auto") is None
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
    opened(settings, "auto")
    newest = save(settings, 1)
    other = changed(settings, **change)
    assert other != settings
    assert opened(other, "auto") == newest
    assert yaml.safe_load((run_dir(settings) / "settings.yaml").read_text()) == other.model_dump(mode="json")


def write_saved(settings: Settings, change: Callable[[dict[str, Any]], object]) -> Path:
    """A run folder whose settings.yaml another version has written."""
    opened(settings, "auto")
    tree = settings.model_dump(mode="json")
    change(tree)
    path = run_dir(settings) / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_setting_that_is_newer_than_the_run_has_its_default_there(settings: Settings) -> None:
    write_saved(settings, lambda tree: (tree["training"].pop("z_loss_weight"), tree["model"]["layers"][0].pop("sink")))
    assert check_settings(run_dir(settings), settings) == []
    with pytest.raises(UserError, match=r"\n  training.z_loss_weight: 0.0 there, 0.1 now\n"):
        opened(changed(settings, training__z_loss_weight=0.1), "auto")


def test_a_setting_that_no_longer_exists_is_ignored_with_a_sentence(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_saved(
        settings, lambda tree: (tree["training"].update(old=3), tree["model"]["layers"][0].update(odd=1))
    )
    assert opened(settings, "auto") is None
    said = capsys.readouterr().out
    for key in ("training.old", "model.layers.0.odd"):
        assert f"{path}: {key} is ignored, because this version has no such setting" in said
    assert check_settings(run_dir(settings), settings) == []  # the file is written anew


def test_saved_settings_that_this_version_cannot_read_are_a_sentence(settings: Settings) -> None:
    path = write_saved(settings, lambda tree: tree["training"].update(max_steps="many", old=3))
    with pytest.raises(
        UserError, match=rf"{path}: this version can't read the settings of that run: training.max_steps"
    ):
        opened(settings, "auto")


@pytest.mark.parametrize("damaged", [None, b"model: {hidden_", b"- 1", b"\xff\xfe"])
def test_without_saved_settings_the_hash_of_the_run_tells_whether_settings_agree(
    settings: Settings, prepared: Prepared, damaged: bytes | None
) -> None:
    opened(settings, "auto")
    decide(settings, prepared)
    path = run_dir(settings) / "settings.yaml"
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{path} is missing or damaged, and was written by a run with other settings"):
        opened(changed(settings, seed=7), "auto")
    opened(changed(settings, training__micro_batch_tokens=64), "auto")  # which is written then
    assert "micro_batch_tokens: 64" in path.read_text()


def test_a_checkpoint_of_another_seed_is_refused(settings: Settings, prepared: Prepared) -> None:
    opened(settings, "auto")
    decide(settings, prepared)
    path = save(settings, 1, settings_sha256=settings_hash(changed(settings, seed=7)))
    with pytest.raises(UserError, match=f"{path}: was written by a run with other settings"):
        opened(settings, "auto")


def test_a_checkpoint_of_another_run_is_taken_where_settings_agree_and_refused_with_their_names_where_not(
    settings: Settings, tmp_path: Path
) -> None:
    opened(settings, "auto")
    path = save(settings, 3)
    elsewhere = changed(settings, run_dir=str(tmp_path / "elsewhere"))
    wider = changed(elsewhere, model__hidden_size=64)
    with pytest.raises(UserError, match=r"holds a run with other settings:\n  model.hidden_size: 32 there, 64 now"):
        opened(wider, str(path))
    assert not (run_dir(wider) / "settings.yaml").exists()
    assert opened(elsewhere, str(path)) == path
    (run_dir(settings) / "settings.yaml").unlink()  # a checkpoint that was carried elsewhere without its run
    assert opened(elsewhere, str(path)) == path
    with pytest.raises(
        UserError, match=r"was written by a run with other settings(.|\n)*put that run's settings.yaml back"
    ):
        opened(changed(wider, run_dir=str(tmp_path / "third")), str(path))


# -- what is decided once ---------------------------------------------------------------------------------------------


def decide(
    settings: Settings, prepared: Prepared, checkpoint: Path | None = None, **stores: TokenStore
) -> dict[str, Any]:
    sources = {name: source._replace(**stores) for name, source in prepared.sources.items()}
    return decide_once(settings, prepared.tokenizer, sources, CPU, checkpoint)


def test_a_start_anew_notes_the_weights_that_it_begins_with(settings: Settings, prepared: Prepared) -> None:
    opened(settings, "auto")
    for sha256 in ("first", "other"):  # no checkpoint between them
        origin = {"pretrained_sha256": sha256}
        decide_once(settings, prepared.tokenizer, prepared.sources, CPU, origin=origin)
        assert read_facts(run_dir(settings))["pretrained_sha256"] == sha256
    decide(settings, prepared)
    assert read_facts(run_dir(settings))["pretrained_sha256"] == "other"


def test_a_second_start_finds_what_the_first_decided(settings: Settings, prepared: Prepared) -> None:
    opened(settings, "auto")
    first, second = (decide(settings, prepared) for _ in range(2))
    for fact in ("precision", "wandb_id", "tokenizer_sha256", "data_sha256", "settings_sha256"):
        assert first[fact] == second[fact] == read_facts(run_dir(settings))[fact]
    assert first["matmul_rate"] > 0
    assert (run_dir(settings) / "tokenizer/tokenizer.model").is_file()


def test_precision_once_decided_holds_whatever_a_later_machine_would_choose(
    settings: Settings, prepared: Prepared
) -> None:
    auto = changed(settings, training__precision="auto")
    opened(auto, "auto")
    chosen = decide(auto, prepared)["precision"]
    other = "fp32" if chosen == "bf16" else "bf16"
    facts = run_dir(auto) / "run.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"precision": other}))
    assert decide(auto, prepared)["precision"] == other


def test_a_precision_edited_into_run_json_is_refused(settings: Settings, prepared: Prepared) -> None:
    for of_settings, checkpoint in (("fp32", None), ("auto", save(settings, 1, precision="fp32"))):
        run = changed(settings, training__precision=of_settings)
        facts = run_dir(settings) / "run.json"
        facts.write_text(json.dumps({"precision": "bf16"}))
        with pytest.raises(UserError, match=f"precision is bf16, but fp32 in {checkpoint or 'training.precision'}"):
            decide(run, prepared, checkpoint)


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"[]", b'{"data_sha256": 3}'])
def test_a_damaged_run_json_is_written_anew_from_the_newest_checkpoint(
    settings: Settings, prepared: Prepared, damaged: bytes
) -> None:
    opened(settings, "auto")
    facts = decide(settings, prepared)
    path = save(settings, 1, **{name: facts[name] for name in FACTS_SAVED})
    (run_dir(settings) / "run.json").write_bytes(damaged)
    assert opened(settings, "auto") == path
    assert decide(settings, prepared, path)["wandb_id"] == facts["wandb_id"]
    assert read_facts(run_dir(settings)) == {k: v for k, v in facts.items() if k != "matmul_rate"}


def test_a_run_that_goes_on_from_another_s_checkpoint_takes_its_precision(
    settings: Settings, prepared: Prepared
) -> None:
    opened(settings, "auto")
    assert decide(settings, prepared, save(settings, 1, precision="bf16"))["precision"] == "bf16"


def test_other_text_is_refused_and_the_split_named(settings: Settings, prepared: Prepared) -> None:
    opened(settings, "auto")
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
    opened(settings, "auto")
    decide(settings, prepared)
    other: Tokenizer = train_tokenizer(["the sea was calm and a ship came slowly " * 50], 320)
    with pytest.raises(UserError, match=r"was trained with another tokenizer(.|\n)*data.tokenizer.model_file"):
        decide_once(settings, other, prepared.sources, CPU)
