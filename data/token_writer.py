"""Writes the tokens of a source, shard by shard; see `data.token_store` for the files.

A shard is written under another name, synced, renamed and then added to the index. The index also names the next row of
the source. After a kill, the next start continues with that row.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data.chat.template import ChatTemplate
from data.encoding import Encoded, Encoder, Position, encoded, moved, token_dtype
from data.folders import write_text
from data.settings import MixtureSource
from data.sources import MB, SPLITS, no_text, parts, setting
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

SHARD = 64 << 20  # bytes of text: what a kill may cost
COUNTS = {"bytes_read": 0, "bad_rows": 0, "unused_documents": 0}
SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal


def write_tokens(
    folder: Path, source: MixtureSource, hashes: dict[str, str], tokenizer: "Tokenizer", workers: int | None
) -> None:
    """Write the shards of a source into `folder`, or those that an earlier process left to write.

    `hashes` are the fingerprints of the text, by split.
    Raises `UserError` for more bad rows than allowed, and for a split without text.
    """
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.tmp"):
        left.unlink()
    writer = _Writer(folder, source, hashes, tokenizer)
    writer.write(workers)
    for split in SPLITS:
        if writer.total("tokens", split) < 2:  # one token predicts nothing
            raise no_text(source, split)


class _Writer:
    """A preparation, at the place to which it has come."""

    def __init__(self, folder: Path, source: MixtureSource, hashes: dict[str, str], tokenizer: "Tokenizer"):
        self.folder, self.source, self.parts = folder, source, parts(source)
        chat = ChatTemplate(tokenizer) if source.conversations else None
        self.encoder = Encoder(tokenizer, source.columns, source.heldout_share, chat)
        new = {"source_sha256": hashes, "dtype": token_dtype(tokenizer).str, "shards": [], "complete": False}
        self.index: dict[str, Any] = read_index(folder, complete=False) or new | {"next_row": (0, 0)} | COUNTS
        by_hash = any(part.split is None for part in self.parts)
        self.cap = source.heldout_megabytes * MB if by_hash else 1 << 62  # bytes of held-out text

    def write(self, workers: int | None) -> None:
        """Write all shards that are missing."""
        index, sizes = self.index, [part.n_bytes for part in self.parts]
        total = None if None in sizes else sum(filter(None, sizes))
        with _progress(self.source.name or "text", total, index["bytes_read"]) as progress:
            shard = self._new_shard()
            for batch, end, n_bytes in encoded(self.parts, Position(*index["next_row"]), self.encoder, workers):
                self._count_bad(batch.bad)
                shard["train"].write(batch.splits["train"])
                shard["heldout"].write(self._capped(batch.splits["heldout"], shard["heldout"]))
                index["bytes_read"] += n_bytes
                documents = sum(self.total("documents", split) + new.documents for split, new in shard.items())
                progress(index["bytes_read"], documents)
                if sum(new.n_bytes for new in shard.values()) >= SHARD:
                    self._save(shard, end)
                    shard = self._new_shard()
            index["complete"] = True
            self._save(shard, Position(len(self.parts), 0))

    def total(self, what: str, split: str) -> int:
        """Tokens, documents or bytes of a split in all complete shards."""
        return sum(shard[split][what] for shard in self.index["shards"] if split in shard)

    def _new_shard(self) -> "dict[str, _NewShard]":
        number = len(self.index["shards"])
        chat = self.encoder.chat is not None
        return {split: _NewShard(self.folder / f"{split}-{number:05}", chat) for split in SPLITS}

    def _count_bad(self, bad: list[tuple[Position, str]]) -> None:
        for (part, row), reason in bad:
            self.index["bad_rows"] += 1
            if self.index["bad_rows"] > self.source.max_bad_rows:
                at, source = setting(self.source), self.source
                text = (
                    "messages_column" if source.messages_column else "hub.text_column" if source.hub else "text_column"
                )
                named = text if len(source.columns) == 1 else "prompt_column and answer_column"
                raise UserError(
                    f"{at}{named} is {', '.join(map(repr, source.columns))}; row {row + 1} of "
                    f"{self.parts[part].name!r}: {reason}; mend it, name another column, or set {at}max_bad_rows to "
                    "the number of rows to skip"
                )

    def _capped(self, encoded: Encoded, shard: "_NewShard") -> Encoded:
        """Those of the held-out documents that are within the cap."""
        left = self.cap - self.total("bytes", "heldout") - shard.n_bytes
        n = int(np.searchsorted(encoded.sizes.cumsum(), left, side="right"))
        self.index["unused_documents"] += len(encoded.sizes) - n
        return encoded.first(n)

    def _save(self, shard: "dict[str, _NewShard]", end: Position) -> None:
        """Finish a shard, and then say in the index that it is there."""
        if entry := {split: new.finish() for split, new in shard.items() if new.documents}:
            self.index["shards"].append(entry)
        self.index["next_row"] = end
        write_text(self.folder / "index.json", json.dumps(self.index))


class _NewShard:
    """The documents of one split in a shard that is being written. `path` has no suffix; `chat`: conversations."""

    def __init__(self, path: Path, chat: bool):
        self.path, self.chat, self.tokens, self.documents, self.n_bytes, self.answers = path, chat, 0, 0, 0, 0
        self.files: dict[str, BinaryIO] = {}  # by suffix
        self.hashes = {suffix: hashlib.sha256() for suffix in (".bin", ".starts", *([".answers"] if chat else []))}

    def write(self, documents: Encoded) -> None:
        if not len(documents.lengths):
            return
        starts = (self.tokens + documents.lengths.cumsum() - documents.lengths).astype("<i8")
        answers = moved(documents.answers, self.tokens).astype("<i8")
        for suffix, array in zip(self.hashes, (documents.tokens, starts, answers)):
            if suffix not in self.files:
                self.files[suffix] = Path(f"{self.path}{suffix}.tmp").open("wb")  # noqa: SIM115, closed by `finish`
            self.files[suffix].write(array.data)
            self.hashes[suffix].update(array.data)
        self.tokens += len(documents.tokens)
        self.documents += len(documents.lengths)
        self.n_bytes += int(documents.sizes.sum())
        self.answers += len(answers)

    def finish(self) -> dict[str, Any]:
        """Put the files in their places. Returns what the index says about them."""
        for suffix, file in self.files.items():
            with file:
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, f"{self.path}{suffix}")
        sha256 = {suffix: digest.hexdigest() for suffix, digest in self.hashes.items()}
        answers = {"answers": self.answers} if self.chat else {}
        sizes = {"tokens": self.tokens, "documents": self.documents, "bytes": self.n_bytes}
        return sizes | answers | {"sha256": sha256}


def read_index(folder: Path, complete: bool = True) -> dict[str, Any] | None:
    """The index of a folder; None if its files do not have the sizes that it says, or if it is not `complete`."""
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for number, shard in enumerate(index["shards"]):
            for split, entry in shard.items():
                sizes = {".bin": np.dtype(index["dtype"]).itemsize * entry["tokens"], ".starts": 8 * entry["documents"]}
                sizes |= {".answers": 32 * entry["answers"]} if "answers" in entry else {}
                for suffix, size in sizes.items():
                    if (folder / f"{split}-{number:05}{suffix}").stat().st_size != size:
                        return None
        return index if index["complete"] or not complete else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def _progress(name: str, total: int | None, n_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the bytes read and the documents encoded so far: a bar on a terminal, else lines.

    `total` is about the bytes to read in all, if known. `n_bytes` were read before.
    """
    console, first = Console(stderr=True), n_bytes
    start = last_line = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=n_bytes)

        def advance(n_bytes: int, documents: int) -> None:
            nonlocal last_line
            text = f"{name}: {documents:,} documents"
            bar.update(task, completed=n_bytes, description=text)
            now = time.monotonic()
            if not console.is_terminal and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line, rate = now, (n_bytes - first) / (now - start)
                left = f", about {max(0, total - n_bytes) / rate / 60:.1f} minutes left" if total else ""
                console.print(f"{text}, {n_bytes / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}", highlight=False)

        yield advance
