"""The token ids of a source on disk, written once and mapped into memory.

    cache_dir/tokens-<fingerprint>/{train,heldout}-00000.bin      all documents of a shard, as uint16 or uint32
                                   {train,heldout}-00000.starts   position of the first token of each, as int64
                                   {train,heldout}-00000.answers  of conversations: four int64 for each answer, as
                                                                  `data.chat.template.Answer` names them
                                   index.json                     sizes and hashes of the shards, hash of the text

Numbers are little-endian. Each document is `<s> tokens </s>`, without `<s>` if the tokenizer has none; a conversation
is as the chat template has written it. A shard holds whole documents. The fingerprint covers the content of the source,
the tokenizer, the chat template of conversations, and `VERSION`. A change of any of them gives another folder. A folder
whose files do not have the sizes in index.json is written again.

A folder is written by `data.token_writer` as `tokens-<fingerprint>.part`, and renamed when it is complete.
"""

import hashlib
import json
import mmap
import os
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chat import template
from data.encoding import refuse_unguarded_main
from data.folders import one_at_a_time, sha256_of
from data.settings import MixtureSource, RunSettings
from data.sources import SPLITS, source_fingerprint
from data.token_writer import read_index, write_tokens
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

VERSION = 2  # raise it when the same text and tokenizer would give other tokens
AT_ONCE = 1 << 20  # tokens whose bytes are counted at once, which bounds the memory
IntArray = NDArray[np.int64]


class Shard(NamedTuple):
    """Whole documents: their token ids (n,), and where each starts in them (documents,).

    `answers` (answers, 4): an `Answer` each, the only tokens that are trained. None: all are.
    """

    tokens: NDArray[Any]
    starts: IntArray
    answers: IntArray | None = None


class ShardFiles(NamedTuple):
    """A shard on disk."""

    path: Path  # without its suffix
    dtype: str
    sha256: dict[str, str]  # by suffix

    def open(self) -> Shard:
        return _open_shard(self.path, self.dtype, ".answers" in self.sha256)


@lru_cache(maxsize=256)  # a mapped file keeps a descriptor open, and a process may have 1,024
def _open_shard(path: Path, dtype: str, answers: bool) -> Shard:
    mapped = _mapped(f"{path}.answers", "<i8").reshape(-1, 4) if answers else None
    return Shard(_mapped(f"{path}.bin", dtype), _mapped(f"{path}.starts", "<i8"), mapped)


def _mapped(file: str, dtype: str) -> NDArray[Any]:
    """A file in memory, read page by page: a batch needs one short stretch of each of many shards."""
    array = np.memmap(file, dtype, "r")
    array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return np.asarray(array)


