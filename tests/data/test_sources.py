"""Sources: files of each kind, hub data sets, what is held out, and every refusal."""

import csv
import gzip
import json
import os
import time

import datasets
import pytest

from data import folders
from data.sources import HELDOUT_EVERY, altered_files, documents, source_fingerprint, text_size
from model.errors import UserError

SENTENCES = [f"Sentence {i} of a text." for i in range(40)]


def texts(run, split="train"):
    return [document.text for document in documents(run.data, split)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.fixture
def rows():
    return [{"body": sentence, "n": i} for i, sentence in enumerate(SENTENCES)]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.DictWriter(file, rows[0]).writerows([dict(zip(rows[0], rows[0])), *rows])
    return str(path)


def write_gzip(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_jsonl, "rows [1].jsonl"), (write_jsonl, "rows.JSONL"), (write_jsonl, "rows.ndjson"),
     (write_gzip, "rows.jsonl.gz"), (write_parquet, "rows [1].parquet"), (write_csv, "rows [1].csv")],
)  # fmt: skip
def test_each_row_of_a_table_is_a_document(write, name, rows, make_settings, tmp_path):
    run = make_settings(train_files=[write(tmp_path / name, rows)], text_column="body")
    assert texts(run) == SENTENCES
    assert [document.name for document in documents(run.data, "train")][:2] == [f"{name}#0", f"{name}#1"]


def test_globs_are_read_in_order_and_text_files_whole(make_settings, tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"part-{name}.txt").write_text(f"{name}\r\n\n {name}\n", newline="")
    assert texts(make_settings(train_files=[str(tmp_path / "part-*.txt")])) == [f"{n}\n\n {n}\n" for n in "abc"]


