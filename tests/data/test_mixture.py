"""Mixtures: exact shares, an own epoch and order for each source, the same for any split of the rows."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import text_batch
from data.folders import one_at_a_time
from data.mixture import ConcatRows, Mixture, Shares, open_sources, prepare_best_fit, prepare_sources
from data.token_store import TokenStore
from data.tokenizer import prepare_tokenizer
from model.errors import UserError

STEPS = 1000


def drawn(shares, steps=STEPS, ranks=1):
    """(steps, rows) the source of each row, and the number of the row in its source."""
    n = shares.rows_per_step
    parts = [range(n * rank // ranks, n * (rank + 1) // ranks) for rank in range(ranks)]
    both = [np.concatenate([shares.source_of(step, rows) for rows in parts], axis=1) for step in range(steps)]
    return np.stack(both).swapaxes(0, 1)


def counts_after_each_step(sources, n):
    return np.stack([(sources == source).sum(1).cumsum() for source in range(n)], axis=1)


def numbers_have_no_gaps(sources, numbers, n):
    for source in range(n):
        of_source = np.sort(numbers[sources == source])
        np.testing.assert_array_equal(of_source, np.arange(len(of_source)))


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1, 1, 1], [5.0, 3.3, 1.17]])
def test_three_sources_have_their_shares_to_within_a_row_after_every_step(weights):
    sources, numbers = drawn(Shares(weights, 16, STEPS, seed=3))
    exact = np.outer(np.arange(1, STEPS + 1) * 16, np.array(weights) / sum(weights))
    assert np.abs(counts_after_each_step(sources, 3) - exact).max() < 1
    numbers_have_no_gaps(sources, numbers, 3)


def test_a_source_with_less_than_a_row_a_step_has_its_share_at_the_end_of_each_group_of_steps():
    weights = [0.97, 0.03]  # 0.12 rows a step: one row in nine steps at least
    sources, numbers = drawn(Shares(weights, 4, STEPS, seed=3))
    numbers_have_no_gaps(sources, numbers, 2)
    counts = counts_after_each_step(sources, 2)
    exact = np.outer(np.arange(1, STEPS + 1) * 4, weights)
    assert np.abs(counts - exact).max() < 3
    ends = [group * STEPS // 111 - 1 for group in range(1, 112)]
    assert np.abs(counts - exact)[ends].max() < 1
    assert np.diff(np.flatnonzero(np.diff(counts[:, 1], prepend=0))).max() < 2 * 10  # never long without it


def test_rows_that_are_counted_from_a_later_step_have_their_shares_from_there_on():
    weights = [0.7, [(0.0, 0.1), (0.5, 0.6)], 0.2]
    shares = Shares(weights, 16, STEPS, seed=3, first=300)
    n = STEPS - 300
    both = [shares.source_of(300 + step, range(16)) for step in range(n)]
    sources, numbers = (np.stack(part) for part in zip(*both))
    numbers_have_no_gaps(sources, numbers, 3)
    changed = np.array([0.7, 0.6, 0.2]) / 1.5
    exact = np.concatenate([np.tile([0.7, 0.1, 0.2], (200, 1)), np.tile(changed, (500, 1))]).cumsum(0) * 16
    assert np.abs(counts_after_each_step(sources, 3) - exact).max() < 2


def test_an_epoch_that_begins_at_a_later_step_visits_all_rows_once_in_another_order():
    store = TokenStore.of(np.arange(321, dtype=np.uint16) % 50, np.array([0]), np.ones(50, dtype=np.int64))
    rows = ConcatRows(store, 16)  # 20 of them

    def order(first):
        mixture = Mixture({"": rows}, Shares([1.0], 4, STEPS, seed=3, first=first))
        steps = [mixture._find(first + step, range(4))[1] for step in range(5)]
        return np.concatenate(steps).tolist()

    assert sorted(order(0)) == sorted(order(100)) == sorted(order(101)) == list(range(20))
    assert len({tuple(order(first)) for first in (0, 100, 101)}) == 3


def test_weights_that_change_hold_from_their_step_on():
    schedule = [[(0.0, 1.0), (0.5, 0.5)], [(0.25, 3.0), (0.5, 0.5)], 1.0]
    stages = [(0, 250, [0.5, 0.0, 0.5]), (250, 500, [0.2, 0.6, 0.2]), (500, 1000, [0.25, 0.25, 0.5])]
    sources, numbers = drawn(Shares(schedule, 10, STEPS, seed=0))
    numbers_have_no_gaps(sources, numbers, 3)
    for first, last, shares in stages:
        counts = counts_after_each_step(sources[first:last], 3)
        exact = np.outer(np.arange(1, last - first + 1) * 10, shares)
        assert np.abs(counts - exact).max() < 1
    backwards = [schedule[0][::-1], schedule[1][::-1], 1.0]
    np.testing.assert_array_equal(drawn(Shares(backwards, 10, STEPS, seed=0)), [sources, numbers])


@settings(max_examples=60)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.integers(1, 9), st.integers(1, 60), st.integers(0, 99))
def test_any_weights_give_each_source_all_its_rows_without_gaps(weights, rows_per_step, steps, seed):
    sources, numbers = drawn(Shares(weights, rows_per_step, steps, seed), steps)
    numbers_have_no_gaps(sources, numbers, len(weights))
    exact = np.array(weights) / sum(weights) * steps * rows_per_step
    assert np.abs(counts_after_each_step(sources, len(weights))[-1] - exact).max() < 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_split_of_a_step_over_ranks_gives_the_same_rows(ranks):
    shares = Shares([0.7, [(0.0, 0.2), (0.5, 0.9)], 0.1], 8, 40, seed=1)
    np.testing.assert_array_equal(drawn(shares, 40, ranks), drawn(shares, 40))


def test_one_source_has_all_rows_in_turn():
    sources, numbers = drawn(Shares([0.3], 4, 10, seed=0), 10)
    assert not sources.any()
    assert numbers.flatten().tolist() == list(range(40))


def test_the_sources_of_a_step_are_shuffled():
    sources, _ = drawn(Shares([0.5, 0.5], 8, 50, seed=0), 50)
    assert len({tuple(row) for row in sources.tolist()}) > 25


def test_which_source_a_row_has_never_changes_silently():
    sources, numbers = drawn(Shares([0.6, 0.3, 0.1], 4, 3, seed=2), 3)
    assert sources.tolist() == [[0, 0, 0, 2], [1, 0, 1, 0], [1, 0, 1, 0]]
    assert numbers.tolist() == [[3, 6, 5, 0], [3, 2, 0, 4], [1, 1, 2, 0]]


# -- rows of sources --------------------------------------------------------------------------------------------------


def counted(n_rows, first):
    """Rows of two tokens, with numbers from `first` on, so that the first token tells the row."""
    tokens = np.arange(first, first + 2 * n_rows + 1)
    return ConcatRows(TokenStore.of(tokens, np.array([0]), np.ones(10_000, dtype=np.int64)), 2)


def rows_of(mixture, name, steps):
    """The rows of a source in the order of their numbers: within a step, rows of all sources are shuffled."""
    read = {}
    for step in range(steps):
        rows, sources = mixture.read(step, range(mixture.shares.rows_per_step))
        _, numbers = mixture.shares.source_of(step, range(mixture.shares.rows_per_step))
        of_source = sources == mixture.names.index(name)
        read |= {n: int(row.tokens[0]) for n, row, mine in zip(numbers.tolist(), rows, of_source) if mine}
    return [read[number] for number in sorted(read)]


def mixed(seed=0, **weights):
    rows = {"web": counted(7, 0), "code": counted(20, 1000), "books": counted(3, 2000)}
    shares = Shares(list(weights.values()), 8, 100, seed)
    return Mixture({name: rows[name] for name in weights}, shares)


def test_each_source_has_its_own_epochs_each_in_another_order():
    mixture = mixed(web=0.5, code=0.25, books=0.25)
    for name, n in (("web", 7), ("code", 20), ("books", 3)):
        read = rows_of(mixture, name, 40)
        epochs = [read[i : i + n] for i in range(0, len(read) - n + 1, n)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == n for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1


def test_another_source_or_another_place_in_the_list_changes_no_order_within_a_source():
    alone, more, turned = (
        mixed(web=0.5, code=0.5), mixed(web=0.5, code=0.2, books=0.3), mixed(books=0.3, code=0.2, web=0.5)
    )  # fmt: skip
    for name in ("web", "code"):
        reads = [rows_of(mixture, name, 30) for mixture in (alone, more, turned)]
        n = min(map(len, reads))
        assert n > 40
        assert reads[0][:n] == reads[1][:n] == reads[2][:n]
    assert rows_of(mixed(seed=1, web=0.5, code=0.5), "web", 30) != rows_of(alone, "web", 30)


def test_sources_of_equal_length_have_orders_of_their_own():
    rows = {"a": counted(50, 0), "b": counted(50, 0)}
    mixture = Mixture(rows, Shares([1.0, 1.0], 10, 10, seed=0))
    assert rows_of(mixture, "a", 10) != rows_of(mixture, "b", 10)


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 4, 6, 8)])
def test_batches_of_a_mixture_do_not_depend_on_the_number_of_ranks(cuts):
    mixture = mixed(web=0.5, code=0.25, books=0.25)
    whole = text_batch(mixture, 3, range(8))
    parts = [text_batch(mixture, 3, range(*cut)) for cut in itertools.pairwise(cuts)]
    for name in ("input_ids", "labels", "documents", "groups"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
    assert len(set(whole.groups.tolist())) > 1


# -- from settings ----------------------------------------------------------------------------------------------------


def two_sources(make_settings, tmp_path, **data):
    def source(name, train):
        files = {"train_files": [str(tmp_path / train)], "heldout_files": [str(tmp_path / "heldout.txt")]}
        return {"name": name, "source": "files", **files}

    (tmp_path / "more.txt").write_text((tmp_path / "train.txt").read_text()[:3000] + "The ship came again.\n")
    sources = [source("web", "train.txt"), source("books", "more.txt")]
    return make_settings(source="novels", train_files=[], heldout_files=[], sources=sources, **data)


def opened(run):
    tokenizer = prepare_tokenizer(run)
    return open_sources(prepare_sources(run, tokenizer, 1), tokenizer, run.data)


def test_sources_have_stores_of_their_own_that_another_mixture_uses_again(make_settings, tmp_path):
    run = two_sources(make_settings, tmp_path, seq_len=32, tokenizer={"model_file": None, "vocab_size": 400})
    sources = opened(run)
    assert list(sources) == ["web", "books"]
    assert sources["web"].train.n_bytes == (tmp_path / "train.txt").stat().st_size
    assert sources["books"].train.n_bytes == (tmp_path / "more.txt").stat().st_size
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/tokens-*/*")}
    other = [source.model_copy(update={"weight": 3.0}) for source in run.data.sources]
    opened(run.model_copy(update={"data": run.data.model_copy(update={"sources": other, "seq_len": 48})}))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/tokens-*/*")} == before


def test_best_fit_is_prepared_once_beside_the_tokens(make_settings, tmp_path):
    run = two_sources(make_settings, tmp_path, seq_len=32, packing="best_fit")
    assert all(len(source.rows) * 32 >= source.train.n_tokens for source in opened(run).values())
    before = {path: path.stat().st_mtime_ns for path in Path(tmp_path).glob("cache/tokens-*/best_fit-32/*")}
    assert len(before) == 2 * 4
    opened(run)
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).glob("cache/tokens-*/best_fit-32/*")} == before


def test_best_fit_waits_for_another_process_and_keeps_what_it_wrote(store, tmp_path):
    folder = tmp_path / "best_fit-32"
    preparing = threading.Thread(target=prepare_best_fit, args=(store, 32, tmp_path))
    with one_at_a_time(tmp_path):
        preparing.start()
        preparing.join(0.2)
        assert preparing.is_alive()
        folder.mkdir()
    preparing.join()
    assert list(folder.iterdir()) == []


def test_text_shorter_than_a_row_is_refused(make_settings, tmp_path):
    with pytest.raises(
        UserError,
        match=r"^data\.seq_len is 2,000 and the training text of books has \d[\d,]* tokens; lower it or",
    ):
        opened(two_sources(make_settings, tmp_path, seq_len=2000))
    with pytest.raises(UserError, match=r"data\.seq_len is 99,999 and the training text has .* tokens; lower it"):
        opened(make_settings(seq_len=99_999))
