"""The token store: what it holds, reading across its shards, and when it is made again."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import token_store
from data.batches import text_batch
from data.folders import sha256_of, written_whole
from data.mixture import ConcatRows, Mixture, Shares
from data.sources import SPLITS, source_fingerprint
from data.token_store import ShardFiles, TokenStore, open_tokens, token_folders
from data.tokenizer import prepare_tokenizer
from model.errors import UserError


def prepared(run):
    """The stores of the one source, by split."""
    tokenizer = prepare_tokenizer(run)
    return open_tokens(token_folders(run, tokenizer)[""], tokenizer)


def all_tokens(store):
    return store.read(0, store.n_tokens)[0]


def cache_files(tmp_path):
    return {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/tokens-*/*")}


def test_stores_hold_every_document_framed_and_in_order(make_settings, tmp_path):
    (tmp_path / "more.txt").write_text("The ship came again.\n")
    run = make_settings(train_files=[str(tmp_path / name) for name in ("train.txt", "more.txt")])
    tokenizer, stores = prepare_tokenizer(run), prepared(run)
    train, heldout = stores["train"], stores["heldout"]
    assert (train.n_documents, heldout.n_documents) == (2, 1)
    for name, (start, end) in zip(["train.txt", "more.txt"], train.documents(), strict=True):
        first, *content, last = train.read(start, end - start)[0]
        assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(content) == (tmp_path / name).read_text()
    assert train.shard(0).tokens.dtype == np.uint16


def test_bytes_of_a_store_are_the_bytes_of_the_text(make_settings, tmp_path):
    (tmp_path / "heldout.txt").write_text("Été – 漢字 🙂\n\n  The sea\twas calm.\n", encoding="utf-8")
    heldout, n_bytes = prepared(make_settings())["heldout"], (tmp_path / "heldout.txt").stat().st_size
    assert heldout.n_bytes == heldout.bytes_of(0, heldout.n_tokens) == n_bytes
    assert heldout.bytes_of(0, 9) + heldout.bytes_of(9, heldout.n_tokens) == n_bytes


def test_a_sound_cache_is_not_written_again(make_settings, tmp_path):
    prepared(make_settings())
    before = cache_files(tmp_path)
    assert len(before) == 5
    prepared(make_settings())
    assert cache_files(tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "cut starts",
        "remove",
        "index",
        "index is not an object",
        "shard is not an object",
        "index of old",
        "no index",
    ],
)
def test_a_damaged_cache_is_made_again(damage, make_settings, tmp_path):
    expected = all_tokens(prepared(make_settings())["train"])
    token_store._open_shard.cache_clear()  # or the old files are read
    (file,) = tmp_path.glob("cache/tokens-*/train-00000.bin")
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
    elif damage == "shard is not an object":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"shards": [[1]]}))
    elif damage == "index of old":  # older versions listed all starts in it
        index.write_text(json.dumps({split: {"dtype": "<u2", "tokens": 2, "starts": [0]} for split in SPLITS}))
    else:
        index.unlink()
    np.testing.assert_array_equal(all_tokens(prepared(make_settings())["train"]), expected)


def test_changed_text_is_packed_anew(make_settings, tmp_path):
    prepared(make_settings())
    (tmp_path / "heldout.txt").write_text("Another text.\n")
    assert prepared(make_settings())["heldout"].n_bytes == 14


def test_another_tokenizer_is_packed_anew(make_settings):
    first = prepared(make_settings())["train"]
    assert prepared(make_settings(tokenizer={"vocab_size": 330}))["train"].n_tokens > first.n_tokens


def test_another_code_version_is_packed_anew(make_settings, monkeypatch, tmp_path):
    prepared(make_settings())
    monkeypatch.setattr(token_store, "VERSION", token_store.VERSION + 1)
    prepared(make_settings())
    assert len(list(tmp_path.glob("cache/tokens-*/"))) == 2


def in_shards(lengths, cuts, folder):
    """A store of documents of `lengths` tokens, in shards that end after `cuts` documents, and its tokens."""
    tokens, shards, sizes = np.arange(sum(lengths), dtype="<u2"), [], []
    ends, borders = np.cumsum([0, *lengths]), [0, *sorted(set(cuts) - {0, len(lengths)}), len(lengths)]
    for number, (first, last) in enumerate(pairwise(borders)):
        part, path = tokens[ends[first] : ends[last]], folder / f"train-{number:05}"
        part.tofile(f"{path}.bin")
        (ends[first:last] - ends[first]).astype("<i8").tofile(f"{path}.starts")
        hashes = {suffix: sha256_of(Path(f"{path}{suffix}")) for suffix in (".bin", ".starts")}
        shards.append(ShardFiles(path, "<u2", hashes))
        sizes.append((len(part), last - first, 2 * len(part)))
    return TokenStore(shards, sizes, np.full(1 << 16, 2)), tokens


@settings(max_examples=50)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.sets(st.integers(1, 11)), st.data())
def test_reading_across_shards_is_reading_their_concatenation(tmp_path_factory, lengths, cuts, data):
    store, tokens = in_shards(lengths, [cut for cut in cuts if cut < len(lengths)], tmp_path_factory.mktemp("store"))
    start, n = data.draw(st.integers(0, len(tokens))), data.draw(st.integers(0, len(tokens) + 4))
    read, documents = store.read(start, n)
    within = tokens[start : start + n]
    missing = n - len(within)
    numbers = np.repeat(np.arange(len(lengths)), lengths)[start : start + n]
    assert read.tolist() == [*within, *[0] * missing]
    assert documents.tolist() == [*numbers, *[-1] * missing]
    ends = np.cumsum(lengths).tolist()
    assert list(store.documents()) == list(zip([0, *ends], ends))
    assert store.bytes_of(0, len(tokens)) == store.n_bytes == 2 * len(tokens)


def test_joined_stores_read_as_one(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    stores = [in_shards(lengths, [1], tmp_path / name)[0] for name, lengths in (("a", [3, 2]), ("b", [4, 1]))]
    tokens, documents = TokenStore.joined(stores).read(2, 7)
    assert tokens.tolist() == [2, 3, 4, 0, 1, 2, 3]
    assert documents.tolist() == [0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("suffix", [".bin", ".starts"])
def test_a_flipped_bit_is_found_in_the_shards_that_are_asked_for(suffix, tmp_path):
    store, _ = in_shards([3, 2, 4], [1, 2], tmp_path)
    store.verify(range(3))
    file = tmp_path / f"train-00001{suffix}"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"train-00001{suffix}' is damaged: its content has changed; remove .*again$"):
        store.verify([2, 2, 1])
    store.verify([0, 2])
    store.verify([0, 1], at_most=1)  # bytes


def test_many_shards_keep_few_files_open(tmp_path):
    store, tokens = in_shards([1] * 400, range(400), tmp_path)
    token_store._open_shard.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    assert store.read(0, 400)[0].tolist() == tokens.tolist()
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 256


def test_a_complete_store_opens_without_the_text(make_settings, tmp_path):
    run = make_settings()
    tokenizer = prepare_tokenizer(run)
    folder = token_folders(run, tokenizer)[""]
    (source,) = run.data.mixture
    expected = {split: source_fingerprint(source, split, run.data.cache_dir) for split in SPLITS}
    (tmp_path / "train.txt").unlink()
    stores = open_tokens(folder, tokenizer)
    assert [store.n_documents for store in stores.values()] == [1, 1]
    assert {split: store.source_sha256 for split, store in stores.items()} == expected
    assert expected["train"] != expected["heldout"]


def test_a_store_of_a_million_documents_is_mapped_not_read(store, tokenizer, tmp_path):
    """400 MB of tokens, which are a hole in the file: no blocks on the disk."""
    shard = {"tokens": 200_000_000, "documents": 1_000_000, "bytes": 10**9, "sha256": {}}
    index = {"dtype": "<u2", "shards": [dict.fromkeys(SPLITS, shard)], "source_sha256": dict.fromkeys(SPLITS, "")}
    (tmp_path / "index.json").write_text(json.dumps(index))
    for split in SPLITS:
        (np.arange(1_000_000, dtype="<i8") * 200).tofile(tmp_path / f"{split}-00000.starts")
        with (tmp_path / f"{split}-00000.bin").open("wb") as file:
            file.truncate(400_000_000)
    shares = Shares([1.0], 4, 1000, seed=0)
    text_batch(Mixture({"": ConcatRows(store, 32)}, shares), 0, range(4))  # the first batch imports modules
    tracemalloc.start()
    rows = ConcatRows(open_tokens(tmp_path, tokenizer)["train"], 512)
    batch = text_batch(Mixture({"": rows}, shares), 0, range(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.documents.max() in (2, 3)
    assert peak < 1e6


def test_a_process_that_was_faster_is_no_fault(tmp_path):
    with written_whole(tmp_path / "cache") as ours:
        (ours / "file").write_text("the same")
        with written_whole(tmp_path / "cache") as theirs:
            (theirs / "file").write_text("the same")
        assert (tmp_path / "cache" / "file").exists()
    _put_both(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    (tmp_path / "any").mkdir()
    assert (tmp_path / "cache").stat().st_mode == (tmp_path / "any").stat().st_mode  # other users may read both
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
    files = Path(token_store.__file__).parent.rglob("*.py")
    assert [p.name for p in files if re.search(r"^\s*(from|import) (training|eval)\b", p.read_text(), re.M)] == []


def test_settings_tasks_and_sources_are_imported_without_torch():
    modules = "data.sources, data.token_store, data.tokenizer, data.tasks.layout, training.settings.config_file"
    heavy = "{'torch', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert not {heavy}, {heavy}"], check=True)
