"""Preparation: the same bytes for any number of workers and after any kill, bad rows, and the cap on held-out text."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from data import encoding, token_writer
from data.encoding import Encoder, Position
from data.sources import Part
from data.token_store import open_tokens, token_folders
from data.token_writer import read_index, write_tokens
from data.tokenizer import prepare_tokenizer
from model.errors import UserError


def prepare(run, workers=1):
    (folder,) = token_folders(run, prepare_tokenizer(run), workers).values()
    return folder


@pytest.fixture
def many(make_settings, tmp_path, monkeypatch):
    """Settings with 300 short documents in two tables and ten files, which are encoded and saved in small parts."""
    lines = (tmp_path / "train.txt").read_text().splitlines()
    documents = [f"{i} {lines[i % len(lines)]}" for i in range(300)]
    for name, some in (("a.jsonl", documents[:150]), ("c.jsonl", documents[160:])):
        (tmp_path / f"many-{name}").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    for i, text in enumerate(documents[150:160]):
        (tmp_path / f"many-b-{i}.txt").write_text(text)
    monkeypatch.setattr(encoding, "BATCH", 500)
    monkeypatch.setattr(token_writer, "SHARD", 2000)
    return make_settings(train_files=[str(tmp_path / "many-*")], heldout_files=[], heldout_share=0.1)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def undisturbed(run, cache):
    """What one worker writes into another cache."""
    expected = content(prepare(run.model_copy(update={"data": run.data.model_copy(update={"cache_dir": str(cache)})})))
    assert len(expected) > 20
    return expected


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(workers, many, tmp_path):
    assert content(prepare(many, workers)) == undisturbed(many, tmp_path / "other")


def test_an_interrupted_preparation_goes_on_at_the_row_after_its_last_shard(many, monkeypatch, tmp_path):
    expected, tokenizer, encoded = undisturbed(many, tmp_path / "other"), prepare_tokenizer(many), []
    encode = type(tokenizer).encode

    def interrupted(tokenizer, text):
        encoded.append(text)
        if len(encoded) == 200:
            raise KeyboardInterrupt
        return encode(tokenizer, text)

    monkeypatch.setattr(type(tokenizer), "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(many)
    assert {path.suffix for path in tmp_path.glob("cache/tokens-*")} == {".part", ".lock"}
    (part,) = tmp_path.glob("cache/tokens-*.part")
    saved = sum(split["documents"] for shard in read_index(part, complete=False)["shards"] for split in shard.values())
    assert 150 < saved < 200
    assert content(prepare(many)) == expected
    assert len(encoded) == 200 + 300 - saved
    assert {path.suffix for path in tmp_path.glob("cache/tokens-*")} == {"", ".lock"}


KILLED = """
import os, signal, sys, time
from data import encoding, token_store, token_writer
from data.tokenizer import prepare_tokenizer
from training.settings.schema import Settings

encoding.BATCH, token_writer.SHARD = 500, 2000
settings = Settings.model_validate_json(sys.stdin.read())
tokenizer = prepare_tokenizer(settings)

def killed(call):
    def counted(*args):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return counted

