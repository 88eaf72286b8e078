"""Batches: pure functions of (seed, step, row), each text row once an epoch, no label across a document's end."""

import itertools
import time
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.batches import recall_batch, text_batch
from data.mixture import BestFitRows, ConcatRows, Mixture, Shares, prepare_best_fit
from data.tasks.layout import RowRules
from data.tasks.question import UNSCORED
from model.errors import UserError

TASKS = {"needle": 3.0, "needle-noise": 1.0}


def far(distance, tasks=TASKS):
    """D of each task."""
    return dict.fromkeys(tasks, distance)


def equal(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def joined(parts):
    kind = type(parts[0])
    return kind(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(kind)))


def alone(rows, rows_per_step, seed=0):
    """A mixture of one source."""
    return Mixture({"": rows}, Shares([1.0], rows_per_step, max_steps=1000, seed=seed))


def makers(store, vocab):
    def text(step, rows, seed=0):
        return text_batch(alone(ConcatRows(store, 32), 8, seed), step, rows)

    def recall(step, rows, seed=0):
        return recall_batch(store, vocab, seed, step, rows, 64, far(40), TASKS)

    return text, recall


@pytest.mark.parametrize("kind", [0, 1])
def test_the_same_step_gives_the_same_bytes_in_any_order_of_steps(kind, store, vocab):
    make = makers(store, vocab)[kind]
    forward = [make(step, range(8)) for step in range(20)]
    assert all(equal(make(step, range(8)), forward[step]) for step in reversed(range(20)))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 1, 2, 7, 8)])
def test_rows_split_over_ranks_are_the_rows_of_the_whole_batch(kind, cuts, store, vocab):
    make = makers(store, vocab)[kind]
    parts = [make(5, range(a, b)) for a, b in itertools.pairwise(cuts)]
    assert equal(joined(parts), make(5, range(8)))


@pytest.mark.parametrize("kind", [0, 1])
def test_another_step_or_seed_gives_other_rows(kind, store, vocab):
    make = makers(store, vocab)[kind]
    first = make(0, range(8)).input_ids
    assert not torch.equal(first, make(1, range(8)).input_ids)
    assert not torch.equal(first, make(0, range(8), seed=1).input_ids)


