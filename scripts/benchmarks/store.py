"""Starts on a store of 100 billion tokens beside a start on a small one: opening, the first batch, and memory.

The tokens are sparse files. The index of 100 million documents is real (800 MB on disk while this runs).
"""

import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from data.batches import text_batch
from data.mixture import Mixture, Shares, open_sources
from data.settings import DataSettings
from data.tokenizer import Tokenizer, prepare_tokenizer
from scripts.benchmarks.timing import OURS, Row, Setup

SHARD_DOCUMENTS, DOCUMENT = 65_536, 1_000  # documents in a shard, tokens in a document
SMALL = 500  # documents
ROWS = 256  # of the first batch


@dataclass(frozen=True)
class Start:
    """Seconds and bytes of a process that opens a store and makes one batch."""

    open_s: float
    batch_s: float
    memory_bytes: int


def bench_store(setup: Setup, documents: int = 100_000_000) -> list[Row]:
    """Both stores are opened by a process of its own. `ours` is the large one, the peer is the small one."""
    tokenizer, seq_len = prepare_tokenizer(setup.settings), setup.settings.data.seq_len
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        small, large = Path(folder) / "small", Path(folder) / "large"
        _write(small, SMALL)
        _write(large, documents)
        first, second = (pool.apply(_start, (path, tokenizer, seq_len)) for path in (small, large))
    rows = []
    for what in ("open_s", "batch_s"):
        sizes_of = f"{documents * DOCUMENT / 1e9:g} billion tokens beside {SMALL * DOCUMENT / 1e6:g} million"
        case = f"{what.removesuffix('_s')}, {sizes_of}"
        large_s, small_s = getattr(second, what), getattr(first, what)
        sizes = second.memory_bytes, first.memory_bytes
        rows.append(Row("store", case, OURS, large_s, small_s, small_s / large_s, None, *sizes, "–", 1))
    return rows


def _write(folder: Path, documents: int) -> None:
    folder.mkdir()
    shards = []
    for number, first in enumerate(range(0, documents, SHARD_DOCUMENTS)):
        n = min(SHARD_DOCUMENTS, documents - first)
        for split in ("train", "heldout"):
            (np.arange(n, dtype="<i8") * DOCUMENT).tofile(folder / f"{split}-{number:05}.starts")
            with (folder / f"{split}-{number:05}.bin").open("wb") as file:
                file.truncate(2 * n * DOCUMENT)
            if number:  # held-out text of one shard
                break
        entry = {"tokens": n * DOCUMENT, "documents": n, "bytes": 0, "sha256": {}}
        shards.append({"train": entry} | ({} if number else {"heldout": entry}))
    index = {"dtype": "<u2", "source_sha256": {"train": "", "heldout": ""}, "shards": shards, "complete": True}
    (folder / "index.json").write_text(json.dumps(index))


def _start(folder: Path, tokenizer: Tokenizer, seq_len: int) -> Start:
    tokenizer.token_bytes()
    before, began = _memory(), time.perf_counter()
    (source,) = open_sources({"": folder}, tokenizer, DataSettings(seq_len=seq_len)).values()
    opened = time.perf_counter()
    text_batch(Mixture({"": source.rows}, Shares([1.0], ROWS, 1000, seed=0)), 0, range(ROWS))
    return Start(opened - began, time.perf_counter() - opened, _memory() - before)


def _memory() -> int:
    """Bytes of this process in memory, the mapped pages that it has read included."""
    return int(psutil.Process().memory_info().rss)
