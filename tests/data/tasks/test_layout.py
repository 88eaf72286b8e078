"""The recall generator: where things stand, what stands between them, and that distance means what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tasks.draws import Draws
from data.tasks.layout import RowRules, clean_filler, item, training_rows
from data.tasks.question import UNSCORED
from data.tasks.vocabulary import RecallVocabulary
from model.errors import UserError

SHORT = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(90))
LONG = RecallVocabulary((80, 81), (82, 83, 84), tuple(range(92, 100)), np.arange(80))
VOCABULARIES = st.sampled_from([SHORT, LONG])
TASKS = ("needle", "needle-noise")


def max_row_distance(vocab, length):
    return length - 1 - len(vocab.needle)


def haystack(vocab, length, seed=0):
    return np.random.default_rng(seed).choice(vocab.plain, length)


@given(vocab=VOCABULARIES, data=st.data(), seed=st.integers(0, 1000), task=st.sampled_from(TASKS))
def test_an_item_is_its_haystack_with_one_needle_and_one_query_at_the_end(vocab, data, seed, task):
    distance = data.draw(st.integers(len(vocab.query), max_row_distance(vocab, 64)))
    filler = haystack(vocab, 64, seed)
    made = item(task, np.random.default_rng(seed), filler, vocab, 64, distance)
    assert made.query_position == 63
    assert made.query_position - made.value_position == made.distance == distance
    v, n, q = made.value_position, len(vocab.needle), len(vocab.query)
    assert made.tokens[v - n : v] == vocab.needle
    assert made.tokens[v] == made.value == made.answer
    assert made.tokens[-q:] == vocab.query
    assert made.tokens[: v - n] == tuple(filler[: v - n])
    assert made.tokens[v + 1 : 64 - q] == tuple(filler[v + 1 : 64 - q])


@given(seed=st.integers(0, 1000))
def test_a_counterfactual_differs_in_the_value_alone(seed):
    made = item("needle", np.random.default_rng(seed), haystack(SHORT, 40), SHORT, 40, 11)
    different = [i for i in range(40) if made.tokens[i] != made.counterfactual_tokens[i]]
    assert different == [made.value_position]
    assert {made.value, made.counterfactual_tokens[made.value_position]} <= set(SHORT.values)


def test_items_on_one_haystack_share_everything_before_the_needle(store, vocab):
    filler, _ = store.read(100, 200)
    near, far = (item("needle", np.random.default_rng(d), filler, vocab, 200, d).tokens for d in (20, 120))
    assert near[:78] == far[:78]


def test_distance_one_puts_the_value_immediately_before_the_query():
    made = item("needle", np.random.default_rng(0), haystack(SHORT, 10), SHORT, 10, 1)
    assert made.tokens[-3:] == (90, made.value, 91)


@pytest.mark.parametrize("task", TASKS)
def test_a_haystack_drawn_from_a_store_holds_no_reserved_token(task, store, vocab):
    for seed in range(20):
        made = item(task, np.random.default_rng(seed), store, vocab, 100, 50)
        assert np.isin(made.tokens, vocab.reserved).sum() == 3


@given(seed=st.integers(0, 1000))
def test_reserved_tokens_in_foreign_text_are_replaced_by_plain_ones_and_nothing_else_is(seed):
    text = np.random.default_rng(seed).integers(0, 100, (3, 50))
    cleaned = clean_filler(text, SHORT)
    reserved = np.isin(text, SHORT.reserved)
    assert not np.isin(cleaned, SHORT.reserved).any()
    np.testing.assert_array_equal(cleaned[~reserved], text[~reserved])
    np.testing.assert_array_equal(cleaned, clean_filler(text, SHORT))


@pytest.mark.parametrize(("distance", "needed"), [(0, 3), (39, 41)])
def test_a_distance_that_does_not_fit_is_refused(distance, needed):
    said = (
        f"distance {distance} does not fit 40 tokens: needle needs {needed} tokens for it, and a distance of at least 1"
    )
    with pytest.raises(UserError, match=said):
        item("needle", np.random.default_rng(0), haystack(SHORT, 40), SHORT, 40, distance)


def test_a_text_shorter_than_a_row_is_refused(store, vocab):
    with pytest.raises(UserError, match=r"needs 99,999 tokens of text and the data has .*; give more text"):
        item("needle", np.random.default_rng(0), store, vocab, 99_999, 5)


def rows(vocab, length, max_distance, seed=0, n=8, **rules):
    filler = np.stack([haystack(vocab, length, seed + i) for i in range(n)])
    made = training_rows(Draws(seed, 0, range(n)), filler, vocab, max_distance, RowRules(**rules))
    return filler, made


@given(
    vocab=VOCABULARIES,
    seed=st.integers(0, 1000),
    length=st.integers(10, 120),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_between_a_needle_and_its_query_stands_nothing_but_filler(vocab, seed, length, share, data):
    longest = data.draw(st.integers(len(vocab.query), max_row_distance(vocab, length)))
    filler, made = rows(vocab, length, longest, seed, single_share=share)
    n, q = len(vocab.needle), len(vocab.query)
    expected = filler.copy()
    for r, end in zip(*np.nonzero(made.distances)):
        distance = made.distances[r, end]
        assert q <= distance <= max(longest, q)
        v = end - distance
        assert made.tokens[r, v] == made.answers[r, end]
        assert made.tokens[r, v] in vocab.values
        np.testing.assert_array_equal(made.tokens[r, v + 1 : end - q + 1], filler[r, v + 1 : end - q + 1])
        expected[r, v - n : v + 1] = [*vocab.needle, made.answers[r, end]]
        expected[r, end - q + 1 : end + 1] = vocab.query
    np.testing.assert_array_equal(made.tokens, expected)
    assert (made.distances > 0).any(axis=1).all()
    np.testing.assert_array_equal(made.answers != UNSCORED, made.distances > 0)


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 1.0]))
def test_relays_name_the_value_between_it_and_its_query_and_none_before_the_first(seed, share):
    _, made = rows(LONG, 90, 30, seed, single_share=share, relay_share=1.0, layers=7)
    expected = np.full_like(made.tokens, UNSCORED)
    for r, end in zip(*np.nonzero(made.distances)):
        v = end - made.distances[r, end]
        expected[r, v + 1 : end - 2] = LONG.values.index(made.tokens[r, v])
    for r, row in enumerate(made.answers != UNSCORED):
        end = int(row.argmax())
        expected[r, : end - made.distances[r, end]] = len(LONG.values)
    np.testing.assert_array_equal(made.relays, expected)
    np.testing.assert_array_equal(made.relay_layers, np.where(expected != UNSCORED, 7, 0))


def test_relays_are_asked_at_about_the_share_of_fillers_wanted():
    _, made = rows(SHORT, 500, 400, n=200, single_share=1.0, short_share=0.0)
    values = (made.relays != UNSCORED) & (made.relays < len(SHORT.values))
    between = (made.distances - 1).clip(min=0).sum()
    assert values.sum() / between == pytest.approx(1 / 9, rel=0.05)


def test_with_a_pace_a_relay_is_asked_only_where_the_value_can_have_come():
    pace, layers = 12.0, 5
    _, made = rows(SHORT, 200, 100, n=400, single_share=1.0, relay_share=1.0, relay_pace=pace, layers=layers)
    seen = set()
    for r, at in zip(*np.nonzero(made.relays < len(SHORT.values))):
        layer = int(made.relay_layers[r, at])
        age = at - (made.tokens.shape[1] - 1 - made.distances[r, -1])
        if made.relays[r, at] == UNSCORED:
            assert layer == 0
        elif age > 0:
            assert age <= pace * layer
            assert layer <= layers
            seen.add((layer, -(-age // 12)))
    assert seen == {(layer, first) for first in range(1, layers + 1) for layer in range(first, layers + 1)}


def test_single_rows_have_one_question_at_the_end():
    _, made = rows(SHORT, 60, 20, n=50, single_share=1.0)
    assert (made.distances[:, -1] > 0).all()
    assert (made.distances > 0).sum() == 50


def test_other_rows_have_as_many_questions_as_fit():
    _, made = rows(SHORT, 200, 20, n=50, single_share=0.0)
    assert (made.distances > 0).sum(axis=1).min() >= 4


def test_distances_are_uniform_up_to_the_largest_with_a_share_of_short_ones():
    _, made = rows(SHORT, 110, 100, n=20_000, single_share=1.0, short_share=0.2, short_distance=10)
    counts = np.bincount(made.distances[:, -1], minlength=101)[1:]
    expected = np.full(100, 0.8 / 100)
    expected[:10] += 0.2 / 10
    np.testing.assert_allclose(counts / 20_000, expected, atol=5 * np.sqrt(0.028 / 20_000))


def test_a_share_of_distances_is_the_largest_and_has_fillers_of_every_age():
    _, made = rows(SHORT, 110, 100, n=20_000, single_share=1.0, short_share=0.2, short_distance=10, long_share=0.5)
    far = made.distances[:, -1]
    assert np.mean(far == 100) == pytest.approx(0.5 + 0.3 / 100, abs=0.02)
    assert np.mean(far <= 10) == pytest.approx(0.2 + 0.3 / 10, abs=0.02)
