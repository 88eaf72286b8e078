"""Documents to train on: the novels, local files (text, jsonl, csv, parquet), or a data set of the hub.

Held-out text is named by `data.heldout_files` or `data.hub.heldout_split`. If `data.heldout_files` is empty, every
twentieth document of `data.train_files` is held out: a whole document, never the end of one that training reads.
"""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

from data.folders import file_hashes, remembered
from data.novels import BOOKS, novels
from data.settings import DataSettings
from model.errors import UserError

SPLITS = ("train", "heldout")
HELDOUT_EVERY = 20  # documents
HASHES = "hashes.json"  # in data.cache_dir
# The builder of `datasets` for each suffix of a table, in any case, with or without .gz. Other files are text.
TABLES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Document(NamedTuple):
    """A text of its own: tokens of one document never see those of another."""

    name: str
    text: str


def documents(data: DataSettings, split: str) -> Iterator[Document]:
    """The non-empty documents of split "train" or "heldout", in a fixed order.

    Raises `UserError` for a missing or unreadable file, a missing column, and a split without any text.
    """
    empty = True
    if data.source == "novels":
        texts: Iterable[Document] = starmap(Document, novels(split))
    else:
        texts = _files(data, split) if data.source == "files" else _hub(data, split)
    for document in texts:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        names = getattr(data, f"{split}_files")
        setting = f"data.hub.{split}_split" if data.source == "hub" else f"data.{split}_files {names}"
        held_out = f", or {HELDOUT_EVERY} documents in data.train_files" if setting == "data.heldout_files []" else ""
        raise UserError(f"{setting} has no text; name another with text{held_out}")


def source_fingerprint(data: DataSettings, split: str) -> str:
    """SHA-256 (hex) of a split. A hub data set is known by its settings: when it changes, clear `data.cache_dir`.

    Local files are known by their content. `data.cache_dir` remembers its hash while their size and times stay.
    """
    content: list[Any] = [BOOKS[split]]
    paths = _local_files(data, split)
    hashes = file_hashes(paths, Path(data.cache_dir) / HASHES)
    if data.source == "files":
        suffixes = [_table_suffix(path) or path.suffix for path in paths]
        content = [data.text_column, _split_files(data, split)[1], list(zip(suffixes, hashes, strict=True))]
    elif data.hub:
        content = [data.hub.model_dump(), hashes]
    return hashlib.sha256(json.dumps([data.source, split, *content], sort_keys=True).encode()).hexdigest()


def altered_files(data: DataSettings) -> tuple[int, list[Path]]:
    """Read all local files again. Returns their number, and those whose content is not the remembered one."""
    memory = Path(data.cache_dir) / HASHES
    paths = sorted({path.absolute() for split in SPLITS for path in _local_files(data, split)})
    known, hashes = remembered(memory), file_hashes(paths, memory, trust=False)
    named = zip(paths, hashes, strict=True)
    return len(paths), [path for path, now in named if known.get(str(path), [now])[-1] != now]


def text_size(data: DataSettings, split: str) -> int | None:
    """About the bytes of text in a split; None for tables and the hub, where only reading tells."""
    if data.source != "files":
        return None
    paths, every = _split_files(data, split)
    share = 1.0 if every is None else 1 / every if split == "heldout" else 1 - 1 / every
    return None if any(map(_table_suffix, paths)) else round(share * sum(path.stat().st_size for path in paths))


def _local_files(data: DataSettings, split: str) -> list[Path]:
    if data.source == "files":
        return _split_files(data, split)[0]
    return sorted(path for path in Path(data.hub.name).rglob("*") if path.is_file()) if data.hub else []


def _files(data: DataSettings, split: str) -> Iterator[Document]:
    paths, every = _split_files(data, split)
    for i, document in enumerate(document for path in paths for document in _read(path, data.text_column)):
        if every is None or (i % every == every - 1) == (split == "heldout"):
            yield document


def _split_files(data: DataSettings, split: str) -> tuple[list[Path], int | None]:
    """The files to read, in order; and n if both splits come from them, with every n-th document held out."""
    setting = "heldout_files" if split == "heldout" and data.heldout_files else "train_files"
    paths: list[Path] = []
    for pattern in getattr(data, setting):
        names = sorted(glob.glob(pattern, recursive=True)) or [pattern]  # a file's own name may look like a pattern
        files = [path for path in map(Path, names) if path.is_file()]
        if not files:
            raise UserError(f"data.{setting}: no such file: {pattern!r}; paths are relative to the working directory")
        paths += files
    return paths, None if data.heldout_files else HELDOUT_EVERY


def _table_suffix(path: Path) -> str | None:
    """`.jsonl` for a.JSONL and for a.jsonl.gz; None for a text file."""
    return next((suffix for suffix in TABLES if path.name.lower().removesuffix(".gz").endswith(suffix)), None)


def _read(path: Path, column: str) -> Iterator[Document]:
    if suffix := _table_suffix(path):
        yield from _rows(_table(TABLES[suffix], path), column, path.name, "data.text_column")
        return
    try:
        yield Document(path.name, path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"data.train_files, data.heldout_files: {str(path)!r} can't be read as UTF-8 text: {error}; "
            f"name UTF-8 text, or a table ({', '.join(TABLES)})"
        ) from error


def _table(builder: str, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a local table, read as they are needed."""
    import datasets

    more = {"keep_default_na": False} if builder == "csv" else {}  # "NA" and an empty cell are text
    try:
        rows = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True, **more)
    except StopIteration:  # what `datasets` raises for an empty jsonl file
        return
    yield from rows


def _hub(data: DataSettings, split: str) -> Iterator[Document]:
    import datasets

    hub = data.hub
    assert hub is not None, "training.settings.consistency requires data.hub for this source"
    name = getattr(hub, f"{split}_split")
    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=name, streaming=hub.streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.hub.name {hub.name!r}, split {name!r} can't be loaded: {reason}; "
            "check the name, data.hub.config, the splits and the connection"
        ) from error
    yield from islice(_rows(rows, hub.text_column, f"{hub.name}/{name}", "data.hub.text_column"), hub.max_documents)


def _rows(rows: Iterable[dict[str, Any]], column: str, name: str, setting: str) -> Iterator[Document]:
    """The text column of each row. Raises `UserError` for a table that `datasets` can't parse."""
    from datasets.exceptions import DatasetsError

    try:
        for i, row in enumerate(rows):
            if not isinstance(row.get(column), str):
                raise UserError(f"{setting} is {column!r}; row {i} of {name!r} has no such text, only {sorted(row)}")
            yield Document(f"{name}#{i}", row[column])
    except (ValueError, OSError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name!r} can't be read: {reason}") from error
