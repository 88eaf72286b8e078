"""Documents as one long row of tokens on disk, made once and mapped into memory.

    cache_dir/tokens-<fingerprint>/{train,heldout}.bin   little-endian uint16 or uint32
                                   index.json            document starts, names, SHA-256 of both files

Each document is `<s> tokens </s>`. The fingerprint covers the sources' content, the tokenizer and `VERSION`: when one
changes, another folder is made. A folder whose files are damaged is made again. Folders appear whole or not at all.
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
from data.sources import SPLITS, Document, documents, source_fingerprint
from data.tokenizer import Tokenizer
from model.errors import UserError

if TYPE_CHECKING:
    from training.settings.schema import Settings

VERSION = 1  # raise it when the tokens of the same text and tokenizer would change
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TokenStore:
    """All documents of a split. `document_starts` (documents,) are offsets into `tokens` (n,)."""

    tokens: NDArray[Any]
    document_starts: IntArray
    names: list[str]
    token_bytes: IntArray  # (vocab,) UTF-8 bytes that each token decodes to; markers have none
    source_sha256: str = ""  # fingerprint of the text, whatever the tokenizer

    def bytes_of(self, start: int, end: int) -> int:
        """UTF-8 bytes of the text that tokens [start, end) stand for."""
        return int(self.token_bytes[self.tokens[start:end]].sum())


def check_vocabulary(tokenizer_size: int, vocab_size: int | None) -> None:
    """Raises `UserError` when the tokenizer has tokens that the model has no embedding for."""
    if vocab_size is not None and tokenizer_size > vocab_size:
        raise UserError(
            f"tokenizer has {tokenizer_size:,} pieces but model.vocab_size is {vocab_size:,}; "
            "leave model.vocab_size out to take the tokenizer's, or give data.tokenizer its own"
        )


def prepare_tokens(settings: "Settings", tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore]:
    """The train and held-out stores, from the cache where it is sound, else made."""
    check_vocabulary(tokenizer.vocab_size, settings.model.vocab_size)
    sources = [source_fingerprint(settings.data, split) for split in SPLITS]
    folder = Path(settings.data.cache_dir) / f"tokens-{fingerprint(sources, tokenizer)[:16]}"
    index = _sound_index(folder)
    if index is None:
        _fill(folder, settings, tokenizer)
        index = _sound_index(folder)
        assert index is not None, "a cache just written is sound"
    train, heldout = (
        _open(folder, index[split], tokenizer, split, source) for split, source in zip(SPLITS, sources, strict=True)
    )
    return train, heldout


def fingerprint(sources: list[str], tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, of all that the tokens depend on; `sources` are the fingerprints of the splits' text."""
    return hashlib.sha256(json.dumps([VERSION, sources, tokenizer.sha256]).encode()).hexdigest()


def _fill(folder: Path, settings: "Settings", tokenizer: Tokenizer) -> None:
    with written_whole(folder) as aside:
        index = {split: _write(aside, split, documents(settings.data, split), tokenizer) for split in SPLITS}
        (aside / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _write(folder: Path, split: str, texts: Iterable[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest, starts, names, end = hashlib.sha256(), [], [], 0
    with (folder / f"{split}.bin").open("wb") as file:
        for document in texts:
            ids = np.array([tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id])
            assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size, "a token beyond the vocabulary"
            block = ids.astype(dtype).tobytes()
            digest.update(block)
            file.write(block)
            starts.append(end)
            names.append(document.name)
            end += len(ids)
    return {"dtype": dtype.str, "tokens": end, "sha256": digest.hexdigest(), "starts": starts, "names": names}


def _sound_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder whose files are what it says; None when it must be made (again)."""
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        sound = all(index[split]["sha256"] == _sha256(folder / f"{split}.bin") for split in SPLITS)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return index if sound else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path, index: dict[str, Any], tokenizer: Tokenizer, split: str, source: str) -> TokenStore:
    tokens = np.memmap(folder / f"{split}.bin", dtype=index["dtype"], mode="r")
    return TokenStore(
        tokens, np.array(index["starts"], dtype=np.int64), index["names"], tokenizer.token_bytes(), source
    )
