"""The token cache: what it holds, when it is made again, and that it is never half there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import encoding, progress
from data import token_store as packing
from data.batches import text_batch
from data.folders import written_whole
from data.sources import SPLITS, documents, source_fingerprint
from data.token_store import open_tokens, prepare_tokens, token_folder
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
    assert (len(train.document_starts), len(heldout.document_starts)) == (2, 1)
    ends = [*train.document_starts[1:], len(train.tokens)]
    for name, start, end in zip(["train.txt", "more.txt"], train.document_starts, ends):
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
    assert len(before) == 5
    prepared(make_settings())
    assert cache_files(tmp_path) == before


@pytest.mark.parametrize(
    "damage", ["cut", "cut starts", "remove", "index", "index is not an object", "index of old", "no index"]
)
def test_a_damaged_cache_is_made_again(damage, make_settings, tmp_path):
    train, _ = prepared(make_settings())
    expected = np.array(train.tokens)
    del train
    (file,) = tmp_path.glob("cache/tokens-*/train.bin")
    index, content = file.with_name("index.json"), file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "cut starts":
        file.with_suffix(".starts").write_bytes(b"")
    elif damage == "remove":
        file.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-20])
    elif damage == "index is not an object":
        index.write_text("[1]")
    elif damage == "index of old":  # older versions listed all starts in it
        index.write_text(json.dumps({split: {"dtype": "<u2", "tokens": 2, "starts": [0]} for split in SPLITS}))
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
    assert len(list(tmp_path.glob("cache/tokens-*/"))) == 2


@pytest.fixture
def many(make_settings, tmp_path, monkeypatch):
    """Settings with 300 short documents, which are encoded and saved in small parts."""
    lines = (tmp_path / "train.txt").read_text().splitlines()
    for i in range(300):
        (tmp_path / f"many-{i:03}.txt").write_text(f"{lines[i % len(lines)]}\n")
    monkeypatch.setattr(encoding, "BATCH", 500)
    monkeypatch.setattr(packing, "SAVE_EVERY", 2000)
    return make_settings(train_files=[str(tmp_path / "many-*.txt")])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def undisturbed(run, cache):
    run = run.model_copy(update={"data": run.data.model_copy(update={"cache_dir": str(cache)})})
    return content(token_folder(run, prepare_tokenizer(run), workers=1))


def test_an_interrupted_write_goes_on_with_the_first_document_that_is_not_saved(many, monkeypatch, tmp_path):
    def interrupted(data, split):
        yield from islice(documents(data, split), 200)
        raise KeyboardInterrupt

    expected, tokenizer = undisturbed(many, tmp_path / "other"), prepare_tokenizer(many)
    monkeypatch.setattr(packing, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_folder(many, tokenizer, workers=1)
    assert {path.suffix for path in tmp_path.glob("cache/tokens-*")} == {".part", ".lock"}
    monkeypatch.setattr(packing, "documents", documents)
    again = []
    monkeypatch.setattr(type(tokenizer), "encode", encode_noted(type(tokenizer).encode, again))
    assert content(token_folder(many, tokenizer, workers=1)) == expected
    assert 102 <= len(again) < 150  # of the last 100, the one held out, and what was encoded but not saved
    assert {path.suffix for path in tmp_path.glob("cache/tokens-*")} == {"", ".lock"}


def encode_noted(encode, texts):
    return lambda tokenizer, text: texts.append(text) or encode(tokenizer, text)


KILLED = """
import os, signal, sys
from data import encoding, token_store
from data.tokenizer import prepare_tokenizer
from training.settings.schema import Settings

encoding.BATCH, token_store.SAVE_EVERY = 500, 2000
calls = 0
def killed(call):
    def counted(*args):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return counted
settings = Settings.model_validate_json(sys.argv[1])
tokenizer = prepare_tokenizer(settings)
os.fsync, os.replace = killed(os.fsync), killed(os.replace)
token_store.token_folder(settings, tokenizer, 1)
"""


def test_a_killed_preparation_ends_with_the_same_bytes(many, tmp_path):
    """Each start is killed at its nth call of fsync or replace, and gets a little farther than the one before."""
    expected, tokenizer = undisturbed(many, tmp_path / "other"), prepare_tokenizer(many)
    for calls in (2, 4, 7):
        command = [sys.executable, "-c", KILLED, many.model_dump_json(), str(calls)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert content(token_folder(many, tokenizer)) == expected


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(workers, many, tmp_path):
    expected, tokenizer = undisturbed(many, tmp_path / "other"), prepare_tokenizer(many)
    assert content(token_folder(many, tokenizer, workers)) == expected


def test_a_killed_worker_is_reported(monkeypatch):
    monkeypatch.setattr(encoding, "FEW", 1)
    tokenizer = SimpleNamespace(vocab_size=2, bos_id=0, eos_id=1, encode=exec)
    with pytest.raises(UserError, match=r"was killed, perhaps for lack of memory; run the same command again"):
        list(encoding.encoded(["import os; os._exit(1)"], tokenizer, 2))


def test_a_program_without_a_guarded_main_ends_with_the_reason(many, tmp_path):
    settings = f"settings = Settings.model_validate_json({many.model_dump_json()!r})\n"
    call = "token_store.token_folder(settings, prepare_tokenizer(settings), 2)\n"
    (tmp_path / "program.py").write_text(KILLED.partition("calls = 0")[0] + settings + call)
    root = str(Path(packing.__file__).parents[1])
    command, env = [sys.executable, str(tmp_path / "program.py")], os.environ | {"PYTHONPATH": root}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert 'put the program under `if __name__ == "__main__":`' in result.stderr


def test_little_text_starts_no_workers(make_settings, monkeypatch):
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", None)
    run = make_settings()
    token_folder(run, prepare_tokenizer(run), workers=2)


def test_progress_off_a_terminal_is_a_line(capsys, monkeypatch):
    times = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with progress.encoding_progress("train", 200_000_000, 40_000_000) as advance:
        monkeypatch.setattr(progress, "Progress", None)
        advance(60_000_000, 1)
        advance(80_000_000, 2000)
    assert capsys.readouterr().err == "train: 2,000 documents, 80 MB, 2.0 MB/s, about 1.0 minutes left\n"


def test_a_complete_store_opens_without_the_text(make_settings, tmp_path):
    run = make_settings()
    tokenizer = prepare_tokenizer(run)
    folder = token_folder(run, tokenizer)
    (tmp_path / "train.txt").unlink()
    train, heldout = open_tokens(folder, tokenizer)
    assert (len(train.document_starts), len(heldout.document_starts)) == (1, 1)
    assert heldout.source_sha256 == source_fingerprint(run.data, "heldout") != train.source_sha256


def test_a_store_of_a_million_documents_is_mapped_not_read(tokenizer, tmp_path):
    index = {"dtype": "<u2", "tokens": 200_000_000, "documents": 1_000_000, "source_sha256": ""}
    (tmp_path / "index.json").write_text(json.dumps({"train": index, "heldout": index}))
    for split in ("train", "heldout"):
        (np.arange(1_000_000, dtype="<i8") * 200).tofile(tmp_path / f"{split}.starts")
        with (tmp_path / f"{split}.bin").open("wb") as file:
            file.truncate(400_000_000)  # a hole: no blocks on disk
    tracemalloc.start()
    train, _ = open_tokens(tmp_path, tokenizer)
    batch = text_batch(train, 0, 0, range(4), 512, rows_per_step=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.documents.max() in (2, 3)
    assert peak < 10e6, "the order of the rows takes 3 MB"


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
