"""Reads documents from the novels, from local files (text, jsonl, csv, parquet) or from a data set of the hub.

A source consists of parts. A part is a file or a split of a data set. Its rows are read one by one, from any row on; a
row holds one document, and is no training sequence here. `text_of` returns the text of a row, and `value_of` what is in
its columns. Worker processes call them.

Held-out text is named by `heldout_files` or `hub.heldout_split`. If none is named, the hash of a document decides
whether it is held out.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data.chat.messages import BadRow, content_of, conversation_of
from data.folders import file_hashes, remembered
from data.novels import BOOKS, novels
from data.settings import DataSettings, MixtureSource
from model.errors import UserError

SPLITS = ("train", "heldout")
HASHES = "hashes.json"  # in data.cache_dir
COMPRESSED = (".gz", ".zst")
MB = 1_000_000


class JsonLine(bytes):
    """A row that is still to be parsed."""


class Part(NamedTuple):
    """A file or a split of a data set. `rows(n)` reads from row n on, counted from 0."""

    name: str
    split: str | None  # None: the hash of each document decides
    rows: Callable[[int], Iterable[Any]]
    n_bytes: int | None = None  # about; None where only reading tells


def parts(source: MixtureSource) -> list[Part]:
    """All parts of a source, in a fixed order. Raises `UserError` for a missing file, and for one of both splits."""
    shared, columns = _splits_by_hash(source), source.columns
    if source.source == "novels":
        return [Part("novels", split, partial(_novel_rows, split)) for split in SPLITS]
    if source.hub:
        names = {None: source.hub.train_split} if shared else {s: getattr(source.hub, f"{s}_split") for s in SPLITS}
        return [Part(f"{source.hub.name}/{name}", s, partial(_hub_rows, source, name)) for s, name in names.items()]
    files = {split: _files(source, split) for split in SPLITS}
    if both := {path.resolve() for path in files["train"]} & {path.resolve() for path in files["heldout"]}:
        at = setting(source)
        raise UserError(f"{at}heldout_files: {str(min(both))!r} is one of {at}train_files too; leave it out of one")
    return [
        Part(path.name, None if shared else split, partial(_file_rows, path, columns), _bytes_of_text(path))
        for split, paths in files.items()
        for path in paths
    ]


def value_of(row: Any, columns: tuple[str, ...]) -> Any:
    """What a row has in its column, or in each of several. Raises `BadRow` if it can't be read."""
    if isinstance(row, JsonLine):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not JSON in UTF-8 ({error})") from error
        row = _cells(row, columns)
    if isinstance(row, BadRow):
        raise row
    return row


def text_of(row: Any, columns: tuple[str, ...]) -> tuple[str, bytes]:
    """The text of a row, and the same in UTF-8. Raises `BadRow` if it has none."""
    row = value_of(row, columns)
    if not isinstance(row, str):
        raise BadRow(f"column {columns[0]!r} holds {'nothing' if row is None else type(row).__name__}, not text")
    try:
        return row, row.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"half a character at {error.start} ({error.reason})") from error


