"""Encodes a text file of many documents: our preparation with two workers, with one, and `datasets.map` with two."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from data.novels import novels
from data.token_store import token_folders
from data.tokenizer import Tokenizer, prepare_tokenizer
from scripts.benchmarks.timing import Row, Setup, compare
from training.settings.schema import Settings

DOCUMENT = 4000  # characters


def bench_prepare(setup: Setup, megabytes: int) -> list[Row]:
    """`megabytes` of the novels, repeated with changes, as one .jsonl file. The tokenizer is that of the config."""
    tokenizer = prepare_tokenizer(setup.settings)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        with file.open("w") as lines:
            for document in _documents(megabytes * 1_000_000):
                lines.write(json.dumps({"text": document}) + "\n")
        data = {"source": "files", "train_files": [str(file)], "cache_dir": f"{folder}/cache"}
        settings = setup.settings.model_copy(update={"data": setup.settings.data.model_validate(data)})
        works = {
            "ours": partial(_ours, settings, tokenizer, 2),
            "ours, one worker": partial(_ours, settings, tokenizer, 1),
            "datasets.map": partial(_datasets, file, tokenizer, f"{folder}/datasets"),
        }
        return compare(
            "prepare", f"{megabytes} MB, 2 workers", works, min(setup.rounds, 3), "–", {"ours, one worker": 1.8}
        )


def _documents(n_bytes: int) -> Iterator[str]:
    text = "".join(text for _, text in novels("train"))
    for number in count():
        start = number * 3989 % len(text)  # each time round the documents begin elsewhere
        document = f"{number} {text[start : start + DOCUMENT]}"
        n_bytes -= len(document.encode())
        if n_bytes < 0:
            return
        yield document


def _ours(settings: Settings, tokenizer: Tokenizer, workers: int) -> None:
    for folder in token_folders(settings, tokenizer, workers).values():
        shutil.rmtree(folder)


def _datasets(file: Path, tokenizer: Tokenizer, cache_dir: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache_dir)
    encode = partial(_encode, tokenizer)
    rows.map(encode, batched=True, num_proc=2, remove_columns=["text"], load_from_cache_file=False)
    shutil.rmtree(cache_dir)


def _encode(tokenizer: Tokenizer, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": [tokenizer.encode(text) for text in batch["text"]]}
