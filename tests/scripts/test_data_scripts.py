"""The data script, on a small corpus."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from data import folders
from data.tokenizer import load_tokenizer
from model.errors import UserError
from scripts import prepare_data
from tests.integration.tiny_run import CHAT_TEMPLATE
from training.settings.config_file import load_settings


@pytest.fixture
def config(tmp_path):
    """A run on files of `tmp_path`, named by an absolute path."""
    text = "The sea was calm and a ship came slowly over the long grey water.\n"
    (tmp_path / "train.txt").write_text(text * 100)
    (tmp_path / "heldout.txt").write_text(text * 10)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    data = {
        "source": "files", "cache_dir": str(tmp_path / "cache"), "tokenizer": {"vocab_size": 320},
        "train_files": [str(tmp_path / "train.txt")], "heldout_files": [str(tmp_path / "heldout.txt")],
    }  # fmt: skip
    settings = {"name": "x", "model": sizes | {"sliding_window": 4}, "training": {"max_steps": 1000}, "data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "config.yaml")


def test_prepare_data_shows_documents_tokens_and_bytes(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config])
    prepare_data.main()
    out = capsys.readouterr().out
    assert "6,600" in out
    assert "660" in out
    assert "tokenizer: 320 tokens" in out


def of_two_sources(config, tmp_path):
    """The config with a mixture of its text and a table with one bad row."""
    described = yaml.safe_load(Path(config).read_text())
    data = described["data"]
    web = {name: data.pop(name) for name in ("source", "train_files", "heldout_files")} | {"name": "web"}
    (tmp_path / "rows.jsonl").write_text('{"text": "A ship."}\n{"text": null}\n')
    rows = {"name": "rows", "train_files": [str(tmp_path / "rows.jsonl")], "max_bad_rows": 1}
    data["sources"] = [web, web | rows]
    Path(config).write_text(json.dumps(described))  # JSON is YAML without aliases


def test_prepare_data_shows_each_source_and_counts_its_bad_rows(config, monkeypatch, capsys, tmp_path):
    of_two_sources(config, tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config])
    prepare_data.main()
    out = capsys.readouterr().out
    assert re.search(r"tokens of web: \S+$", out, re.M)
    assert re.search(r"tokens of rows: \S+, 1 bad rows$", out, re.M)


def test_one_source_of_a_mixture_is_prepared_alone(config, monkeypatch, capsys, tmp_path):
    of_two_sources(config, tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--source", "rows"])
    prepare_data.main()
    assert "tokens of web" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("tokens-*/"))) == 1
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--source", "row"])
    with pytest.raises(UserError, match=r"--source row: no such name in data\.sources; give one of: web, rows$"):
        prepare_data.main()


def test_a_tokenizer_alone_is_saved_and_loads(config, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--tokenizer", str(tmp_path / "out")])
    prepare_data.main()
    assert load_tokenizer(tmp_path / "out").vocab_size == 320
    assert capsys.readouterr().out.startswith("tokenizer: 320 tokens, sha256 ")
    assert not list((tmp_path / "cache").glob("tokens*"))


def test_a_folder_that_can_not_be_written_is_refused(config, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--tokenizer", str(tmp_path / "train.txt")])
    with pytest.raises(UserError, match=r"--tokenizer .*train\.txt: can't be written: File exists"):
        prepare_data.main()


def test_too_few_workers_are_refused(config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--workers", "0"])
    with pytest.raises(UserError, match="--workers is 0; give at least 1, or leave it out for one a core"):
        prepare_data.main()


def test_verify_names_the_files_that_have_changed(config, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(folders, "SETTLED_NS", -(10**12))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--verify"])
    prepare_data.main()
    assert capsys.readouterr().out == "2 files were read; none has changed\n"
    (tmp_path / "train.txt").write_text("Another text.\n")
    with pytest.raises(
        UserError, match=r"1 of 2 files have changed since they were last read;[^/]*\n  /.*/train\.txt$"
    ):
        prepare_data.main()


def test_statistics_are_a_table_a_file_and_a_picture(config, monkeypatch, capsys, tmp_path):
    command = ["prepare_data.py", config, "data.packing=best_fit", "--stats", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    prepare_data.main()
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert written["limits"] == {"W": 4, "R": 96, "seq_len": 512}
    train = written["sources"]["files, train"]
    assert train["longer"]["seq_len"] == train["total"]
    tokens, padding = train["total"]["tokens"], train["packings"]["best_fit"]["padding"]
    assert tokens / (1 - padding) / 512 == pytest.approx(-(-tokens // 512))  # one document, so whole rows and a rest
    assert f"best_fit: {padding:.2%} of the training rows is padding" in out
    for shown in ("documents longer than R = 96", "100.00%", "documents cut by best_fit", "equal to an earlier one"):
        assert shown in out
    assert (tmp_path / "out" / "statistics.png").read_bytes().startswith(b"\x89PNG")


def test_a_stack_with_full_layers_has_no_reach_to_compare_with(config):
    settings = load_settings(config, ["model.layers=[{kind: full}, {kind: sliding, window: 3}]"])
    assert prepare_data.named_lengths(settings) == {"W": 3, "seq_len": 512}


def test_statistics_that_can_not_be_written_are_refused(config, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--stats", "--out", str(tmp_path / "train.txt")])
    with pytest.raises(UserError, match=r"--out .*train\.txt: can't be written: File exists; name another folder"):
        prepare_data.main()


def test_a_folder_for_no_statistics_is_refused(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, "--out", "x"])
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main()
    assert "--out is the folder of the statistics; add --stats" in capsys.readouterr().err


def test_prepare_data_says_how_far_answers_stand_behind_their_instruction(config, monkeypatch, capsys, tmp_path):
    told = [("the sea was calm and a ship came slowly over"[: 3 + i], f"calm {i}") for i in range(40)]
    roles = "user", "assistant"
    rows = [{"messages": [{"role": r, "content": text} for r, text in zip(roles, both)]} for both in told]
    for split, some in (("train", rows[:30]), ("heldout", rows[30:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    overrides = [f"data.{split}_files=[{tmp_path}/{split}.jsonl]" for split in ("train", "heldout")]
    overrides += [
        "data.messages_column=messages",
        f"data.chat_template={tmp_path}/chat.jinja",
        "model.sliding_window=4",
    ]
    overrides += ["data.tokenizer.vocab_size=335", "model.num_hidden_layers=5"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", config, *overrides, "--stats", "--out", str(out)])
    prepare_data.main()
    shown = capsys.readouterr().out
    figures = json.loads((out / "statistics.json").read_text())
    assert figures["limits"] == {"W": 4, "R": 15, "seq_len": 512}
    far = figures["sources"]["files, train"]["answers"]
    assert (far["answers"], far["without_instruction"], far["with_system"]) == (30, 0, 0)
    assert far["instruction"]["W"] == 1.0  # the prompt for the answer alone is longer
    assert 0 < far["instruction"]["R"] < 1
    assert f"For {far['instruction']['R']:.1%} of the answers it is farther back than R = 15 tokens" in shown
    assert "best_fit cuts only conversations longer than a row" in shown
