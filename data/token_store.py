"""The token ids of a source on disk, written once and mapped into memory.

    cache_dir/tokens-<fingerprint>/{train,heldout}-00000.bin      all documents of a shard, as uint16 or uint32
                                   {train,heldout}-00000.starts   where each of them starts in it, as int64
                                   index.json                     sizes and hashes of the shards, hash of the text

Numbers are little-endian. Each document is `<s> tokens </s>`, without `<s>` if the tokenizer has none. A shard holds
whole documents. The fingerprint covers the content of the source, the tokenizer and `VERSION`, so a change of any of
them leads to another folder. A folder whose files have other sizes is written again.

A folder is written as `tokens-<fingerprint>.part` and renamed when it is complete. A shard is written aside, synced,
renamed and then named in the index, with the row of the source that comes after it. A start after a kill goes on there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.encoding import Encoded, Encoder, Position, encoded, refuse_unguarded_main, token_dtype
from data.folders import one_at_a_time, sha256_of, write_text
from data.progress import encoding_progress
from data.settings import MixtureSource, RunSettings
from data.sources import MB, SPLITS, column_of, no_text, parts, setting, source_fingerprint
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

VERSION = 2  # raise it when the same text and tokenizer would give other tokens
SHARD = 64 << 20  # bytes of text: what a kill may cost
SUFFIXES = (".bin", ".starts")
AT_ONCE = 1 << 20  # tokens whose bytes are counted at once, which bounds the memory
IntArray = NDArray[np.int64]


class Shard(NamedTuple):
    """Whole documents: their token ids (n,), and where each starts in them (documents,)."""

    tokens: NDArray[Any]
    starts: IntArray


class ShardFiles(NamedTuple):
    """A shard on disk."""

    path: Path  # without its suffix
    dtype: str
    sha256: dict[str, str]  # by suffix

    def open(self) -> Shard:
        return _open_shard(self.path, self.dtype)


@lru_cache(maxsize=256)  # a mapped file keeps a descriptor open, and a process may have 1,024
def _open_shard(path: Path, dtype: str) -> Shard:
    arrays = (np.memmap(f"{path}{suffix}", of, "r") for suffix, of in ((".bin", dtype), (".starts", "<i8")))
    return Shard(*map(np.asarray, arrays))


class TokenStore:
    """All documents of one split of a source, one after another. Documents and tokens are counted from 0."""

    def __init__(
        self, shards: Sequence[ShardFiles | Shard], sizes: Sequence[tuple[int, int]], token_bytes: IntArray,
        source_sha256: str = "",
    ):  # fmt: skip
        """`sizes`: tokens and documents of each shard."""
        self.shards, self.token_bytes, self.source_sha256 = shards, token_bytes, source_sha256
        counts = np.array([(0, 0), *sizes], dtype=np.int64).cumsum(0)
        self.first_tokens, self.first_documents = counts.T  # of each shard, and then the totals
        self.n_tokens, self.n_documents = map(int, counts[-1])

    @staticmethod
    def of(tokens: NDArray[Any], starts: IntArray, token_bytes: IntArray) -> "TokenStore":
        """One shard in memory."""
        return TokenStore([Shard(tokens, starts)], [(len(tokens), len(starts))], token_bytes)

    def shard(self, number: int) -> Shard:
        shard = self.shards[number]
        return shard.open() if isinstance(shard, ShardFiles) else shard

    def read(self, start: int, n: int) -> tuple[IntArray, IntArray]:
        """(n,) the tokens from `start` on, and (n,) the number of the document that each belongs to."""
        tokens, documents = np.empty((2, n), dtype=np.int64)
        for number, first, last in self._stretches(start, start + n):
            shard, base = self.shard(number), int(self.first_tokens[number])
            begin, end = np.searchsorted(shard.starts, [first - base, last - base], side="left")
            here = slice(first - start, last - start)
            tokens[here] = shard.tokens[first - base : last - base]
            borders = np.zeros(last - first, dtype=np.int64)
            borders[shard.starts[begin:end] - (first - base)] = 1
            documents[here] = self.first_documents[number] + begin - 1 + borders.cumsum()
        return tokens, documents

    def documents(self) -> Iterator[tuple[int, int]]:
        """Start and end of each document."""
        for number in range(len(self.shards)):
            base, end = self.first_tokens[number : number + 2].tolist()
            starts = [base + start for start in self.shard(number).starts.tolist()]
            yield from zip(starts, [*starts[1:], end], strict=True)

    def bytes_of(self, start: int, end: int) -> int:
        """UTF-8 bytes of the text in tokens [start, end)."""
        parts = (self.read(i, min(AT_ONCE, end - i))[0] for i in range(start, end, AT_ONCE))
        return sum(int(self.token_bytes[part].sum()) for part in parts)

    def verify(self, stretches: Sequence[tuple[int, int]], at_most: int = 1 << 29) -> None:
        """Compare the shards of these stretches [start, end) with their hashes, until `at_most` bytes were read.

        Raises `UserError` if one is damaged.
        """
        numbers = dict.fromkeys(number for stretch in stretches for number, *_ in self._stretches(*stretch))
        for shard in (self.shards[number] for number in numbers):
            if not isinstance(shard, ShardFiles) or at_most <= 0:
                return
            for suffix, expected in shard.sha256.items():
                file = Path(f"{shard.path}{suffix}")
                at_most -= file.stat().st_size
                if sha256_of(file) != expected:
                    folder, remedy = shard.path.parent, "the next start encodes the text again"
                    raise UserError(f"{str(file)!r} is damaged: its content has changed; remove {folder}: {remedy}")

    def _stretches(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number of each shard that tokens [start, end) touch, and their stretch [first, last) in it."""
        number = int(np.searchsorted(self.first_tokens, start, side="right")) - 1
        while start < end:
            last = min(end, int(self.first_tokens[number + 1]))
            if start < last:
                yield number, start, last
            start, number = last, number + 1


