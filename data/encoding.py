"""Token ids of documents, encoded by worker processes: the same ids in the same order for any number of workers."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

BATCH = 1 << 20  # characters of a batch; a longer document is a batch of its own
FEW = 8  # batches: less text is encoded here, because workers need a second or two to start
AHEAD = 4  # batches for each worker that wait or are at work; they bound the memory

_tokenizer: "Tokenizer"  # of a worker process


class Encoded(NamedTuple):
    """The documents of a batch, each between the tokenizer's markers."""

    tokens: NDArray[Any]  # (n,) uint16 or uint32, all documents in order
    lengths: NDArray[np.int64]  # (documents,) tokens of each
    text_bytes: int  # UTF-8


def token_dtype(tokenizer: "Tokenizer") -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encoded(texts: Iterable[str], tokenizer: "Tokenizer", workers: int | None = None) -> Iterator[Encoded]:
    """The documents in batches. `workers` is the number of processes; default: one for each core of this process.

    Raises `UserError` if a worker was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches, workers = _batches(texts), workers or cores
    first = list(islice(batches, FEW))
    if workers == 1 or len(first) < FEW:
        yield from map(partial(_encode, tokenizer), chain(first, batches))
        return
    # Not forked: this process may have threads and a GPU.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in chain(first, batches):
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
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


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: "Tokenizer", texts: list[str]) -> Encoded:
    dtype = token_dtype(tokenizer)
    before, after = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    ids = [np.array([*before, *tokenizer.encode(text), *after], dtype=dtype) for text in texts]
    return Encoded(np.concatenate(ids), np.array([len(i) for i in ids]), sum(len(text.encode()) for text in texts))


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _encode(_tokenizer, texts)


def _start_worker(tokenizer: "Tokenizer") -> None:
    global _tokenizer
    _tokenizer = tokenizer
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the main process too, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    """A worker of a killed process would wait for a batch for ever."""
    main = multiprocessing.parent_process()
    assert main is not None, "only a worker process calls this"
    main.join()
    os._exit(1)