@given(rows_per_step=st.integers(1, 9))
def test_every_row_is_seen_once_an_epoch_and_in_another_order_in_the_next(store, rows_per_step):
    n, mixture = (store.n_tokens - 1) // 64, alone(ConcatRows(store, 64), rows_per_step, seed=3)
    rows = [
        tuple(row.tolist())
        for step in range(2 * n // rows_per_step + 1)
        for row in text_batch(mixture, step, range(rows_per_step)).input_ids
    ]
    expected = sorted(tuple(store.read(i * 64, 64)[0].tolist()) for i in range(n))
    assert sorted(rows[:n]) == sorted(rows[n : 2 * n]) == expected
    assert rows[:n] != rows[n : 2 * n]


def test_text_labels_are_the_next_tokens_and_never_cross_into_another_document(store):
    rows = ConcatRows(store, 32)
    batch = text_batch(alone(rows, len(rows)), 0, range(len(rows)))
    inner = batch.labels[:, :-1]
    crossing = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert crossing.any()
    assert (inner[crossing] == UNSCORED).all()
    assert torch.equal(inner[~crossing], batch.input_ids[:, 1:][~crossing])
    first = {tuple(store.read(start, 2)[0].tolist()) for start, _ in store.documents()}
    begun = {tuple(p) for p in zip(batch.input_ids[:, 1:-1][crossing[:, :-1]].tolist(),
                                   batch.input_ids[:, 2:][crossing[:, :-1]].tolist())}  # fmt: skip
    assert begun <= first


def test_text_batches_ask_for_no_recall(store):
    batch = text_batch(alone(ConcatRows(store, 32), 4), 0, range(4))
    assert (batch.recall_labels == UNSCORED).all()
    assert (batch.relay_labels == UNSCORED).all()
    assert (batch.distances == 0).all()


def test_recall_labels_name_the_value_that_stands_at_the_distance(store, vocab):
    batch = recall_batch(store, vocab, 0, 0, range(32), 64, far(40), TASKS)
    rows, ends = batch.distances.nonzero(as_tuple=True)
    assert len(rows) >= 32
    values = batch.input_ids[rows, ends - batch.distances[rows, ends]]
    assert torch.equal(values, batch.recall_labels[rows, ends])
    assert set(values.tolist()) <= set(vocab.values)
    assert (batch.input_ids[rows, ends] == vocab.query[0]).all()


def test_text_labels_of_recall_rows_score_filler_after_filler_only(store, vocab):
    batch = recall_batch(store, vocab, 0, 0, range(64), 64, far(40), {"needle": 1.0})
    reserved = torch.isin(batch.input_ids, torch.from_numpy(vocab.reserved))
    scored = batch.labels[:, :-1] != UNSCORED
    assert scored.float().mean() > 0.7
    assert not (scored & (reserved[:, :-1] | reserved[:, 1:])).any()
    assert torch.equal(batch.labels[:, :-1][scored], batch.input_ids[:, 1:][scored])
    starts = batch.input_ids[:, 1:] == 1
    assert starts.any()
    assert not (scored & starts).any()


def test_noise_is_never_scored_as_text_and_holds_plain_pieces_only(store, vocab):
    batch = recall_batch(store, vocab, 0, 0, range(16), 64, far(40), {"needle-noise": 1.0})
    assert (batch.labels == UNSCORED).all()
    assert np.isin(batch.input_ids.numpy(), [*vocab.plain, *vocab.reserved]).all()


def test_tasks_have_their_shares_of_rows(store, vocab):
    batch = recall_batch(store, vocab, 0, 0, range(4000), 16, far(8), TASKS)
    noise = (batch.labels == UNSCORED).all(dim=1)
    assert noise.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_rules_are_passed_on(store, vocab):
    batch = recall_batch(store, vocab, 0, 0, range(16), 64, far(8), TASKS, RowRules(single_share=1.0))
    assert (batch.distances > 0).sum() == 16


def test_eight_thousand_recall_tokens_take_less_than_five_milliseconds_of_a_core(store, vocab):
    def once():
        start = time.thread_time()
        recall_batch(store, vocab, 0, 1, range(16), 512, far(400), TASKS)
        return time.thread_time() - start

    assert min(once() for _ in range(20)) < 0.005


def test_rows_too_short_for_the_distance_are_refused(store, vocab):
    with pytest.raises(
        UserError, match=r"recall\.seq_len is 64 and the distance of needle 63: rows of at least 65 tokens"
    ):
        recall_batch(store, vocab, 0, 0, range(1), 64, far(63), TASKS)


@pytest.mark.parametrize("seq_len", [2, 7, 64, 300, 5000])
def test_best_fit_rows_hold_every_token_once_an_epoch_and_padding_is_a_document_in_which_nothing_is_scored(
    seq_len, store, tmp_path
):
    rows = BestFitRows(store, seq_len, prepare_best_fit(store, seq_len, tmp_path))
    batch = text_batch(alone(rows, len(rows)), 0, range(len(rows)))
    seen, padding = Counter(), []
    for row in zip(batch.documents.tolist(), batch.input_ids.tolist(), batch.labels.tolist()):
        pieces = [list(group) for _, group in itertools.groupby(zip(*row), key=lambda position: position[0])]
        assert [piece[0][0] for piece in pieces] == list(range(len(pieces)))
        if all(position[1:] == (0, UNSCORED) for position in pieces[-1]):
            padding += pieces.pop()
        seen.update(tuple(position[1:] for position in piece) for piece in pieces)
    assert seen == Counter(pieces_of(store, seq_len))
    assert len(padding) == len(rows) * seq_len - store.n_tokens


def pieces_of(store, seq_len):
    """(token, label) of each document, cut every `seq_len` tokens. A cut is scored, the end of a document is not."""
    for start, end in store.documents():
        tokens = store.read(start, end - start)[0].tolist()
        scored = list(zip(tokens, [*tokens[1:], UNSCORED]))
        yield from (tuple(scored[i : i + seq_len]) for i in range(0, len(scored), seq_len))
