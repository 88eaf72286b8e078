"""Text that training never saw: the haystack of the recall tasks and the text that losses are measured on.

For our runs it is the held-out part of the run's own data, from its cache on disk; with `--text` a file; for any
other model the held-out novels, in that model's own tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.models import Examined
from model.errors import UserError

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class HeldOutDocument:
    """One document: its tokens (n,) and the exact number of UTF-8 bytes that all of them stand for."""

    name: str
    tokens: IntArray
    n_bytes: int


class Haystack:
    """Held-out documents; rows and fillers never cross from one document into another."""

    def __init__(self, name: str, documents: list[HeldOutDocument]) -> None:
        self.name = name
        self.documents = [d for d in documents if len(d.tokens) > 1]
        if not self.documents:
            raise UserError(f"held-out text {name!r} is empty; give some with --text FILE")

    def filler(self, index: int, length: int, seed: int) -> IntArray:
        """The `index`-th stretch of `length` tokens: a pure function of (seed, index)."""
        fitting = [d.tokens for d in self.documents if len(d.tokens) >= length]
        if not fitting:
            longest = max(len(d.tokens) for d in self.documents)
            raise UserError(
                f"held-out text {self.name!r}: its longest document has {longest:,} tokens, {length:,} are needed; "
                "give a longer text with --text FILE, or shorter --distances"
            )
        rng = np.random.default_rng([seed, 7, index])
        rooms = np.array([len(tokens) - length + 1 for tokens in fitting], dtype=np.int64)
        at = int(rng.integers(rooms.sum()))
        chosen = int(np.searchsorted(np.cumsum(rooms), at, side="right"))
        start = at - int(rooms[:chosen].sum())
        return fitting[chosen][start : start + length]

    def rows(self, n: int, length: int, seed: int) -> Tensor:
        """(n, length) int64: n stretches of held-out text."""
        return torch.from_numpy(np.stack([self.filler(i, length, seed) for i in range(n)]))


def open_haystack(
    examined: Examined, text: str | None = None, config: str | None = None, max_tokens: int | None = None
) -> Haystack:
    """--text FILE, or the held-out text of --data CONFIG, of the run, or of the novels. UserError when there is none.

    `max_tokens` cuts the text short; bytes stay exact (text that is tokenised here is cut before, at 4 bytes a token).
    """
    if examined.settings and not (config or text):
        return from_store(examined, max_tokens)
    return read_haystack(examined.tokenizer, text, config, max_tokens)


def read_haystack(
    tokenizer: Any, text: str | None = None, config: str | None = None, max_tokens: int | None = None
) -> Haystack:
    """The file `text`, the held-out text of a config, or the held-out novels, in the tokens of any tokenizer."""
    texts = [(Path(text).name, _read(text))] if text else _held_out_texts(config)
    name = Path(text).name if text else config or "held-out novels"
    return Haystack(name, encode_documents(tokenizer, texts, max_tokens and 4 * max_tokens))


def _held_out_texts(config: str | None) -> list[tuple[str, str]]:
    from data.sources import documents
    from training.settings.config_file import load_settings
    from training.settings.schema import DataSettings

    data = load_settings(config, []).data if config else DataSettings.model_validate({})
    return [(document.name, document.text) for document in documents(data, "heldout")]


def _read(text: str) -> str:
    try:
        return Path(text).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"--text {text!r}: no such file") from error
    except (UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"--text {text!r} can't be read as UTF-8 text: {error}") from error


def encode_documents(
    tokenizer: Any, texts: list[tuple[str, str]], max_bytes: int | None = None
) -> list[HeldOutDocument]:
    """Tokenise the texts, at most about `max_bytes` of them; a document is cut between two characters."""
    encoded, left = [], max_bytes if max_bytes is not None else sum(len(text.encode()) for _, text in texts)
    for name, text in texts:
        cut = text.encode()[:left].decode(errors="ignore")
        left -= len(cut.encode())
        if cut:
            tokens = np.asarray(tokenizer.encode(cut), dtype=np.int64)
            encoded.append(HeldOutDocument(name, tokens, len(cut.encode())))
    return encoded


def from_store(examined: Examined, max_tokens: int | None = None) -> Haystack:
    """The held-out tokens of a run, from its cache on disk (made again if it is gone)."""
    from data.token_store import prepare_tokens

    _, store = prepare_tokens(examined.trained_with(), examined.tokenizer)
    starts = [int(start) for start in store.document_starts]
    ends = [*starts[1:], len(store.tokens)]
    documents, left = [], max_tokens if max_tokens is not None else len(store.tokens)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        end = min(end, start + left)
        if end - start > 1:
            tokens = np.asarray(store.tokens[start:end], dtype=np.int64)
            documents.append(HeldOutDocument(store.names[i], tokens, int(store.bytes_of(start, end))))
            left -= end - start
    return Haystack("held-out text of the run", documents)
