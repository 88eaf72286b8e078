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

from data.draws import Draws
from data.packing import TokenStore
from data.recall import DEFAULT_RULES, UNSCORED, RowRules, clean_filler, filler_room, max_row_distance, training_rows
from data.recall_vocabulary import RecallVocabulary
from model.errors import UserError

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Every tensor is (B, T) int64; -100 is unscored."""

    input_ids: Tensor
    labels: Tensor  # next token, never across a document's end; on recall rows filler after filler of real text only
    documents: Tensor  # number of the document within its row: documents never see each other
    recall_labels: Tensor  # the value token, at queries
    relay_labels: Tensor  # index of the value that a filler position should carry
    relay_layers: Tensor  # number of the layer from which on, there, else 0
    distances: Tensor  # tokens from query back to value, at queries, else 0


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
    max_distance: int,
    tasks: Mapping[str, float],
    rules: RowRules = DEFAULT_RULES,
) -> Batch:
    """Recall rows of T tokens with distances on [1, max_distance]; `tasks` gives the share of rows of each task.

    The text of a row is any stretch of the store, over the ends of documents too; the row counts as one document.
    Raises `UserError` when the rows are too short for the distance.
    """
    if max_distance > max_row_distance(vocab, seq_len):
        raise UserError(
            f"recall.seq_len is {seq_len} and the distance {max_distance}: "
            f"rows of at least {max_distance + 1 + len(vocab.needle)} tokens are needed"
        )
    draws = Draws(seed, step, rows)
    filler, positions = _fillers(draws, store, vocab, seq_len, tasks)
    made = training_rows(draws, filler, vocab, max_distance, rules)
    labels = _filler_labels(store, positions, made.tokens)
    return _batch(
        made.tokens, labels, np.zeros_like(labels), made.answers, made.relays, made.relay_layers, made.distances
    )


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, chunks: int) -> IntArray:
    """(chunks,) the order of an epoch; two are kept, for steps that straddle."""
    return np.random.default_rng([seed, epoch]).permutation(chunks)


def _fillers(
    draws: Draws, store: TokenStore, vocab: RecallVocabulary, seq_len: int, tasks: Mapping[str, float]
) -> tuple[IntArray, IntArray]:
    """(B, T) clean filler of each row's task, and its positions in the store; those of noise are -1."""
    shares = np.cumsum(list(tasks.values()))
    task = np.searchsorted(shares, draws.uniform("task", 1)[:, 0] * shares[-1], side="right")
    noise = np.array([name == "needle-noise" for name in tasks])[task]
    filler = vocab.plain[draws.integers("noise", seq_len, len(vocab.plain))]
    positions = np.full_like(filler, -1)
    if not noise.all():
        starts = draws.integers("start", 1, filler_room(store, seq_len))
        positions[~noise] = starts[~noise] + np.arange(seq_len)
        filler[~noise] = clean_filler(store.tokens[positions[~noise]].astype(np.int64), vocab)
    return filler, positions


def _filler_labels(store: TokenStore, positions: IntArray, tokens: IntArray) -> IntArray:
    """(B, T) next tokens where text follows text as in the store; noise can't be predicted."""
    labels = np.full_like(tokens, UNSCORED)
    plain = (positions >= 0) & (tokens == store.tokens[positions])
    document = np.searchsorted(store.document_starts, positions, side="right")
    scored = plain[:, :-1] & plain[:, 1:] & (document[:, :-1] == document[:, 1:])
    labels[:, :-1] = np.where(scored, tokens[:, 1:], UNSCORED)
    return labels


def _batch(ids: IntArray, labels: IntArray, documents: IntArray, *recall: IntArray) -> Batch:
    """Without recall arrays nothing is asked."""
    nothing = (np.full_like(ids, UNSCORED), np.full_like(ids, UNSCORED), np.zeros_like(ids), np.zeros_like(ids))
    arrays = (ids, labels, documents, *(recall or nothing))
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
