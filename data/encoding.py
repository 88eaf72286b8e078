"""Encodes documents into token ids with worker processes. Ids and order are the same for any number of workers."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chat.messages import BadRow, content_of, conversation_of
from data.chat.template import ChatTemplate
from data.sources import SPLITS, Part, split_of, text_of, value_of
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

BATCH = 1 << 20  # characters of a batch; a longer document is a batch of its own
FEW = 8  # batches: less text is encoded here, because workers need a second or two to start
AHEAD = 4  # batches for each worker that wait or are at work; they bound the memory

_encoder: "Encoder"  # of a worker process


class Position(NamedTuple):
    """A row of a source: number of the part, and of the row within it."""

    part: int
    row: int


class Rows(NamedTuple):
    """Consecutive rows of one part, the first of them at `first`."""

    first: Position
    split: str | None
    rows: list[Any]


class Document(NamedTuple):
    """A document in tokens."""

    tokens: NDArray[Any]  # (n,) between the tokenizer's markers, or as the chat template has written it
    answers: NDArray[np.int64]  # (answers, 4) `Answer` each; none of a text
    n_bytes: int  # of its text, in UTF-8
    content: bytes  # by which it is known


class Encoded(NamedTuple):
    """Documents of one split."""

    tokens: NDArray[Any]  # (n,) uint16 or uint32, all documents in order
    lengths: NDArray[np.int64]  # (documents,) tokens of each
    sizes: NDArray[np.int64]  # (documents,) UTF-8 bytes of their text
    answers: NDArray[np.int64]  # (answers, 4) `Answer` each, positions in `tokens`

    def first(self, n: int) -> "Encoded":
        """The first `n` documents."""
        tokens = int(self.lengths[:n].sum())
        answers = self.answers[self.answers[:, 1] <= tokens]
        return Encoded(self.tokens[:tokens], self.lengths[:n], self.sizes[:n], answers)


class Batch(NamedTuple):
    """What a worker returns for some rows. `bad` are the rows without text, each with the reason."""

    splits: dict[str, Encoded]
    bad: list[tuple[Position, str]]


class Encoder(NamedTuple):
    """Encodes rows. `share` of the documents are held out where their part does not say."""

    tokenizer: "Tokenizer"
    columns: tuple[str, ...]
    share: float
    chat: ChatTemplate | None = None  # for conversations

    def __call__(self, batch: list[Rows]) -> Batch:
        splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
        bad = []
        for (part, first), named, rows in batch:
            for number, row in enumerate(rows, first):
                try:
                    document = self._conversation(row, self.chat) if self.chat else self._text(row)
                except BadRow as reason:
                    bad.append((Position(part, number), str(reason)))
                    continue
                if document is not None:
                    splits[named or split_of(document.content, self.share)].append(document)
        return Batch({split: _joined(docs, token_dtype(self.tokenizer)) for split, docs in splits.items()}, bad)

    def _text(self, row: Any) -> Document | None:
        """None if it is empty."""
        tokenizer, dtype = self.tokenizer, token_dtype(self.tokenizer)
        text, content = text_of(row, self.columns)
        if not text.strip():
            return None
        before, after = (np.array([] if i is None else [i], dtype) for i in (tokenizer.bos_id, tokenizer.eos_id))
        ids = np.concatenate([before, *(np.array(tokenizer.encode(t), dtype) for t in self._cut(text)), after])
        return Document(ids, np.zeros((0, 4), np.int64), len(content), content)

    def _conversation(self, row: Any, chat: ChatTemplate) -> Document:
        messages = conversation_of(value_of(row, self.columns), self.columns)
        content, n_bytes = content_of(messages), sum(len(message["content"].encode()) for message in messages)
        ids, answers = chat.encode(messages)
        return Document(np.array(ids, token_dtype(self.tokenizer)), np.array(answers, np.int64), n_bytes, content)

    def _cut(self, text: str) -> Iterator[str]:
        """A long text in parts, where that changes no id: the ids of a whole book as a list take 50 bytes a byte."""
        start = 0
        while start < len(text):
            end = text.find("\n", start + BATCH) + 1 if self.tokenizer.lines_apart else 0
            yield text[start : end or len(text)]
            start = end or len(text)


def _joined(documents: list[Document], dtype: np.dtype[Any]) -> Encoded:
    lengths, sizes = np.array([(len(d.tokens), d.n_bytes) for d in documents], dtype=np.int64).reshape(-1, 2).T
    starts = (lengths.cumsum() - lengths).tolist()
    answers = [np.zeros((0, 4), np.int64), *(moved(d.answers, start) for d, start in zip(documents, starts))]
    tokens = np.concatenate([np.zeros(0, dtype), *(d.tokens for d in documents)])
    return Encoded(tokens, lengths, sizes, np.concatenate(answers))


def moved(answers: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """(answers, 4) the positions of the same answers if so many tokens come before."""
    return np.where(answers < 0, answers, answers + tokens)


def token_dtype(tokenizer: "Tokenizer") -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encoded(
    parts: Sequence[Part], start: Position, encoder: Encoder, workers: int | None = None
) -> Iterator[tuple[Batch, Position, int]]:
    """The documents from `start` on in batches, each with the position after it and about the bytes that it read.

    `workers` is the number of processes; default: one for each core of this process.
    Raises `UserError` if a worker was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches, workers = _batches(parts, start), workers or cores
    first = list(islice(batches, FEW))
    if workers == 1 or len(first) < FEW:
        yield from ((encoder(rows), end, n_bytes) for rows, end, n_bytes in chain(first, batches))
        return
    # Not forked: this process may have threads and a GPU.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,))
    waiting: deque[tuple[Future[Batch], Position, int]] = deque()
    try:
        for rows, end, n_bytes in chain(first, batches):
            waiting.append((pool.submit(_encode_in_worker, rows), end, n_bytes))
            if len(waiting) == AHEAD * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encodes text was killed, perhaps for lack of memory; run the same command again: it goes "
            "on where it stopped (or scripts/prepare_data.py CONFIG.yaml --workers N, with fewer processes)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_unguarded_main() -> None:
    """Raises RuntimeError in a worker that runs the program anew, which would wait for its own main process."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what `multiprocessing` itself looks at
        raise RuntimeError('text is encoded in worker processes; put the program under `if __name__ == "__main__":`')


def _batches(parts: Sequence[Part], start: Position) -> Iterator[tuple[list[Rows], Position, int]]:
    batch: list[Rows] = []
    size = 0
    for number, part in enumerate(parts[start.part :], start.part):
        first = row_number = start.row if number == start.part else 0
        rows: list[Any] = []
        for row in part.rows(first):
            rows.append(row)
            row_number += 1
            size += len(row if isinstance(row, (str, bytes)) else repr(row))
            if size >= BATCH:
                yield [*batch, Rows(Position(number, first), part.split, rows)], Position(number, row_number), size
                batch, rows, first, size = [], [], row_number, 0
        if rows:
            batch.append(Rows(Position(number, first), part.split, rows))
    if batch:
        yield batch, Position(len(parts), 0), size


def _result(future: Future[Batch], end: Position, n_bytes: int) -> tuple[Batch, Position, int]:
    return future.result(), end, n_bytes


def _encode_in_worker(batch: list[Rows]) -> Batch:
    return _encoder(batch)


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the main process too, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    """A worker of a killed process would wait for a batch for ever."""
    main = multiprocessing.parent_process()
    assert main is not None, "only a worker process calls this"
    main.join()
    os._exit(1)