class TokenStore:
    """All documents of one split of a source, one after another. Documents and tokens are counted from 0."""

    def __init__(
        self, shards: Sequence[ShardFiles | Shard], sizes: Sequence[tuple[int, int, int]], token_bytes: IntArray,
        source_sha256: str = "",
    ):  # fmt: skip
        """`sizes`: tokens, documents and UTF-8 bytes of text of each shard."""
        self.shards, self.token_bytes, self.source_sha256 = shards, token_bytes, source_sha256
        self.sizes = sizes
        counts = np.array([(0, 0, 0), *sizes], dtype=np.int64).cumsum(0)
        self.first_tokens, self.first_documents, _ = counts.T  # of each shard, and then the totals
        self.n_tokens, self.n_documents, self.n_bytes = counts[-1].tolist()

    @staticmethod
    def joined(stores: Sequence["TokenStore"]) -> "TokenStore":
        """The documents of several stores as one."""
        shards = [shard for store in stores for shard in store.shards]
        return TokenStore(shards, [size for store in stores for size in store.sizes], stores[0].token_bytes)

    @staticmethod
    def of(tokens: NDArray[Any], starts: IntArray, token_bytes: IntArray) -> "TokenStore":
        """One shard in memory."""
        size = len(tokens), len(starts), int(token_bytes[tokens].sum())
        return TokenStore([Shard(tokens, starts)], [size], token_bytes)

    def shard(self, number: int) -> Shard:
        shard = self.shards[number]
        return shard.open() if isinstance(shard, ShardFiles) else shard

    def read(self, start: int, n: int) -> tuple[IntArray, IntArray]:
        """(n,) the tokens from `start` on, and (n,) the number of the document of each; -1 after the last document."""
        tokens, documents = np.zeros(n, dtype=np.int64), np.full(n, -1)
        for number, first, last in self._stretches(start, min(start + n, self.n_tokens)):
            shard, base = self.shard(number), int(self.first_tokens[number])
            begin, end = np.searchsorted(shard.starts, [first - base, last - base], side="left")
            here = slice(first - start, last - start)
            tokens[here] = shard.tokens[first - base : last - base]
            borders = np.zeros(last - first, dtype=np.int64)
            borders[shard.starts[begin:end] - (first - base)] = 1
            documents[here] = self.first_documents[number] + begin - 1 + borders.cumsum()
        return tokens, documents

    def scored(self, start: int, n: int) -> NDArray[np.bool_]:
        """(n,) whether each token from `start` on is to be predicted: all of a text, of conversations the answers."""
        result = np.ones(n, dtype=bool)
        for number, first, last in self._stretches(start, min(start + n, self.n_tokens)):
            answers = self.shard(number).answers
            if answers is None:
                continue
            base = int(self.first_tokens[number])
            from_, to = first - base, last - base
            result[first - start : last - start] = False
            begin, end = bisect_right(answers, from_, key=lambda a: a[1]), bisect_left(answers, to, key=lambda a: a[0])
            for begins, ends, *_ in answers[begin:end].tolist():
                result[max(begins, from_) + base - start : min(ends, to) + base - start] = True
        return result

    @property
    def conversations(self) -> bool:
        """Whether only answers are scored."""
        return bool(self.shards) and self.shard(0).answers is not None

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

    def shard_at(self, position: int) -> int:
        """Number of the shard of a token."""
        return int(np.searchsorted(self.first_tokens, position, side="right")) - 1

    def verify(self, shards: Iterable[int], at_most: int = 1 << 29) -> None:
        """Compare shards with their hashes, until `at_most` bytes were read. Raises `UserError` if one is damaged."""
        for shard in (self.shards[number] for number in dict.fromkeys(shards)):
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
        number = self.shard_at(start)
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
    hashes = _text_hashes(source, cache_dir, tokenizer)
    facts = json.dumps([VERSION, list(hashes.values()), tokenizer.sha256])
    folder = Path(cache_dir) / f"tokens-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    if read_index(folder) is None:
        refuse_unguarded_main()
        with one_at_a_time(folder):
            if read_index(folder) is None:  # else another process wrote it while this one waited
                tokenizer.token_bytes()  # raises UserError before the work, not after it
                part = folder.with_suffix(".part")
                write_tokens(part, source, hashes, tokenizer, workers)
                if _text_hashes(source, cache_dir, tokenizer) != hashes:
                    shutil.rmtree(part)
                    what = f"the text{f' of {source.name}' if source.name else ''} changed while it was encoded"
                    raise UserError(f"{what}; run the same command again when its files are complete")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(part, folder)
    return folder


def _text_hashes(source: MixtureSource, cache_dir: str, tokenizer: "Tokenizer") -> dict[str, str]:
    """By split. Conversations are another text by another chat template."""
    hashes = {split: source_fingerprint(source, split, cache_dir) for split in SPLITS}
    if not source.conversations:
        return hashes
    written = template.ChatTemplate(tokenizer).source
    facts = {split: json.dumps([template.VERSION, text, written]) for split, text in hashes.items()}
    return {split: hashlib.sha256(fact.encode()).hexdigest() for split, fact in facts.items()}


def open_tokens(folder: Path, tokenizer: "Tokenizer") -> dict[str, TokenStore]:
    """The stores of a complete folder, by split. The text is not needed, so a process on any machine may call this."""
    index, token_bytes = json.loads((folder / "index.json").read_text(encoding="utf-8")), tokenizer.token_bytes()
    stores = {}
    for split in SPLITS:
        shards = {f"{split}-{i:05}": shard[split] for i, shard in enumerate(index["shards"]) if split in shard}
        files = [ShardFiles(folder / name, index["dtype"], shard["sha256"]) for name, shard in shards.items()]
        sizes = [(shard["tokens"], shard["documents"], shard["bytes"]) for shard in shards.values()]
        stores[split] = TokenStore(files, sizes, token_bytes, index["source_sha256"][split])
    return stores