def split_of(text: bytes, share: float) -> str:
    """The split of a document in UTF-8 if this share of all documents is held out. Equal documents stay together."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    return "heldout" if number < share * 2**64 else "train"


def texts(source: MixtureSource, split: str) -> Iterator[str]:
    """The non-empty documents of a split, without those that can't be read. The cap on held-out text does not count.

    Of a conversation it is the text of its messages.
    Raises `UserError` for a file that can't be read, and for a split without any text.
    """
    empty = True
    for part in parts(source):
        for row in part.rows(0) if part.split in (None, split) else ():
            try:
                text, content = _plain(row, source)
            except BadRow:  # counted when the text is encoded
                continue
            if text.strip() and (part.split or split_of(content, source.heldout_share)) == split:
                empty = False
                yield text
    if empty:
        raise no_text(source, split)


def _plain(row: Any, source: MixtureSource) -> tuple[str, bytes]:
    """The text of a row without the marks of a chat template, and the bytes by which the row is known."""
    if not source.conversations:
        return text_of(row, source.columns)
    messages = conversation_of(value_of(row, source.columns), source.columns)
    return "\n".join(message["content"] for message in messages), content_of(messages)


def no_text(source: MixtureSource, split: str) -> UserError:
    """The refusal of a split without text."""
    at = setting(source)
    if source.source == "hub" and source.hub:
        named, value = f"{at}hub.{split}_split", getattr(source.hub, f"{split}_split")
    else:
        named, value = f"{at}{split}_files", getattr(source, f"{split}_files")
    more, share = "", f"{at}heldout_share, which is {source.heldout_share:g}"
    if _splits_by_hash(source):
        cap = f"{at}heldout_megabytes, which is {source.heldout_megabytes}"
        more = f", or raise {share}, or {cap}" if split == "heldout" else f", or lower {share}"
    return UserError(f"{named} {value} has no text; name another with text{more}")


def setting(source: MixtureSource) -> str:
    """What the settings of a source begin with in messages."""
    return f"data.sources {source.name!r}: " if source.name else "data."


def source_fingerprint(source: MixtureSource, split: str, cache_dir: str) -> str:
    """SHA-256 (hex) of a split. A hub data set is known by its settings: when it changes, clear `data.cache_dir`.

    Local files are known by their content. `cache_dir` remembers its hash while their size and times stay.
    """
    content: list[Any] = [BOOKS[split]]
    paths = _local_files(source, split)
    hashes = file_hashes(paths, Path(cache_dir) / HASHES)
    share = [source.heldout_share, source.heldout_megabytes] if _splits_by_hash(source) else None
    if source.source == "files":
        suffixes = [_table_suffix(path) or path.suffix for path in paths]
        content = [source.text_column, share, list(zip(suffixes, hashes, strict=True))]
    elif source.hub:
        content = [source.hub.model_dump(), hashes, *([share] if share else [])]
    if source.conversations:
        content.append(source.columns)
    return hashlib.sha256(json.dumps([source.source, split, *content], sort_keys=True).encode()).hexdigest()


def altered_files(data: DataSettings) -> tuple[int, list[Path]]:
    """Read all local files again. Returns their number, and those whose content is not the remembered one."""
    memory = Path(data.cache_dir) / HASHES
    paths = sorted({p.absolute() for source in data.mixture for split in SPLITS for p in _local_files(source, split)})
    known, hashes = remembered(memory), file_hashes(paths, memory, trust=False)
    named = zip(paths, hashes, strict=True)
    return len(paths), [path for path, now in named if known.get(str(path), [now])[-1] != now]


def _splits_by_hash(source: MixtureSource) -> bool:
    return not source.heldout_files if source.source == "files" else bool(source.hub and not source.hub.heldout_split)


def _local_files(source: MixtureSource, split: str) -> list[Path]:
    if source.source == "files":
        return _files(source, split) or _files(source, "train")
    return sorted(p for p in Path(source.hub.name).rglob("*") if p.is_file()) if source.hub else []


def _files(source: MixtureSource, split: str) -> list[Path]:
    """The files of `train_files` or `heldout_files`, in order."""
    paths: list[Path] = []
    for pattern in getattr(source, f"{split}_files"):
        names = sorted(glob.glob(pattern, recursive=True)) or [pattern]  # a file's own name may look like a pattern
        files = [path for path in map(Path, names) if path.is_file()]
        if not files:
            where = f"{setting(source)}{split}_files"
            raise UserError(f"{where}: no such file: {pattern!r}; paths are relative to the working directory")
        paths += files
    return paths


def _novel_rows(split: str, first: int) -> list[str]:
    return [text for _, text in novels(split)][first:]


def _hub_rows(source: MixtureSource, split: str, first: int) -> Iterator[Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    hub, at = source.hub, setting(source)
    assert hub is not None, "training.settings.consistency requires hub for this source"
    try:
        table = datasets.load_dataset(hub.name, hub.config, split=split, streaming=hub.streaming)
        rows = islice(table.skip(first), hub.max_documents and max(0, hub.max_documents - first))
        yield from (_cells(row, source.columns) for row in rows)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{at}hub.name {hub.name!r}, split {split!r} can't be read: {reason}; "
            f"check the name, {at}hub.config, the splits and the connection"
        ) from error


# -- files ------------------------------------------------------------------------------------------------------------


def _file_rows(path: Path, columns: tuple[str, ...], first: int) -> Iterator[Any]:
    suffix = _table_suffix(path)
    return islice(_TABLES[suffix](path, columns) if suffix else _text_row(path), first, None)


def _bytes_of_text(path: Path) -> int | None:
    """About; None where only reading tells."""
    packed = path.suffix.lower() in COMPRESSED or _table_suffix(path) == ".parquet"
    return None if packed else path.stat().st_size


def _table_suffix(path: Path) -> str | None:
    """`.jsonl` for a.JSONL and for a.jsonl.gz; None for a text file."""
    name = _plain_name(path)
    return next((suffix for suffix in _TABLES if name.endswith(suffix)), None)


def _plain_name(path: Path) -> str:
    """In lower case and without the suffix of a compressed file."""
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in COMPRESSED else name


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed. Raises `UserError` if it can't be read, also later, while it is."""
    try:
        with _stream(path) as stream:
            yield stream
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(
            f"{str(path)!r} can't be read: {reason}; name UTF-8 text, or a table ({', '.join(_TABLES)})"
        ) from error


def _stream(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _text_row(path: Path) -> Iterator[str]:
    """The whole file."""
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        yield text.read()


def _json_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    """One row for each line, or for each element of a list. Empty lines are no rows."""
    with _opened(path) as file:
        begins = file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")  # after a byte order mark and blanks
        if _plain_name(path).endswith(".json") and begins[:1] == b"[":
            yield from (_cells(row, columns) for row in json.load(file))
        else:
            yield from (JsonLine(line) for line in file if not line.isspace())


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        if not table.fieldnames:
            raise ValueError("it has no line with the names of the columns")
        yield from (_cells(row, columns) for row in table)


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow.parquet

    with _opened(path) as file, pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        tops = [column if column in names else column.partition(".")[0] for column in columns]
        for batch in table.iter_batches(1024, columns=tops if {*tops} <= {*names} else names):
            yield from (_cells(row, columns) for row in batch.to_pylist())


_TABLES = {
    ".jsonl": _json_rows, ".ndjson": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows,
}  # fmt: skip


def _cells(row: Any, columns: tuple[str, ...]) -> Any:
    """The value of the one column, or the list of those of several. A `BadRow` if one is missing."""
    values = [_cell(row, column) for column in columns]
    bad = next((value for value in values if isinstance(value, BadRow)), None)
    return bad or (values if len(columns) > 1 else values[0])


def _cell(row: Any, column: str) -> Any:
    """The value of a column; `a.b` is b within a. A `BadRow` if there is no such column."""
    value = row
    for name in [column] if isinstance(row, dict) and column in row else column.split("."):
        if not isinstance(value, dict) or name not in value:
            has = f"only {', '.join(sorted(map(repr, value)))}" if isinstance(value, dict) else type(value).__name__
            return BadRow(f"no column {column!r}, {has}")
        value = value[name]
    return value