def test_empty_documents_are_left_out(make_settings, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": " \n"}, {"text": "two"}])
    assert texts(make_settings(train_files=[file])) == ["one", "two"]


def test_an_empty_shard_has_no_documents(make_settings, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    empty = [str(tmp_path / "empty.jsonl"), str(tmp_path / "empty.jsonl.gz")]
    assert texts(make_settings(train_files=[*empty, file])) == ["one"]
    with pytest.raises(UserError, match=r"data\.train_files .*empty\.jsonl.* has no text"):
        texts(make_settings(train_files=empty))


def test_cells_of_a_csv_file_are_text_as_written(make_settings, tmp_path):
    (tmp_path / "rows.csv").write_text('text,n\nNA,1\n,2\n"two\nlines",3\n')
    assert texts(make_settings(train_files=[str(tmp_path / "rows.csv")])) == ["NA", "two\nlines"]


def test_without_heldout_files_every_twentieth_document_is_held_out_whole(rows, make_settings, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_settings(train_files=[file], heldout_files=[], text_column="body")
    assert texts(run, "heldout") == [SENTENCES[19], SENTENCES[39]]
    assert sorted(texts(run) + texts(run, "heldout")) == sorted(SENTENCES)
    assert source_fingerprint(run.data, "train") != source_fingerprint(run.data, "heldout")


def test_too_few_documents_to_hold_some_out_are_refused(make_settings):
    with pytest.raises(
        UserError, match=rf"data\.heldout_files \[\] has no text; name .*, or {HELDOUT_EVERY} documents in"
    ):
        texts(make_settings(heldout_files=[]), "heldout")


@pytest.mark.parametrize("setting", ["train_files", "heldout_files"])
@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere-*.jsonl"])
def test_a_missing_file_is_refused(setting, name, make_settings):
    run = make_settings(**{setting: [name]})
    with pytest.raises(UserError, match=rf"data\.{setting}: no such file: '{name[:7]}.*; paths are relative"):
        texts(run, setting.removesuffix("_files"))


def test_no_files_at_all_are_refused(make_settings):
    with pytest.raises(UserError, match=r"data\.train_files \[\] has no text; name another with text$"):
        texts(make_settings(train_files=[]))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_corpus_without_text_is_refused(split, make_settings, tmp_path):
    (tmp_path / f"{split}.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=rf"data\.{split}_files .*{split}\.txt.* has no text; name another with text$"):
        texts(make_settings(), split)


def test_a_missing_column_is_refused(rows, make_settings, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"data\.text_column is 'text'; row 0 of 'rows\.jsonl' .* only \['body', 'n'\]"):
        texts(make_settings(train_files=[file]))


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", b'{"text": \n'), ("x.jsonl.gz", b"no"), ("x.parquet", b"PAR0"), ("x.txt", b"\xff"), ("x.csv", b"")],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(name, content, make_settings, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}' can't be read"):
        texts(make_settings(train_files=[str(tmp_path / name)]))


@pytest.fixture
def hub_folder(rows, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    write_parquet(folder / "train.parquet", rows[:30])
    write_parquet(folder / "validation.parquet", rows[30:])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_by_its_splits(streaming, hub_folder, make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hub = {"name": str(hub_folder), "text_column": "body", "streaming": streaming}
    run = make_settings(source="hub", hub=hub)
    assert texts(run) == SENTENCES[:30]
    assert texts(run, "heldout") == SENTENCES[30:]
    assert texts(make_settings(source="hub", hub=hub | {"max_documents": 3})) == SENTENCES[:3]


def test_a_hub_folder_is_known_by_its_content(hub_folder, rows, make_settings):
    run = make_settings(source="hub", hub={"name": str(hub_folder)})
    before = source_fingerprint(run.data, "train")
    assert source_fingerprint(run.data, "train") == before
    write_parquet(hub_folder / "train.parquet", rows[:5])
    assert source_fingerprint(run.data, "train") != before


def test_a_hub_data_set_that_is_not_there_is_refused(make_settings, tmp_path, hub_folder):
    with pytest.raises(UserError, match=r"data\.hub\.name '.*hub', split 'test' can't be loaded: .*; check the name"):
        texts(make_settings(source="hub", hub={"name": str(hub_folder), "train_split": "test", "streaming": True}))


def test_a_file_is_known_by_its_content_not_its_name_or_time(make_settings, tmp_path):
    run = make_settings()
    before = source_fingerprint(run.data, "train")
    (tmp_path / "train.txt").rename(tmp_path / "other.txt")
    moved = make_settings(train_files=[str(tmp_path / "other.txt")])
    assert source_fingerprint(moved.data, "train") == before
    (tmp_path / "other.txt").write_text("Changed.")
    assert source_fingerprint(moved.data, "train") != before


@pytest.fixture
def remembering(monkeypatch):
    """Files of any age are remembered."""
    monkeypatch.setattr(folders, "SETTLED_NS", -(10**12))


def test_an_unchanged_file_is_read_once(make_settings, monkeypatch, remembering):
    run = make_settings()
    before = source_fingerprint(run.data, "train")
    monkeypatch.setattr(folders, "sha256_of", None)
    assert source_fingerprint(run.data, "train") == before


def test_a_change_that_keeps_size_and_time_is_noticed(make_settings, tmp_path, remembering):
    run, file = make_settings(), tmp_path / "train.txt"
    before, times = source_fingerprint(run.data, "train"), file.stat()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    file.write_text(file.read_text().swapcase())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source_fingerprint(run.data, "train") != before


def test_a_file_that_has_just_changed_is_not_remembered(make_settings, tmp_path):
    source_fingerprint(make_settings().data, "train")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": '])
def test_damaged_hashes_are_made_again(damage, make_settings, tmp_path, remembering):
    run = make_settings()
    before = source_fingerprint(run.data, "train")
    (tmp_path / "cache" / "hashes.json").write_text(damage)
    assert source_fingerprint(run.data, "train") == before


def test_hashes_of_other_files_are_forgotten_oldest_first(make_settings, tmp_path, monkeypatch, remembering):
    monkeypatch.setattr(folders, "FORGET_AFTER", 1)
    for name in "abc":
        (tmp_path / name).write_text(name)
        source_fingerprint(make_settings(train_files=[str(tmp_path / name)]).data, "train")
    assert list(folders.remembered(tmp_path / "cache" / "hashes.json")) == [str(tmp_path / name) for name in "bc"]


def test_reading_every_file_again_finds_the_one_that_differs(make_settings, tmp_path, remembering):
    run, memory = make_settings(), tmp_path / "cache" / "hashes.json"
    before = source_fingerprint(run.data, "train")
    assert altered_files(run.data) == (2, [])
    memory.write_text(memory.read_text().replace(folders.sha256_of(tmp_path / "train.txt"), "0" * 64))
    assert source_fingerprint(run.data, "train") != before
    assert altered_files(run.data) == (2, [tmp_path / "train.txt"])
    assert source_fingerprint(run.data, "train") == before


def test_the_size_of_text_is_known_for_text_files_alone(make_settings, tmp_path):
    size = (tmp_path / "train.txt").stat().st_size
    assert text_size(make_settings().data, "train") == size
    assert text_size(make_settings(heldout_files=[]).data, "heldout") == round(size / HELDOUT_EVERY)
    (tmp_path / "rows.jsonl").touch()
    assert text_size(make_settings(train_files=[str(tmp_path / "rows.jsonl")]).data, "train") is None
    assert text_size(make_settings(source="novels").data, "train") is None
