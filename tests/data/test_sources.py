"""Sources: files of each kind, hub data sets, what is held out, and every refusal."""

import csv
import gzip
import json
import os
import time

import datasets
import pyarrow
import pytest

from data import folders, sources
from data.sources import altered_files, split_of
from model.errors import UserError

SENTENCES = [f"Sentence {i} of a text." for i in range(40)]


def texts(run, split="train"):
    (source,) = run.data.mixture
    return list(sources.texts(source, split))


def source_fingerprint(data, split):
    (source,) = data.mixture
    return sources.source_fingerprint(source, split, data.cache_dir)


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


def write_zst(path, rows):
    """In two frames, as parallel compressors write."""
    lines = [json.dumps(row) + "\n" for row in rows]
    codec = pyarrow.Codec("zstd")
    path.write_bytes(b"".join(codec.compress("".join(half).encode(), asbytes=True) for half in (lines[:9], lines[9:])))
    return str(path)


def write_list(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def write_list_after_mark(path, rows):
    path.write_text("\n" + json.dumps(rows), encoding="utf-8-sig")
    return str(path)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_jsonl, "rows [1].jsonl"), (write_jsonl, "rows.JSONL"), (write_jsonl, "rows.ndjson"),
     (write_gzip, "rows.jsonl.gz"), (write_zst, "rows.jsonl.zst"), (write_list, "rows.json"),
     (write_jsonl, "rows.json"), (write_list_after_mark, "rows.json"),
     (write_parquet, "rows [1].parquet"), (write_csv, "rows [1].csv")],
)  # fmt: skip
def test_each_row_of_a_table_is_a_document(write, name, rows, make_settings, tmp_path):
    run = make_settings(train_files=[write(tmp_path / name, rows)], text_column="body")
    assert texts(run) == SENTENCES


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


def by_hash(make_settings, *files, share=0.3):
    run = make_settings(train_files=list(map(str, files)), heldout_files=[], text_column="body", heldout_share=share)
    return {split: texts(run, split) for split in ("train", "heldout")}


def test_without_heldout_files_a_share_of_the_documents_is_held_out(make_settings, tmp_path):
    many = [{"body": f"Document {i}."} for i in range(2000)]
    file = write_jsonl(tmp_path / "rows.jsonl", many)
    split = by_hash(make_settings, file, share=0.1)
    assert sorted(split["train"] + split["heldout"]) == sorted(row["body"] for row in many)
    assert 150 < len(split["heldout"]) < 250
    run = make_settings(train_files=[file], heldout_files=[])
    assert source_fingerprint(run.data, "train") != source_fingerprint(run.data, "heldout")
    assert source_fingerprint(make_settings(train_files=[file], heldout_files=[], heldout_share=0.1).data, "train") != (
        source_fingerprint(run.data, "train")
    )


def test_another_file_another_name_and_another_order_move_no_document(rows, make_settings, tmp_path):
    first, second = (write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in (("b", rows[:25]), ("c", rows[25:])))
    before = by_hash(make_settings, first)
    assert len(before["heldout"]) >= 2
    more = by_hash(make_settings, second, first)
    renamed = write_parquet(tmp_path / "renamed.parquet", rows[:25][::-1])
    other = by_hash(make_settings, renamed)
    for split in ("train", "heldout"):
        assert set(before[split]) <= set(more[split])
        assert sorted(other[split]) == sorted(before[split])


