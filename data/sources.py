"""Where text comes from: the novels, local files (text, jsonl, parquet), or a data set of the hub.

`datasets` is imported where it is used: it takes most of a second, and text files and novels need none of it.

Held-out text is named (`data.heldout_files`, `data.hub.heldout_split`). Files without `data.heldout_files` give every
twentieth document to the held-out split: whole documents, never the end of one that training reads.
"""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.novels import BOOKS, novels
from model.errors import UserError

if TYPE_CHECKING:
    from training.settings.schema import DataSettings, HubSettings

SPLITS = ("train", "heldout")
HELDOUT_EVERY = 20  # documents
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # all else is text: one document a file


@dataclass(frozen=True)
class Document:
    """A text that is never mixed with another."""

    name: str
    text: str


def documents(data: "DataSettings", split: str) -> Iterator[Document]:
    """The documents of split "train" or "heldout", in a fixed order, empty ones left out.

    Raises `UserError` for a missing or unreadable file, a missing column, and a split without any text.
    """
    read = {"novels": _novels, "files": _files, "hub": _hub}[data.source]
    found = False
    for document in read(data, split):
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise UserError(_nothing(data, split))


def source_fingerprint(data: "DataSettings", split: str) -> str:
    """SHA-256, in hex, of the content of a split.

    Files are hashed; the novels by their known hashes. A hub data set is known by its settings alone, and by its files
    when its name is a local folder: clear `data.cache_dir` when its publisher has changed it.
    """
    parts: list[Any] = [data.source, split]
    if data.source == "novels":
        parts.append(BOOKS[split])
    elif data.source == "files":
        paths, every = _split_files(data, split)
        parts += [data.text_column, every, [(path.suffix, _hash_file(path)) for path in paths]]
    else:
        hub = _hub_settings(data)
        local = sorted(path for path in Path(hub.name).rglob("*") if path.is_file())
        parts += [hub.model_dump(), [_hash_file(path) for path in local]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _novels(data: "DataSettings", split: str) -> Iterator[Document]:
    return (Document(name, text) for name, text in novels(split))


def _files(data: "DataSettings", split: str) -> Iterator[Document]:
    paths, every = _split_files(data, split)
    for i, document in enumerate(_read_files(paths, data.text_column)):
        if every is None or (i % every == every - 1) == (split == "heldout"):
            yield document


def _split_files(data: "DataSettings", split: str) -> tuple[list[Path], int | None]:
    """The files to read, and, when both splits come from the same files, every how manieth document is held out."""
    if split == "heldout" and data.heldout_files:
        return _expand(data.heldout_files, "data.heldout_files"), None
    return _expand(data.train_files, "data.train_files"), None if data.heldout_files else HELDOUT_EVERY


def _expand(patterns: list[str], setting: str) -> list[Path]:
    """Files of the patterns, in order; each pattern must match."""
    if not patterns:
        raise UserError(f"{setting} is empty and data.source is 'files'; name text, jsonl or parquet files")
    paths: list[Path] = []
    for pattern in patterns:
        matches = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]
        # A file may have a name that reads as a pattern.
        matches = matches or [path for path in [Path(pattern)] if path.is_file()]
        if not matches:
            raise UserError(f"{setting}: no such file: {pattern!r}; paths are relative to the working directory")
        paths += matches
    return paths


def _read_files(paths: Iterable[Path], column: str) -> Iterator[Document]:
    for path in paths:
        if path.suffix in FORMATS:
            yield from _rows(_table(FORMATS[path.suffix], path), column, path.name, "data.text_column")
        else:
            yield Document(path.name, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"data.train_files, data.heldout_files: {str(path)!r} can't be read as UTF-8 text: {error}"
        ) from error


def _table(kind: str, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a local file, read as they are asked for."""
    import datasets

    yield from datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)


def _hub_settings(data: "DataSettings") -> "HubSettings":
    if data.hub is None:
        raise UserError("data.source is 'hub' and data.hub is missing; give at least data.hub.name")
    return data.hub


def _hub(data: "DataSettings", split: str) -> Iterator[Document]:
    import datasets

    hub = _hub_settings(data)
    name = hub.train_split if split == "train" else hub.heldout_split
    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=name, streaming=hub.streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.hub.name {hub.name!r}, split {name!r} can't be loaded: {_first_line(error)}; "
            "check the name, data.hub.config, the splits and the connection"
        ) from error
    yield from islice(_rows(rows, hub.text_column, f"{hub.name}/{name}", "data.hub.text_column"), hub.max_documents)


def _rows(rows: Iterable[dict[str, Any]], column: str, name: str, setting: str) -> Iterator[Document]:
    """The text column of each row. What `datasets` can't parse is the user's file, not our fault."""
    from datasets.exceptions import DatasetsError

    iterator = enumerate(rows)
    while True:
        try:
            i, row = next(iterator)
        except StopIteration:
            return
        except (ValueError, OSError, DatasetsError) as error:
            raise UserError(f"{name!r} can't be read: {_first_line(error)}") from error
        if not isinstance(row.get(column), str):
            raise UserError(f"{setting} is {column!r}; row {i} of {name!r} has no such text, only {sorted(row)}")
        yield Document(f"{name}#{i}", row[column])


def _nothing(data: "DataSettings", split: str) -> str:
    if data.source == "hub":
        hub = _hub_settings(data)
        setting = "data.hub.train_split" if split == "train" else "data.hub.heldout_split"
        return f"{setting}: {hub.name!r} holds no text there; name another split"
    if split == "heldout" and not data.heldout_files:
        return (
            f"data.heldout_files is empty and data.train_files {data.train_files} hold fewer than {HELDOUT_EVERY} "
            "documents to hold some out of; name files that training never sees in data.heldout_files"
        )
    files = data.train_files if split == "train" or not data.heldout_files else data.heldout_files
    setting = "data.train_files" if split == "train" else "data.heldout_files"
    return f"{setting} {files} hold no text; name files with some"


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{str(path)!r} can't be read: {error.strerror}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
