"""All documents of a split as one long row of token ids on disk, written once and mapped into memory.

    cache_dir/tokens-<fingerprint>/{train,heldout}.bin      little-endian uint16 or uint32
                                   {train,heldout}.starts   little-endian int64, the first token of each document
                                   index.json               numbers of tokens and documents, hash of the text

Each document is `<s> tokens </s>`, without `<s>` if the tokenizer has none. The fingerprint covers the content of the
sources, the tokenizer and `VERSION`, so a change of any of them leads to another folder. A folder whose files have
other sizes is written again.

A folder is written as `tokens-<fingerprint>.part` and renamed when it is complete. Its index says how much of its files
is safely on disk. A start after a kill cuts the files there and goes on with the next document.
"""

import hashlib
import json
import operator
import os
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.encoding import encoded, refuse_unguarded_main, token_dtype
from data.folders import one_at_a_time, write_text
from data.progress import encoding_progress
from data.settings import RunSettings
from data.sources import SPLITS, documents, source_fingerprint, text_size
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

VERSION = 1  # raise it when the same text and tokenizer would give other tokens
SAVE_EVERY = 16 << 20  # bytes of text: what a kill may cost
BYTES_AT_ONCE = 1 << 20  # tokens whose bytes are counted at once, which bounds the memory
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TokenStore:
    """All documents of a split. `document_starts` (documents,) are offsets into `tokens` (n,)."""

    tokens: NDArray[Any]
    document_starts: IntArray
    token_bytes: IntArray  # (vocab,) UTF-8 bytes that each token decodes to; 0 for markers
    source_sha256: str = ""  # fingerprint of the text, independent of the tokenizer

    def bytes_of(self, start: int, end: int) -> int:
        """UTF-8 bytes of the text in tokens [start, end)."""
        parts = range(start, end, BYTES_AT_ONCE)
        return sum(int(self.token_bytes[self.tokens[i : min(i + BYTES_AT_ONCE, end)]].sum()) for i in parts)


def prepare_tokens(
    settings: RunSettings, tokenizer: "Tokenizer", workers: int | None = None
) -> tuple[TokenStore, TokenStore]:
    """The train and held-out stores, encoded by `workers` processes if the cache does not have them."""
    return open_tokens(token_folder(settings, tokenizer, workers), tokenizer)


def token_folder(settings: RunSettings, tokenizer: "Tokenizer", workers: int | None = None) -> Path:
    """The folder with the tokens of both splits. What it lacks is encoded now.

    Raises `UserError` when the tokenizer has more tokens than the model has embeddings.
    """
    if tokenizer.vocab_size > (settings.model.vocab_size or tokenizer.vocab_size):
        raise UserError(
            f"tokenizer has {tokenizer.vocab_size:,} tokens but model.vocab_size is {settings.model.vocab_size:,}; "
            "leave model.vocab_size out to take the tokenizer's, or give data.tokenizer its own"
        )
    sources = {split: source_fingerprint(settings.data, split) for split in SPLITS}
    folder = Path(settings.data.cache_dir) / f"tokens-{fingerprint(list(sources.values()), tokenizer)[:16]}"
    if _index(folder) is None:
        refuse_unguarded_main()
        with one_at_a_time(folder):
            if _index(folder) is None:  # else another process wrote it while this one waited
                tokenizer.token_bytes()  # raises UserError before the work, not after it
                part = folder.with_suffix(".part")
                _write(part, settings, tokenizer, sources, workers)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(part, folder)
    return folder


def open_tokens(folder: Path, tokenizer: "Tokenizer") -> tuple[TokenStore, TokenStore]:
    """The stores in a complete folder. The text is not needed, so any process on any machine may call this."""
    index, token_bytes = json.loads((folder / "index.json").read_text(encoding="utf-8")), tokenizer.token_bytes()
    train, heldout = (
        TokenStore(
            np.memmap(folder / f"{split}.bin", dtype=index[split]["dtype"], mode="r"),
            np.memmap(folder / f"{split}.starts", dtype="<i8", mode="r"),
            token_bytes, index[split]["source_sha256"],
        )
        for split in SPLITS
    )  # fmt: skip
    return train, heldout


def fingerprint(sources: list[str], tokenizer: "Tokenizer") -> str:
    """SHA-256 (hex) of everything that the tokens depend on. `sources` are the fingerprints of both splits."""
    return hashlib.sha256(json.dumps([VERSION, sources, tokenizer.sha256]).encode()).hexdigest()


def _write(
    folder: Path, settings: RunSettings, tokenizer: "Tokenizer", sources: dict[str, str], workers: int | None
) -> None:
    """Write the tokens of both splits, or what an earlier process left to write."""
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.tmp"):
        left.unlink()
    index = _index(folder, complete=False) or {}
    for split, source in sources.items():
        blank = {"dtype": token_dtype(tokenizer).str, "tokens": 0, "documents": 0, "bytes": 0, "complete": False}
        entry = index.setdefault(split, blank | {"source_sha256": source})
        if not entry["complete"]:
            _write_split(folder, split, index, settings, tokenizer, workers)


def _write_split(
    folder: Path, split: str, index: dict[str, Any], settings: RunSettings, tokenizer: "Tokenizer", workers: int | None
) -> None:
    entry = index[split]
    texts = (document.text for document in islice(documents(settings.data, split), entry["documents"], None))
    total = text_size(settings.data, split)
    with (
        (folder / f"{split}.bin").open("ab") as tokens,
        (folder / f"{split}.starts").open("ab") as starts,
        encoding_progress(split, total, entry["bytes"]) as progress,
    ):
        tokens.truncate(entry["tokens"] * np.dtype(entry["dtype"]).itemsize)
        starts.truncate(entry["documents"] * 8)

        def save() -> None:
            for file in (tokens, starts):
                file.flush()
                os.fsync(file.fileno())
            write_text(folder / "index.json", json.dumps(index))

        saved = entry["bytes"]
        for batch in encoded(texts, tokenizer, workers):
            tokens.write(batch.tokens.data)
            starts.write((entry["tokens"] + np.cumsum(batch.lengths) - batch.lengths).astype("<i8").data)
            entry["tokens"] += len(batch.tokens)
            entry["documents"] += len(batch.lengths)
            entry["bytes"] += batch.text_bytes
            progress(entry["bytes"], entry["documents"])
            if entry["bytes"] - saved >= SAVE_EVERY:
                save()
                saved = entry["bytes"]
        entry["complete"] = True
        save()


def _index(folder: Path, complete: bool = True) -> dict[str, Any] | None:
    """The index of a folder; None if its files do not hold what it says. If not `complete`, they may hold more."""
    fits = operator.eq if complete else operator.ge
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        for split in SPLITS if complete else index:
            entry = index[split]
            sizes = {"bin": np.dtype(entry["dtype"]).itemsize * entry["tokens"], "starts": 8 * entry["documents"]}
            if not all(fits((folder / f"{split}.{name}").stat().st_size, size) for name, size in sizes.items()):
                return None
        return index
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