def token_folders(settings: RunSettings, tokenizer: "Tokenizer", workers: int | None = None) -> dict[str, Path]:
    """The folder with the tokens of each source, by its name. What is missing is encoded now by `workers` processes.

    Raises `UserError` when the tokenizer has more tokens than the model has embeddings.
    """
    if tokenizer.vocab_size > (settings.model.vocab_size or tokenizer.vocab_size):
        raise UserError(
            f"tokenizer has {tokenizer.vocab_size:,} tokens but model.vocab_size is {settings.model.vocab_size:,}; "
            "leave model.vocab_size out to take the tokenizer's, or give data.tokenizer its own"
        )
    cache_dir = settings.data.cache_dir
    return {source.name: _token_folder(source, cache_dir, tokenizer, workers) for source in settings.data.mixture}


def _token_folder(source: MixtureSource, cache_dir: str, tokenizer: "Tokenizer", workers: int | None) -> Path:
    hashes = {split: source_fingerprint(source, split, cache_dir) for split in SPLITS}
    facts = json.dumps([VERSION, list(hashes.values()), tokenizer.sha256])
    folder = Path(cache_dir) / f"tokens-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    if _index(folder) is None:
        refuse_unguarded_main()
        with one_at_a_time(folder):
            if _index(folder) is None:  # else another process wrote it while this one waited
                tokenizer.token_bytes()  # raises UserError before the work, not after it
                part = folder.with_suffix(".part")
                part.mkdir(exist_ok=True)
                _Writer(part, source, hashes, tokenizer).write(workers)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(part, folder)
    return folder


def open_tokens(folder: Path, tokenizer: "Tokenizer") -> dict[str, TokenStore]:
    """The stores of a complete folder, by split. The text is not needed, so a process on any machine may call this."""
    index, token_bytes = json.loads((folder / "index.json").read_text(encoding="utf-8")), tokenizer.token_bytes()
    stores = {}
    for split in SPLITS:
        shards = {f"{split}-{i:05}": shard[split] for i, shard in enumerate(index["shards"]) if split in shard}
        files = [ShardFiles(folder / name, index["dtype"], shard["sha256"]) for name, shard in shards.items()]
        sizes = [(shard["tokens"], shard["documents"]) for shard in shards.values()]
        stores[split] = TokenStore(files, sizes, token_bytes, index["source_sha256"][split])
    return stores


