"""Held-out text: the haystack of the recall tasks, and the text that losses are measured on.

`--text FILE` and `--data CONFIG` choose it. By default a run uses the held-out part of its own data, and any other
model the held-out novels in its own tokens.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.models import Examined
from model.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from data.token_store import TokenStore

IntArray = NDArray[np.int64]


class HeldOutDocument(NamedTuple):
    """One document: its tokens (n,), the exact number of UTF-8 bytes of their text, and the name of its source.

    Of a conversation only the answers count: `scored` (n,) marks their tokens, and `n_bytes` are theirs.
    """

    tokens: IntArray
    n_bytes: int
    source: str = ""
    scored: NDArray[np.bool_] | None = None


class Haystack:
    """Held-out documents. No stretch of text crosses the border between two documents."""

    def __init__(self, name: str, documents: list[HeldOutDocument]) -> None:
        self.name = name
        self.documents = [d for d in documents if len(d.tokens) > 1 and (d.scored is None or d.scored[1:].any())]
        if not self.documents:
            raise UserError(
                f"held-out text {name!r} has no document of two tokens; give a longer text with --text FILE, or raise "
                "--max-tokens if you gave it"
            )

    def filler(self, index: int, length: int, seed: int) -> IntArray:
        """(length,) tokens of stretch `index`, a pure function of (seed, index); UserError if all are shorter."""
        long_enough = [document.tokens for document in self.documents if len(document.tokens) >= length]
        if not long_enough:
            longest = max(len(document.tokens) for document in self.documents)
            raise UserError(
                f"held-out text {self.name!r}: its longest document has {longest:,} tokens, {length:,} are needed; "
                "give a longer text with --text FILE, or ask for shorter distances or contexts"
            )
        rooms = [len(tokens) - length + 1 for tokens in long_enough]
        start = int(np.random.default_rng([seed, 7, index]).integers(sum(rooms)))
        document = int(np.searchsorted(np.cumsum(rooms), start, side="right"))
        start -= sum(rooms[:document])
        return long_enough[document][start : start + length]

    def rows(self, n: int, length: int, seed: int) -> "Tensor":
        """(n, length) int64 token ids of n stretches."""
        import torch

        return torch.from_numpy(np.stack([self.filler(i, length, seed) for i in range(n)]))


def open_haystack(
    examined: Examined, text: str | None = None, config: str | None = None, max_tokens: int | None = None
) -> Haystack:
    """The held-out text of `--text`, `--data`, the run, or the novels, in this order; UserError if it is missing.

    `max_tokens` cuts it short: exactly for a run, whose tokens come from its cache on disk, else at 4 bytes a token.
    """
    if not examined.settings or config or text:
        return read_haystack(examined.tokenizer, text, config, max_tokens)
    from data.mixture import open_sources, prepare_sources
    from training.run.folder import check_same_data, data_hashes, read_facts

    assert examined.run_dir is not None, "a model with settings has a run folder"
    settings = examined.trained_with()
    sources = open_sources(prepare_sources(settings, examined.tokenizer), examined.tokenizer, settings.data)
    hashes = {name: sha256 for name, sha256 in data_hashes(sources).items() if name.endswith("heldout")}
    now = {"data_sha256": hashes, "tokenizer_sha256": examined.tokenizer.sha256}
    check_same_data(examined.run_dir, read_facts(examined.run_dir), now)
    documents = []
    for name, source in sources.items():
        left = source.heldout.n_tokens if max_tokens is None else max_tokens // len(sources)
        for start, end in source.heldout.documents():
            end = min(end, start + left)
            left -= end - start
            if start == end:
                break
            documents.append(_document(source.heldout, start, end, name))
    return Haystack("held-out text of the run", documents)


def _document(store: "TokenStore", start: int, end: int, source: str) -> HeldOutDocument:
    tokens, _ = store.read(start, end - start)
    if not store.conversations:
        return HeldOutDocument(tokens, store.bytes_of(start, end), source)
    scored = store.scored(start, end - start)
    return HeldOutDocument(tokens, int(store.token_bytes[tokens[scored]].sum()), source, scored)


def read_haystack(
    tokenizer: Any, text: str | None = None, config: str | None = None, max_tokens: int | None = None
) -> Haystack:
    """The file `text`, the held-out text of a config, or the held-out novels, in the tokens of any tokenizer."""
    from data.sources import texts as texts_of
    from training.settings.config_file import load_settings
    from training.settings.schema import DataSettings

    if text:
        try:
            name, texts = Path(text).name, iter([Path(text).read_text(encoding="utf-8")])
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"--text {text!r} can't be read: {error}; give a file of UTF-8 text") from error
    else:
        data = load_settings(config).data if config else DataSettings.model_validate({})
        name = config or "held-out novels"
        texts = chain.from_iterable(texts_of(source, "heldout") for source in data.mixture)
    return Haystack(name, encode_documents(tokenizer, texts, max_tokens and 4 * max_tokens))


def encode_documents(tokenizer: Any, texts: Iterable[str], max_bytes: int | None) -> list[HeldOutDocument]:
    """Tokenise the texts, at most `max_bytes` of them in all. The last one is cut between two characters."""
    documents, left = [], 1 << 62 if max_bytes is None else max_bytes
    for text in texts:
        cut = text.encode()[:left].decode(errors="ignore")
        n_bytes = len(cut.encode())
        left -= n_bytes
        if cut:
            documents.append(HeldOutDocument(np.asarray(tokenizer.encode(cut), dtype=np.int64), n_bytes))
        if cut != text:  # the others may be far more than fits into memory
            break
    return documents