def test_a_larger_share_holds_out_the_same_documents_and_more(rows, make_settings, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    few, many = (set(by_hash(make_settings, file, share=share)["heldout"]) for share in (0.3, 0.6))
    assert few < many


def test_equal_documents_are_on_one_side(rows, make_settings, tmp_path):
    split = by_hash(make_settings, write_jsonl(tmp_path / "rows.jsonl", rows * 3))
    assert not set(split["train"]) & set(split["heldout"])


def test_the_side_of_a_document_never_changes_silently():
    assert [i for i in range(40) if split_of(f"Document {i}".encode(), 0.1) == "heldout"] == [1, 6, 13, 31]


def test_too_few_documents_to_hold_some_out_are_refused(make_settings):
    with pytest.raises(
        UserError,
        match=r"^data\.heldout_files \[\] has no text; name another with text, or raise data\.heldout_share, "
        r"which is 0\.001, or data\.heldout_megabytes, which is 64$",
    ):
        texts(make_settings(heldout_files=[], heldout_share=0.001), "heldout")


def test_a_single_document_that_is_held_out_leaves_none_to_train_on(make_settings):
    with pytest.raises(UserError, match=r"train\.txt'\] has no text; .*, or lower data\.heldout_share, which is"):
        texts(make_settings(heldout_files=[], heldout_share=0.99))


def test_settings_of_a_named_source_are_named_with_it(make_settings):
    run = make_settings(source="novels", train_files=[], heldout_files=[], sources=[
        {"name": "web", "source": "files", "train_files": ["nowhere.txt"]}])  # fmt: skip
    with pytest.raises(UserError, match=r"^data\.sources 'web': train_files: no such file: 'nowhere\.txt'"):
        texts(run)


def test_a_held_out_file_that_is_trained_on_is_refused(make_settings, tmp_path):
    with pytest.raises(
        UserError, match=r"^data\.heldout_files: '/.*/heldout\.txt' is one of data\.train_files too; leave"
    ):
        texts(make_settings(train_files=[str(tmp_path / "*.txt")]))


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


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize(
    ("column", "expected"), [("text", "top"), ("a.b", "inner"), ("a.c.d", "deep"), ("x.y", "a dot in its name")]
)
def test_a_column_may_be_nested_or_have_a_dot_in_its_name(write, column, expected, make_settings, tmp_path):
    row = {"text": "top", "a": {"b": "inner", "c": {"d": "deep"}}, "x.y": "a dot in its name", "x": {"y": "nested"}}
    file = write(tmp_path / f"rows.{write.__name__.removeprefix('write_')}", [row])
    assert texts(make_settings(train_files=[file], text_column=column)) == [expected]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b'[{"text": "a"}'),
        ("x.json", b"[" * 100_000),
        ("x.jsonl.gz", b"no"),
        ("x.jsonl.zst", b"no"),
        ("x.parquet", b"PAR0"),
        ("x.txt", b"\xff"),
        ("x.csv", b""),
        ("x.csv", b"text\n\xff\n"),
        ("x.txt.gz", gzip.compress(b"The sea.", mtime=0)[:-9]),
        ("x.txt.zst", pyarrow.Codec("zstd").compress(b"The sea was calm. " * 99, asbytes=True)[:-9]),
    ],
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


def test_without_a_heldout_split_a_share_of_the_train_split_is_held_out(
    hub_folder, make_settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hub = {"name": str(hub_folder), "text_column": "body", "heldout_split": None}
    run = make_settings(source="hub", hub=hub, heldout_share=0.3)
    assert len(texts(run, "heldout")) >= 2
    assert sorted(texts(run) + texts(run, "heldout")) == sorted(SENTENCES[:30])


def test_a_hub_folder_is_known_by_its_content(hub_folder, rows, make_settings):
    run = make_settings(source="hub", hub={"name": str(hub_folder)})
    before = source_fingerprint(run.data, "train")
    assert source_fingerprint(run.data, "train") == before
    write_parquet(hub_folder / "train.parquet", rows[:5])
    assert source_fingerprint(run.data, "train") != before


def test_a_hub_data_set_that_is_not_there_is_refused(make_settings, tmp_path, hub_folder):
    with pytest.raises(UserError, match=r"data\.hub\.name '.*hub', split 'test' can't be read: .*; check the name"):
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


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": ', '{"%s": 3}', '{"%s": []}'])
def test_damaged_hashes_are_made_again(damage, make_settings, tmp_path, remembering):
    run = make_settings()
    before = source_fingerprint(run.data, "train")
    (tmp_path / "cache" / "hashes.json").write_text(damage.replace("%s", str(tmp_path / "train.txt")))
    assert source_fingerprint(run.data, "train") == before


def test_hashes_that_another_process_adds_meanwhile_are_kept(make_settings, tmp_path, monkeypatch, remembering):
    memory, sha256_of = tmp_path / "cache" / "hashes.json", folders.sha256_of

    def slow(path):
        monkeypatch.setattr(folders, "sha256_of", sha256_of)
        folders.file_hashes([tmp_path / "heldout.txt"], memory)
        return sha256_of(path)

    monkeypatch.setattr(folders, "sha256_of", slow)
    folders.file_hashes([tmp_path / "train.txt"], memory)
    assert list(folders.remembered(memory)) == [str(tmp_path / name) for name in ("heldout.txt", "train.txt")]


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


def test_a_part_is_read_from_any_row_on(hub_folder, rows, make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    run = make_settings(train_files=[write_csv(tmp_path / "rows.csv", rows)], text_column="body")
    hub = make_settings(source="hub", hub={"name": str(hub_folder), "text_column": "body", "max_documents": 20})
    for settings, end in ((run, 40), (hub, 20)):
        (part, *_) = sources.parts(settings.data.mixture[0])
        assert list(part.rows(7)) == SENTENCES[7:end]
        assert list(part.rows(end)) == []
