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
