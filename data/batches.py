"""Batches as pure functions of (seed, step, row): a resume restores nothing, and ranks may divide the rows in any way.

Legend: B sequences, T positions. Labels are already shifted: labels[b, t] is what position t must predict.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.mixture import Mixture
from data.tasks import TASKS
from data.tasks.draws import Draws, IntArray
from data.tasks.layout import DEFAULT_RULES, RowRules, clean_filler, filler_room, task_size, training_rows
from data.tasks.question import DEFAULT_OPTIONS, UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Every tensor but `groups` is (B, T) int64. Labels are -100 where nothing is scored."""

    input_ids: Tensor
    labels: Tensor  # the next token within the document; in recall sequences only where text follows text
    documents: Tensor  # number of the document within its sequence; documents never see each other
    recall_labels: Tensor  # the answer, at queries
    relay_labels: Tensor  # number of the value that the relay head must name, at some filler positions
    relay_layers: Tensor  # number of the layer after which the relay head reads there, else 0
    distances: Tensor  # tokens from query back to value, at queries, else 0
    groups: Tensor  # (B,) number of the recall task of each sequence, or of the source of its text


def text_batch(mixture: Mixture, step: int, rows: range) -> Batch:
    """Sequences `rows` of a step."""
    texts, sources = mixture.read(step, rows)
    tokens, labels, documents = map(np.stack, zip(*texts))
    return _batch(_blank(tokens) | {"labels": labels, "documents": documents, "groups": sources})


def recall_batch(
    store: TokenStore, vocab: RecallVocabulary, seed: int, step: int, rows: range, seq_len: int,
    max_distances: Mapping[str, int], tasks: Mapping[str, float],
    rules: RowRules = DEFAULT_RULES, options: TaskOptions = DEFAULT_OPTIONS,
) -> Batch:  # fmt: skip
    """Recall sequences of `seq_len` tokens. `tasks` gives each task's share, `max_distances` its largest distance.

    The filler is any stretch of the store, across documents too; each sequence counts as one document.
    Raises UserError when `seq_len` is too short for a distance.
    """
    draws, ends = Draws(seed, step, rows), np.cumsum(list(tasks.values()))
    arrays = _blank(np.zeros((len(rows), seq_len), dtype=np.int64))
    arrays["groups"] = np.searchsorted(ends, draws.uniform("task", 1)[:, 0] * ends[-1], side="right")
    for number, task in enumerate(tasks):
        distance = max_distances[task]
        needed = task_size(task, vocab, options).row(distance)
        if seq_len < needed:
            what = f"recall.seq_len is {seq_len} and the distance of {task} {distance}"
            raise UserError(f"{what}: rows of at least {needed} tokens are needed")
        of_task = arrays["groups"] == number
        if not of_task.any():
            continue
        text, documents = _fillers(draws.of(of_task), store, vocab, seq_len, TASKS[task].noise)
        filler = clean_filler(text, vocab)
        laid = training_rows(draws.of(of_task), filler, vocab, distance, rules, task, options)
        arrays["input_ids"][of_task], arrays["recall_labels"][of_task] = laid.tokens, laid.answers
        arrays["labels"][of_task] = _filler_labels(text, documents, vocab, laid.tokens)
        arrays["relay_labels"][of_task], arrays["relay_layers"][of_task] = laid.relays, laid.relay_layers
        arrays["distances"][of_task] = laid.distances
    return _batch(arrays)


def _fillers(
    draws: Draws, store: TokenStore, vocab: RecallVocabulary, seq_len: int, noise: bool
) -> tuple[IntArray, IntArray]:
    """(B, T) filler of each sequence, and the number of the document of each token; -1 for what is not scored."""
    if noise:
        filler = vocab.plain[draws.integers("noise", seq_len, len(vocab.plain))]
        return filler, np.full_like(filler, -1)
    starts = draws.integers("start", 1, filler_room(store, seq_len))[:, 0].tolist()
    text, documents = map(np.stack, zip(*(store.read(start, seq_len) for start in starts)))
    scored = np.stack([store.scored(start, seq_len) for start in starts])
    return text, np.where(scored, documents, -1)


def _filler_labels(text: IntArray, documents: IntArray, vocab: RecallVocabulary, tokens: IntArray) -> IntArray:
    """(B, T) next tokens where text follows text as in the store. Noise is not scored: nobody can predict it."""
    plain = (documents >= 0) & (tokens == text) & ~np.isin(tokens, vocab.reserved)
    scored = plain[:, :-1] & plain[:, 1:] & (documents[:, :-1] == documents[:, 1:])
    return np.pad(np.where(scored, tokens[:, 1:], UNSCORED), ((0, 0), (0, 1)), constant_values=UNSCORED)


def _blank(input_ids: IntArray) -> dict[str, IntArray]:
    """The arrays of a batch that asks for nothing."""
    arrays = {name: np.full_like(input_ids, UNSCORED) for name in ("labels", "recall_labels", "relay_labels")}
    arrays |= {name: np.zeros_like(input_ids) for name in ("documents", "relay_layers", "distances")}
    return arrays | {"input_ids": input_ids, "groups": np.zeros(len(input_ids), dtype=np.int64)}


def _batch(arrays: dict[str, IntArray]) -> Batch:
    return Batch(**{name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()})