os.fsync, os.replace = killed(os.fsync), killed(os.replace)
for calls in map(int, sys.argv[1:]):
    if os.fork() == 0:
        token_store.token_folders(settings, tokenizer, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
"""


def test_a_preparation_that_is_killed_twenty_times_ends_with_the_same_bytes(many, tmp_path):
    """Each start is killed before a call of fsync or replace, and goes on where the one before stopped."""
    expected, draw = undisturbed(many, tmp_path / "other"), random.Random(5)
    calls = [str(draw.randint(1, 16)) for _ in range(20)]
    command = [sys.executable, "-c", KILLED, *calls]
    subprocess.run(command, input=many.model_dump_json(), text=True, check=True)
    (part,) = tmp_path.glob("cache/tokens-*.part")
    assert len(read_index(part, complete=False)["shards"]) >= 3
    assert content(prepare(many)) == expected


def test_a_damaged_shard_of_a_part_is_not_gone_on_from(many, monkeypatch, tmp_path):
    expected = undisturbed(many, tmp_path / "other")
    subprocess.run([sys.executable, "-c", KILLED, "15"], input=many.model_dump_json(), text=True, check=True)
    (file,) = tmp_path.glob("cache/tokens-*.part/train-00000.bin")
    file.write_bytes(file.read_bytes()[:-2])
    assert content(prepare(many)) == expected


def test_a_killed_worker_is_reported(monkeypatch):
    monkeypatch.setattr(encoding, "FEW", 1)
    tokenizer = SimpleNamespace(vocab_size=2, bos_id=0, eos_id=1, encode=exec, lines_apart=False)
    part = Part("rows", "train", lambda first: ["import os; os._exit(1)"])
    with pytest.raises(UserError, match=r"was killed, perhaps for lack of memory; run the same command again"):
        list(encoding.encoded([part], Position(0, 0), Encoder(tokenizer, ("text",), 0.1), 2))


def test_a_program_without_a_guarded_main_ends_with_the_reason(many, tmp_path):
    settings = f"settings = Settings.model_validate_json({many.model_dump_json()!r})\n"
    call = "token_store.token_folders(settings, prepare_tokenizer(settings), 2)\n"
    (tmp_path / "program.py").write_text(KILLED.partition("settings =")[0] + settings + call)
    root = str(Path(encoding.__file__).parents[1])
    command, env = [sys.executable, str(tmp_path / "program.py")], os.environ | {"PYTHONPATH": root}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert 'put the program under `if __name__ == "__main__":`' in result.stderr


def test_little_text_starts_no_workers(make_settings, monkeypatch):
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", None)
    prepare(make_settings(), workers=2)


def test_progress_off_a_terminal_is_a_line(capsys, monkeypatch):
    times: Iterator[float] = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with token_writer._progress("web", 200_000_000, 40_000_000) as advance:
        monkeypatch.setattr(token_writer, "Progress", None)
        advance(60_000_000, 1)
        advance(80_000_000, 2000)
    assert capsys.readouterr().err == "web: 2,000 documents, 80 MB, 2.0 MB/s, about 1.0 minutes left\n"


def test_text_that_changes_while_it_is_encoded_is_refused(make_settings, monkeypatch, tmp_path):
    run = make_settings()
    tokenizer = prepare_tokenizer(run)
    encode = type(tokenizer).encode

    def disturbed(tokenizer, text):
        (tmp_path / "train.txt").write_text("Another text.")
        return encode(tokenizer, text)

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", disturbed)
        with pytest.raises(UserError, match=r"^the text changed while it was encoded; run the same command again"):
            token_folders(run, tokenizer, 1)
    assert {path.suffix for path in tmp_path.glob("cache/tokens-*")} == {".lock"}
    assert open_tokens(token_folders(run, tokenizer, 1)[""], tokenizer)["train"].n_bytes == len("Another text.")


# -- bad rows ---------------------------------------------------------------------------------------------------------


def bad_run(make_settings, tmp_path, *lines, **data):
    good = json.dumps({"text": "The sea was calm."}).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, b"", *lines, good]))
    return make_settings(train_files=[str(tmp_path / name) for name in ("train.txt", "rows.jsonl")], **data)


BAD = [
    (b'{"text": ', r"not JSON in UTF-8 \(.*\)"),
    (b'{"text": "\xe4"}', r"not JSON in UTF-8 \(.*\)"),
    (b"[" * 100_000, r"not JSON in UTF-8 \(.*\)"),
    (b'{"text": null}', r"column 'text' holds nothing, not text"),
    (b'{"text": 3}', r"column 'text' holds int, not text"),
    (b'{"text": ["a"]}', r"column 'text' holds list, not text"),
    (b'{"body": "a", "n": 1}', r"no column 'text', only 'body', 'n'"),
    (b'["a"]', r"no column 'text', list"),
    (b'{"text": "a\\ud800"}', r"half a character at 1 \(.*\)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_row_without_text_is_refused_with_its_file_and_number(line, reason, make_settings, tmp_path):
    with pytest.raises(
        UserError, match=rf"^data\.text_column is 'text'; row 2 of 'rows\.jsonl': {reason}; mend it, name another "
        r"column, or set data\.max_bad_rows to the number of rows to skip$",
    ):  # fmt: skip
        prepare(bad_run(make_settings, tmp_path, line))


def test_bad_rows_are_skipped_up_to_a_number_and_counted(make_settings, tmp_path):
    lines = [line for line, _ in BAD]
    run = bad_run(make_settings, tmp_path, *lines, max_bad_rows=len(BAD))
    folder = prepare(run)
    assert open_tokens(folder, prepare_tokenizer(run))["train"].n_documents == 3
    assert read_index(folder)["bad_rows"] == len(BAD)
    with pytest.raises(UserError, match=rf"row {len(BAD) + 2} of 'rows\.jsonl'"):
        prepare(bad_run(make_settings, tmp_path, *lines, b"{", max_bad_rows=len(BAD)))


def test_a_corpus_without_text_is_refused(make_settings, tmp_path):
    (tmp_path / "heldout.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"data\.heldout_files .*heldout\.txt.* has no text; name another with text$"):
        prepare(make_settings())


def test_held_out_text_of_one_token_is_refused(make_settings, tmp_path):
    tokenizer = SimpleNamespace(
        vocab_size=9, bos_id=None, eos_id=1, lines_apart=False, encode=lambda text: [2] * (len(text) - 1)
    )
    (tmp_path / "heldout.txt").write_text("a")
    (source,) = make_settings().data.mixture
    with pytest.raises(UserError, match=r"data\.heldout_files .*heldout\.txt.* has no text"):
        write_tokens(tmp_path / "tokens", source, {}, tokenizer, 1)


def test_a_bad_row_of_the_hub_is_refused_with_the_setting_of_its_column(make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "hub" / "train.parquet")
    hub = {"name": str(tmp_path / "hub"), "heldout_split": None, "text_column": "body", "streaming": True}
    run = make_settings(source="hub", train_files=[], heldout_files=[], hub=hub)
    with pytest.raises(UserError, match=r"^data\.hub\.text_column is 'body'; row 1 of '.*hub/train': no column 'body'"):
        write_tokens(tmp_path / "tokens", run.data.mixture[0], {}, prepare_tokenizer(make_settings()), 1)


# -- the cap on held-out text -----------------------------------------------------------------------------------------


def test_held_out_documents_beyond_the_cap_are_unused(many, monkeypatch, tmp_path):
    def sizes(run):
        folder = prepare(run)
        stores = open_tokens(folder, prepare_tokenizer(run))
        counts = [stores[split].n_documents for split in ("train", "heldout")]
        return *counts, read_index(folder)["unused_documents"], stores["heldout"].n_bytes

    train, heldout, unused, _ = sizes(many)
    assert (train + heldout, unused) == (300, 0)
    monkeypatch.setattr(token_writer, "MB", 1000)
    less = many.model_copy(update={"data": many.data.model_copy(update={"heldout_megabytes": 1})})
    capped_train, capped, unused, n_bytes = sizes(less)
    assert capped_train == train
    assert 0 < capped == heldout - unused < heldout
    assert 800 < n_bytes <= 1000


@pytest.mark.parametrize(
    "text",
    [
        "The sea was calm.\n" * 30,
        "one\n\n  two\n" * 40,
        "\n" * 50 + "end",
        "no line end at all " * 20,
        "日本\n語🙂\n" * 30,
    ],
)
def test_a_long_text_is_encoded_in_parts_with_the_same_ids(text, tokenizer, monkeypatch):
    assert tokenizer.lines_apart
    encoder, batch = Encoder(tokenizer, ("text",), 0.5), [encoding.Rows(Position(0, 0), "train", [text])]
    whole = encoder(batch).splits["train"]
    monkeypatch.setattr(encoding, "BATCH", 7)
    calls = []
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, part: calls.append(part) or list(self.processor.encode(part))
    )
    parts = encoder(batch).splits["train"]
    assert len(calls) > 1 or "\n" not in text
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_array_equal(parts.lengths, whole.lengths)