class _Writer:
    """Writes the shards of a source into `folder`, or those that an earlier process left to write."""

    def __init__(self, folder: Path, source: MixtureSource, hashes: dict[str, str], tokenizer: "Tokenizer"):
        self.folder, self.source, self.parts = folder, source, parts(source)
        self.encoder = Encoder(tokenizer, column_of(source), source.heldout_share)
        self.dtype = token_dtype(tokenizer)
        blank = {"dtype": self.dtype.str, "source_sha256": hashes, "shards": [], "next_row": [0, 0], "read": 0}
        self.index = _index(folder, complete=False) or blank | {"bad_rows": 0, "unused": 0, "complete": False}
        # of the documents that their hash holds out, those beyond the cap are left out
        self.cap = source.heldout_megabytes * MB if any(part.split is None for part in self.parts) else 1 << 62

    def write(self, workers: int | None) -> None:
        """Raises `UserError` for more bad rows than allowed, and for a split without text."""
        for left in self.folder.glob("*.tmp"):
            left.unlink()
        index, sizes = self.index, [part.n_bytes for part in self.parts]
        total = None if None in sizes else sum(filter(None, sizes))
        with encoding_progress(self.source.name or "text", total, index["read"]) as progress:
            shard = _NewShard(self.folder, len(index["shards"]))
            for batch, end, n_bytes in encoded(self.parts, Position(*index["next_row"]), self.encoder, workers):
                self._count_bad(batch.bad)
                shard.write("train", batch.splits["train"])
                shard.write("heldout", self._capped(batch.splits["heldout"], shard))
                index["read"] += n_bytes
                progress(index["read"], sum(self.total("documents", split) + shard.of(split).documents for split in SPLITS))
                if shard.n_bytes >= SHARD:
                    self._save(shard, end)
                    shard = _NewShard(self.folder, len(index["shards"]))
            index["complete"] = True
            self._save(shard, Position(len(self.parts), 0))
        for split in SPLITS:
            if not self.total("documents", split):
                raise no_text(self.source, split)

    def total(self, what: str, split: str) -> int:
        """Tokens, documents or bytes of a split in all complete shards."""
        return sum(shard[split][what] for shard in self.index["shards"] if split in shard)

    def _count_bad(self, bad: list[tuple[Position, str]]) -> None:
        for (part, row), reason in bad:
            self.index["bad_rows"] += 1
            if self.index["bad_rows"] > self.source.max_bad_rows:
                at = setting(self.source)
                skip = f"to skip such rows, set {at}max_bad_rows to the number that may be skipped"
                raise UserError(
                    f"{at}text_column is {self.encoder.column!r}; row {row + 1} of {self.parts[part].name!r}: {reason}"
                    f"; mend it, or name another column, or, {skip} (now {self.source.max_bad_rows})"
                )

    def _capped(self, encoded: Encoded, shard: "_NewShard") -> Encoded:
        """Those of the held-out documents that are within the cap."""
        left = self.cap - self.total("bytes", "heldout") - shard.of("heldout").n_bytes
        n = int(np.searchsorted(encoded.sizes.cumsum(), left, side="right"))
        self.index["unused"] += len(encoded.sizes) - n
        return Encoded(encoded.tokens[: encoded.lengths[:n].sum()], encoded.lengths[:n], encoded.sizes[:n])

    def _save(self, shard: "_NewShard", end: Position) -> None:
        """Finish a shard, and then say in the index that it is there."""
        if entry := shard.finish():
            self.index["shards"].append(entry)
        self.index["next_row"] = end
        write_text(self.folder / "index.json", json.dumps(self.index))


class _NewShard:
    """A shard that is being written."""

    def __init__(self, folder: Path, number: int):
        self.splits = {split: _NewSplit(folder / f"{split}-{number:05}") for split in SPLITS}

    @property
    def n_bytes(self) -> int:
        return sum(split.n_bytes for split in self.splits.values())

    def of(self, split: str) -> "_NewSplit":
        return self.splits[split]

    def write(self, split: str, documents: Encoded) -> None:
        if len(documents.lengths):
            self.splits[split].write(documents)

    def finish(self) -> dict[str, Any]:
        """Put the files in their places. Returns what the index says about them, by split."""
        return {name: split.finish() for name, split in self.splits.items() if split.documents}


class _NewSplit:
    """The documents of one split in a shard that is being written."""

    def __init__(self, path: Path):
        self.path, self.tokens, self.documents, self.n_bytes = path, 0, 0, 0
        self.files: dict[str, Any] = {}  # by suffix
        self.hashes = {suffix: hashlib.sha256() for suffix in SUFFIXES}

    def write(self, documents: Encoded) -> None:
        starts = (self.tokens + documents.lengths.cumsum() - documents.lengths).astype("<i8")
        for suffix, array in zip(SUFFIXES, (documents.tokens, starts)):
            if suffix not in self.files:
                self.files[suffix] = Path(f"{self.path}{suffix}.tmp").open("wb")
            self.files[suffix].write(array.data)
            self.hashes[suffix].update(array.data)
        self.tokens += len(documents.tokens)
        self.documents += len(documents.lengths)
        self.n_bytes += int(documents.sizes.sum())

    def finish(self) -> dict[str, Any]:
        for suffix, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, f"{self.path}{suffix}")
        sha256 = {suffix: digest.hexdigest() for suffix, digest in self.hashes.items()}
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.n_bytes, "sha256": sha256}


def _index(folder: Path, complete: bool = True) -> dict[str, Any] | None:
    """The index of a folder; None if its files do not have the sizes that it says, or if it is not `complete`."""
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for number, shard in enumerate(index["shards"]):
            for split, entry in shard.items():
                sizes = {".bin": np.dtype(index["dtype"]).itemsize * entry["tokens"], ".starts": 8 * entry["documents"]}
                for suffix, size in sizes.items():
                    if (folder / f"{split}-{number:05}{suffix}").stat().st_size != size:
                        return None
        return index if index["complete"] or not complete else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
