"""Batches as pure functions of (seed, step, row): nothing to save, nothing to skip on resume, any split over ranks.

Legend: B rows, T positions. Labels are already shifted: labels[b, t] is what position t must predict.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.tasks import TASKS
from data.tasks.draws import Draws
from data.tasks.layout import DEFAULT_RULES, RowRules, clean_filler, filler_room, task_size, training_rows
from data.tasks.question import DEFAULT_OPTIONS, UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.errors import UserError

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Every tensor but the last is (B, T) int64; -100 is unscored."""

    input_ids: Tensor
    labels: Tensor  # next token, never across a document's end; on recall rows filler after filler of real text only
    documents: Tensor  # number of the document within its row: documents never see each other
    recall_labels: Tensor  # the answer, at queries
    relay_labels: Tensor  # number of the value that a filler position should carry
    relay_layers: Tensor  # number of the layer from which on, there, else 0
    distances: Tensor  # tokens from query back to value, at queries, else 0
    tasks: Tensor  # (B,) number of the row's recall task among those asked for; 0 on text


def text_batch(store: TokenStore, seed: int, step: int, rows: range, seq_len: int, *, rows_per_step: int) -> Batch:
    """Rows `rows` of the `rows_per_step` of a step; an epoch is a seeded permutation of all chunks of T tokens.

    Raises `UserError` when the text is shorter than one row.
    """
    chunks = (len(store.tokens) - 1) // seq_len
    if chunks < 1:
        raise UserError(
            f"data.seq_len is {seq_len:,} and the training text has {len(store.tokens):,} tokens; "
            "lower it or give more text"
        )
    numbers = np.arange(rows.start, rows.stop, dtype=np.int64) + step * rows_per_step
    order = [_epoch(seed, int(n) // chunks, chunks)[int(n) % chunks] for n in numbers]
    positions = np.array(order, dtype=np.int64)[:, None] * seq_len + np.arange(seq_len + 1)
    tokens = store.tokens[positions].astype(np.int64)
    document = np.searchsorted(store.document_starts, positions, side="right")
    labels = np.where(document[:, 1:] == document[:, :-1], tokens[:, 1:], UNSCORED)
    return _batch(tokens[:, :-1], labels, document[:, :-1] - document[:, :1])


def recall_batch(
    store: TokenStore,
    vocab: RecallVocabulary,
    seed: int,
    step: int,
    rows: range,
    seq_len: int,
    max_distances: Mapping[str, int],
    tasks: Mapping[str, float],
    rules: RowRules = DEFAULT_RULES,
    options: TaskOptions = DEFAULT_OPTIONS,
) -> Batch:
    """Recall rows of T tokens; `tasks` gives the share of rows of each task, `max_distances` how far each one asks.

    The text of a row is any stretch of the store, over the ends of documents too; the row counts as one document.
    Raises `UserError` when the rows are too short for a distance.
    """
    draws = Draws(seed, step, rows)
    number = _task_numbers(draws, list(tasks.values()))
    made = np.zeros((6, len(rows), seq_len), dtype=np.int64)
    for i, task in enumerate(tasks):
        _check_length(task, vocab, options, seq_len, max_distances[task])
        if (mine := number == i).any():
            made[:, mine] = _task_rows(draws.of(mine), store, vocab, seq_len, max_distances[task], task, rules, options)
    tokens, labels, *recall = made
    return _batch(tokens, labels, np.zeros_like(labels), *recall, tasks=number)


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, chunks: int) -> IntArray:
    """(chunks,) the order of an epoch; two are kept, for steps that straddle."""
    return np.random.default_rng([seed, epoch]).permutation(chunks)


def _check_length(task: str, vocab: RecallVocabulary, options: TaskOptions, seq_len: int, distance: int) -> None:
    needed = task_size(task, vocab, options).row(distance)
    if seq_len < needed:
        raise UserError(
            f"recall.seq_len is {seq_len} and the distance of {task} {distance}: "
            f"rows of at least {needed} tokens are needed"
        )


def _task_numbers(draws: Draws, shares: list[float]) -> IntArray:
    """(B,) which task each row is of."""
    ends = np.cumsum(shares)
    return np.searchsorted(ends, draws.uniform("task", 1)[:, 0] * ends[-1], side="right")


def _task_rows(
    draws: Draws,
    store: TokenStore,
    vocab: RecallVocabulary,
    seq_len: int,
    max_distance: int,
    task: str,
    rules: RowRules,
    options: TaskOptions,
) -> IntArray:
    """(6, B, T) tokens, text labels, and the other arrays of `RecallRows`, for rows of one task."""
    filler, positions = _fillers(draws, store, vocab, seq_len, TASKS[task].noise)
    made = training_rows(draws, filler, vocab, max_distance, rules, task, options)
    labels = _filler_labels(store, vocab, positions, made.tokens)
    return np.stack((made.tokens, labels, made.answers, made.relays, made.relay_layers, made.distances))


def _fillers(
    draws: Draws, store: TokenStore, vocab: RecallVocabulary, seq_len: int, noise: bool
) -> tuple[IntArray, IntArray]:
    """(B, T) clean filler of each row, and its positions in the store; those of noise are -1."""
    if noise:
        filler = vocab.plain[draws.integers("noise", seq_len, len(vocab.plain))]
        return filler, np.full_like(filler, -1)
    positions = draws.integers("start", 1, filler_room(store, seq_len)) + np.arange(seq_len)
    return clean_filler(store.tokens[positions].astype(np.int64), vocab), positions


def _filler_labels(store: TokenStore, vocab: RecallVocabulary, positions: IntArray, tokens: IntArray) -> IntArray:
    """(B, T) next tokens where text follows text as in the store; noise can't be predicted."""
    labels = np.full_like(tokens, UNSCORED)
    plain = (positions >= 0) & (tokens == store.tokens[positions]) & ~np.isin(tokens, vocab.reserved)
    document = np.searchsorted(store.document_starts, positions, side="right")
    scored = plain[:, :-1] & plain[:, 1:] & (document[:, :-1] == document[:, 1:])
    labels[:, :-1] = np.where(scored, tokens[:, 1:], UNSCORED)
    return labels


def _batch(
    ids: IntArray, labels: IntArray, documents: IntArray, *recall: IntArray, tasks: IntArray | None = None
) -> Batch:
    """Without recall arrays nothing is asked."""
    nothing = (np.full_like(ids, UNSCORED), np.full_like(ids, UNSCORED), np.zeros_like(ids), np.zeros_like(ids))
    numbers = np.zeros(len(ids), dtype=np.int64) if tasks is None else tasks
    arrays = (ids, labels, documents, *(recall or nothing), numbers)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
