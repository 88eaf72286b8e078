"""All documents of a split as one long row of token ids on disk, written once and mapped into memory.

    cache_dir/tokens-<fingerprint>/{train,heldout}.bin   little-endian uint16 or uint32
                                   index.json            document starts and names

Each document is `<s> tokens </s>`, without `<s>` if the tokenizer has none. The fingerprint covers the content of the
sources, the tokenizer and `VERSION`, so a change of any of them leads to another folder. A folder whose files have
other sizes is written again.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.folders import written_whole
from data.settings import RunSettings
from data.sources import SPLITS, Document, documents, source_fingerprint
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

VERSION = 1  # raise it when the same text and tokenizer would give other tokens
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TokenStore:
    """All documents of a split. `document_starts` (documents,) are offsets into `tokens` (n,)."""

    tokens: NDArray[Any]
    document_starts: IntArray
    names: list[str]
    token_bytes: IntArray  # (vocab,) UTF-8 bytes that each token decodes to; 0 for markers
    source_sha256: str = ""  # fingerprint of the text, independent of the tokenizer

    def bytes_of(self, start: int, end: int) -> int:
        """UTF-8 bytes of the text in tokens [start, end)."""
        return int(self.token_bytes[self.tokens[start:end]].sum())


def prepare_tokens(settings: RunSettings, tokenizer: "Tokenizer") -> tuple[TokenStore, TokenStore]:
    """The train and held-out stores, from the cache if it is intact, else encoded now.

    Raises `UserError` when the tokenizer has more tokens than the model has embeddings.
    """
    if tokenizer.vocab_size > (settings.model.vocab_size or tokenizer.vocab_size):
        raise UserError(
            f"tokenizer has {tokenizer.vocab_size:,} tokens but model.vocab_size is {settings.model.vocab_size:,}; "
            "leave model.vocab_size out to take the tokenizer's, or give data.tokenizer its own"
        )
    sources = [source_fingerprint(settings.data, split) for split in SPLITS]
    folder = Path(settings.data.cache_dir) / f"tokens-{fingerprint(sources, tokenizer)[:16]}"
    index, token_bytes = _intact_index(folder), tokenizer.token_bytes()
    if index is None:
        with written_whole(folder) as aside:
            index = {split: _write(aside, split, documents(settings.data, split), tokenizer) for split in SPLITS}
            (aside / "index.json").write_text(json.dumps(index), encoding="utf-8")
    train, heldout = (
        TokenStore(
            np.memmap(folder / f"{split}.bin", dtype=index[split]["dtype"], mode="r"),
            np.array(index[split]["starts"], dtype=np.int64), index[split]["names"], token_bytes, source,
        )
        for split, source in zip(SPLITS, sources, strict=True)
    )  # fmt: skip
    return train, heldout


def fingerprint(sources: list[str], tokenizer: "Tokenizer") -> str:
    """SHA-256 (hex) of everything that the tokens depend on. `sources` are the fingerprints of both splits."""
    return hashlib.sha256(json.dumps([VERSION, sources, tokenizer.sha256]).encode()).hexdigest()


def _write(folder: Path, split: str, texts: Iterable[Document], tokenizer: "Tokenizer") -> dict[str, Any]:
    """Write the tokens of a split; returns its entry in the index."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    before, after = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    starts, names, end = [], [], 0
    with (folder / f"{split}.bin").open("wb") as file:
        for document in texts:
            ids = [*before, *tokenizer.encode(document.text), *after]
            np.array(ids, dtype=dtype).tofile(file)
            starts.append(end)
            names.append(document.name)
            end += len(ids)
    return {"dtype": dtype.str, "tokens": end, "starts": starts, "names": names}


def _intact_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder whose files have the right sizes; None if the folder must be written (again)."""
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        sizes = {split: np.dtype(index[split]["dtype"]).itemsize * index[split]["tokens"] for split in SPLITS}
        return index if all((folder / f"{split}.bin").stat().st_size == sizes[split] for split in SPLITS) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
