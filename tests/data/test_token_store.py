"""The token cache: what it holds, when it is made again, and that it is never half there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import token_store as packing
from data.folders import written_whole
from data.sources import documents
from data.token_store import prepare_tokens
from data.tokenizer import prepare_tokenizer
from model.errors import UserError


def prepared(run):
    return prepare_tokens(run, prepare_tokenizer(run))


def cache_files(tmp_path):
    return {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/tokens-*/*")}


def test_stores_hold_every_document_framed_and_in_order(make_settings, tmp_path):
    (tmp_path / "more.txt").write_text("The ship came again.\n")
    run = make_settings(train_files=[str(tmp_path / name) for name in ("train.txt", "more.txt")])
    tokenizer = prepare_tokenizer(run)
    train, heldout = prepare_tokens(run, tokenizer)
    assert (train.names, heldout.names) == (["train.txt", "more.txt"], ["heldout.txt"])
    ends = [*train.document_starts[1:], len(train.tokens)]
    for name, start, end in zip(train.names, train.document_starts, ends):
        assert (train.tokens[start], train.tokens[end - 1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(train.tokens[start + 1 : end - 1]) == (tmp_path / name).read_text()
    assert train.tokens.dtype == np.uint16


def test_bytes_of_a_store_are_the_bytes_of_the_text(make_settings, tmp_path):
    (tmp_path / "heldout.txt").write_text("Été – 漢字 🙂\n\n  The sea\twas calm.\n", encoding="utf-8")
    _, heldout = prepared(make_settings())
    assert heldout.bytes_of(0, len(heldout.tokens)) == (tmp_path / "heldout.txt").stat().st_size
    assert (
        heldout.bytes_of(0, 9) + heldout.bytes_of(9, len(heldout.tokens)) == (tmp_path / "heldout.txt").stat().st_size
    )


def test_a_sound_cache_is_not_written_again(make_settings, tmp_path):
    prepared(make_settings())
    before = cache_files(tmp_path)
    assert len(before) == 3
    prepared(make_settings())
    assert cache_files(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "remove", "index", "index is not an object", "no index"])
def test_a_damaged_cache_is_made_again(damage, make_settings, tmp_path):
    train, _ = prepared(make_settings())
    expected = np.array(train.tokens)
    del train
    (file,) = tmp_path.glob("cache/tokens-*/train.bin")
    index, content = file.with_name("index.json"), file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-20])
    elif damage == "index is not an object":
        index.write_text("[1]")
    else:
        index.unlink()
    np.testing.assert_array_equal(prepared(make_settings())[0].tokens, expected)


def test_changed_text_is_packed_anew(make_settings, tmp_path):
    prepared(make_settings())
    (tmp_path / "heldout.txt").write_text("Another text.\n")
    _, heldout = prepared(make_settings())
    assert heldout.bytes_of(0, len(heldout.tokens)) == 14


def test_another_tokenizer_is_packed_anew(make_settings):
    first, _ = prepared(make_settings())
    second, _ = prepared(make_settings(tokenizer={"vocab_size": 330}))
    assert len(second.tokens) > len(first.tokens)


def test_another_code_version_is_packed_anew(make_settings, monkeypatch, tmp_path):
    prepared(make_settings())
    monkeypatch.setattr(packing, "VERSION", packing.VERSION + 1)
    prepared(make_settings())
    assert len(list(tmp_path.glob("cache/tokens-*"))) == 2


def test_an_interrupted_write_leaves_nothing_behind(make_settings, monkeypatch, tmp_path):
    def interrupted(data, split):
        yield from documents(data, "train")
        if split == "heldout":
            raise KeyboardInterrupt

    run = make_settings()
    tokenizer = prepare_tokenizer(run)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(packing, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(run, tokenizer)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_process_that_was_faster_is_no_fault(tmp_path):
    with written_whole(tmp_path / "cache") as ours:
        (ours / "file").write_text("the same")
        with written_whole(tmp_path / "cache") as theirs:
            (theirs / "file").write_text("the same")
        assert (tmp_path / "cache" / "file").exists()
    _put_both(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache" / "file").read_text() == "the same"


def _put_both(tmp_path):
    """The other process renames its folder in the moment after ours looked."""
    with pytest.MonkeyPatch.context() as patch, written_whole(tmp_path / "cache") as ours:
        (ours / "file").write_text("the same")
        patch.setattr(Path, "exists", lambda path: False)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_settings):
    for size in (400, 512):
        prepared(make_settings(vocab_size=size))
    with pytest.raises(UserError, match=r"tokenizer has 400 tokens but model\.vocab_size is 399; leave"):
        prepared(make_settings(vocab_size=399))


def test_an_unwritable_cache_folder_is_refused(make_settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"'.*file/cache' can't be written \(Not a directory\); .*data\.cache_dir"):
        prepared(make_settings(cache_dir=str(tmp_path / "file" / "cache")))


def test_data_imports_nothing_of_training_or_evaluation():
    files = Path(packing.__file__).parent.rglob("*.py")
    assert [p.name for p in files if re.search(r"^\s*(from|import) (training|eval)\b", p.read_text(), re.M)] == []


def test_settings_tasks_and_sources_are_imported_without_torch():
    modules = "data.sources, data.token_store, data.tokenizer, data.tasks.layout, training.settings.config_file"
    heavy = "{'torch', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert not {heavy}, {heavy}"], check=True)
