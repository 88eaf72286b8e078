"""Claims about every recall task, checked by a solver that knows nothing but the tokens up to the query."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batches import recall_batch
from data.settings import TaskName
from data.tasks import TASKS
from data.tasks.draws import Draws
from data.tasks.layout import RowRules, item, task_size, training_rows
from data.tasks.question import UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from model.errors import UserError

KEYED = [name for name, task in TASKS.items() if task.option]


@st.composite
def vocabularies(draw):
    """Random ids: markers of one to three tokens, and as many values and keys as the largest options need."""
    markers = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    n_values, n_keys, n_plain = draw(st.integers(8, 20)), draw(st.integers(8, 20)), draw(st.integers(1, 60))
    ids = np.random.default_rng(draw(st.integers(0, 999))).permutation(200)
    needle, query, values, keys, plain = np.split(ids, np.cumsum([*markers, n_values, n_keys, n_plain])[:-1])[:5]
    parts = (tuple(map(int, part)) for part in (needle, query, values))
    return RecallVocabulary(*parts, np.sort(plain[:n_plain]), tuple(map(int, keys)))


OPTIONS = st.builds(
    TaskOptions, pairs=st.integers(1, 7), span_pairs=st.integers(1, 6), hops=st.integers(1, 3), rules=st.integers(2, 5)
)


def after_last(tokens, pattern):
    """Place behind the last occurrence of `pattern`."""
    n = len(pattern)
    return max(i + n for i in range(len(tokens) - n + 1) if tuple(tokens[i : i + n]) == tuple(pattern))


def tracked(tokens, vocab):
    """What each variable holds after all assignments."""
    holds, n = {}, len(vocab.needle)
    for i in range(n, len(tokens) - 1):
        if tuple(tokens[i - n : i]) == vocab.needle:
            variable, given = tokens[i], tokens[i + 1]
            holds[variable] = holds.get(given, given)
    return holds


def solve(task, tokens, vocab, options):
    """The answer, from the tokens up to the query's last one."""
    tokens, asked = list(tokens), tokens[-1]
    if task.startswith("needle"):
        return tokens[after_last(tokens, vocab.needle)]
    if task == "keys":
        return tokens[after_last(tokens, (*vocab.needle, asked))]
    if task == "induction":
        return tokens[after_last(tokens[:-1], (asked,))]
    if task == "variable-tracking":
        return tracked(tokens[: -1 - len(vocab.query)], vocab)[asked]
    rule = vocab.keys.index(tokens[after_last(tokens, vocab.needle)])
    arguments = min(len(vocab.keys) - options.rules, len(vocab.values) // options.rules)
    return vocab.values[rule * arguments + vocab.keys.index(asked) - options.rules]


def haystack(vocab, length, seed):
    return np.random.default_rng(seed).choice(vocab.plain, length)


NONE = st.just(0)


@st.composite
def items(draw, tasks=tuple(TASKS), distractors=NONE):
    """A task, its vocabulary and options, the haystack, and an item of a random length and distance."""
    task, vocab, options = draw(st.sampled_from(tasks)), draw(vocabularies()), draw(OPTIONS)
    size, older, seed = task_size(task, vocab, options), draw(distractors), draw(st.integers(0, 9999))
    distance = draw(st.integers(size.nearest, size.nearest + 60))
    room = older * 8 * (options.hops + 1) * 4 if older else 0
    length = size.row(distance) + room + draw(st.integers(0, 40))
    filler = haystack(vocab, length, seed)
    made = item(task, np.random.default_rng(seed), filler, vocab, length, distance, options, older)
    return task, vocab, options, filler, distance, made


@given(items())
def test_the_answer_of_both_members_of_a_pair_can_be_read_from_the_context(drawn):
    task, vocab, options, _, _, made = drawn
    end = made.query_position + 1
    assert solve(task, made.tokens[:end], vocab, options) == made.answer
    assert solve(task, made.counterfactual_tokens[:end], vocab, options) == made.counterfactual_answer
    assert made.answer != made.counterfactual_answer
    assert {made.answer, made.counterfactual_answer} <= set(vocab.values)


@given(items(distractors=st.integers(1, 3), tasks=[name for name, task in TASKS.items() if not task.alone]))
def test_older_needles_do_not_change_the_answer_and_stand_before_the_needle(drawn):
    task, vocab, options, _, _, made = drawn
    assert solve(task, made.tokens, vocab, options) == made.answer
    assert solve(task, made.counterfactual_tokens, vocab, options) == made.counterfactual_answer
    assert made.query_position == len(made.tokens) - 1
    latest_start = made.value_position - task_size(task, vocab, options).before + 1  # of the needle
    assert np.isin(made.tokens[:latest_start], vocab.values if task != "instruction" else vocab.keys).any()
    between = np.array(made.tokens[made.value_position + 1 :])
    assert (np.diff(np.flatnonzero(np.isin(between, vocab.plain))) == 1).all()


def test_an_older_needle_may_stand_immediately_before_the_needle():
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    options = TaskOptions(span_pairs=1)
    made = item("induction", np.random.default_rng(0), haystack(vocab, 5, 0), vocab, 5, 1, options, distractors=1)
    assert np.isin(made.tokens, vocab.reserved).all()  # two needles of two tokens, and the query
    assert solve("induction", made.tokens, vocab, options) == made.answer == made.tokens[3]


@given(items())
def test_members_of_a_pair_differ_in_the_deciding_token_alone_and_that_stands_at_the_distance(drawn):
    _, _, _, _, distance, made = drawn
    different = [i for i, (a, b) in enumerate(zip(made.tokens, made.counterfactual_tokens)) if a != b]
    assert different == [made.value_position]
    assert made.query_position - made.value_position == made.distance == distance


@given(items())
def test_nothing_but_haystack_stands_outside_needle_and_query(drawn):
    task, vocab, _, filler, _, made = drawn
    written = np.flatnonzero(np.isin(made.tokens, vocab.reserved))
    same = np.setdiff1d(np.arange(len(filler)), written)
    np.testing.assert_array_equal(np.array(made.tokens)[same], filler[same])
    assert np.isin(np.array(made.tokens)[same], vocab.plain).all()
    if task != "keys":  # whose other pairs stand where there is room
        gaps = np.flatnonzero(np.diff(written) > 1)
        assert len(gaps) <= 1


@given(items(tasks=["keys"]))
def test_a_row_of_keys_holds_as_many_pairs_as_asked_with_keys_and_values_of_their_own(drawn):
    _, vocab, options, _, _, made = drawn
    tokens, n = made.tokens, len(vocab.needle)
    starts = [i for i in range(len(tokens) - n) if tokens[i : i + n] == vocab.needle]
    pairs = {tokens[i + n]: tokens[i + n + 1] for i in starts}
    assert len(starts) == len(pairs) == len(set(pairs.values())) == options.pairs
    assert set(pairs) <= set(vocab.keys)


@given(items())
def test_without_the_needle_the_haystack_is_back_and_the_answer_is_gone(drawn):
    task, _, _, filler, _, made = drawn
    kept = np.array(made.blind_tokens) == np.array(made.tokens)
    removed = np.flatnonzero(~kept)
    assert made.value_position in removed
    np.testing.assert_array_equal(np.array(made.blind_tokens)[removed], filler[removed])
    if task in ("keys", "variable-tracking"):
        assert (np.array(made.blind_tokens[: made.query_position]) == made.tokens[made.query_position]).sum() == 0


def test_an_instruction_opens_its_row_at_every_distance():
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    for distance in (2, 10, 50):
        made = item("instruction", np.random.default_rng(0), haystack(vocab, 80, 0), vocab, 80, distance)
        assert made.tokens[0] == 90
        assert (made.value_position, made.query_position) == (1, 1 + distance)


@given(
    name=st.sampled_from(list(TASKS)), vocab=vocabularies(), options=OPTIONS, seed=st.integers(0, 999),
    further=st.integers(0, 50), room=st.integers(0, 60), share=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_every_answer_of_a_training_row_can_be_read_from_what_stands_before_it(
    name, vocab, options, seed, further, room, share
):
    far = task_size(name, vocab, options).nearest + further
    length = task_size(name, vocab, options).row(far) + room
    filler = np.stack([haystack(vocab, length, seed + i) for i in range(6)])
    made = training_rows(Draws(seed, 0, range(6)), filler, vocab, far, RowRules(single_share=share), name, options)
    np.testing.assert_array_equal(made.answers != UNSCORED, made.distances > 0)
    assert (made.distances > 0).any(axis=1).all()
    plain = ~np.isin(made.tokens, vocab.reserved)
    np.testing.assert_array_equal(made.tokens[plain], filler[plain])
    for r, end in zip(*np.nonzero(made.distances)):
        assert made.answers[r, end] == solve(name, made.tokens[r, : end + 1].tolist(), vocab, options)
        assert made.distances[r, end] <= far
        if name != "instruction":
            assert made.tokens[r, end - made.distances[r, end]] == made.answers[r, end]


@pytest.mark.parametrize("name", KEYED)
def test_relays_of_keyed_tasks_are_asked_at_plain_pieces_and_markers_only(name):
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    filler = np.stack([haystack(vocab, 120, i) for i in range(20)])
    made = training_rows(Draws(0, 0, range(20)), filler, vocab, 60, RowRules(relay_share=1.0), name)
    asked = made.relays != UNSCORED
    assert asked.mean() > 0.2
    assert np.isin(made.tokens[asked], (*vocab.plain, 90, 91)).all()
    assert made.relays[asked].max() <= len(vocab.values)


def test_training_has_questions_of_every_size_up_to_the_one_that_evaluation_asks():
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    filler = np.stack([haystack(vocab, 80, i) for i in range(200)])
    made = training_rows(Draws(0, 0, range(200)), filler, vocab, 40, RowRules(), "keys", TaskOptions(pairs=4))
    assert set((made.tokens == 90).sum(axis=1)) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("name", "distance", "said"),
    [
        ("keys", 1, "distance 1 does not fit 80 tokens: keys needs .* and a distance of at least 2"),
        ("induction", 6, "a distance of at least 7"),
        ("variable-tracking", 16, "a distance of at least 17"),
        ("instruction", 79, "instruction needs 81 tokens for it"),
    ],
)
def test_a_distance_that_a_task_can_not_have_is_refused(name, distance, said):
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    with pytest.raises(UserError, match=said):
        item(name, np.random.default_rng(0), haystack(vocab, 80, 0), vocab, 80, distance)


def test_a_row_too_short_for_its_pairs_is_refused():
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    with pytest.raises(UserError, match="does not fit 20 tokens: keys needs 29 tokens"):
        item("keys", np.random.default_rng(0), haystack(vocab, 20, 0), vocab, 20, 4, TaskOptions(pairs=7))


def test_settings_name_the_tasks():
    assert get_args(TaskName) == tuple(TASKS)


def test_the_order_of_tasks_is_part_of_published_seeds():
    assert list(TASKS) == ["needle", "needle-noise", "keys", "induction", "variable-tracking", "instruction"]


@pytest.mark.parametrize("name", KEYED)
def test_the_largest_option_can_be_asked_and_its_answers_told_apart(name):
    vocab = RecallVocabulary((90,), (91,), tuple(range(92, 100)), np.arange(60), tuple(range(60, 80)))
    task = TASKS[name]
    options = TaskOptions(**{task.option: task.most(len(vocab.values), len(vocab.keys))})
    size = task_size(name, vocab, options)
    length = size.row(size.nearest)
    for seed in range(20):
        made = item(name, np.random.default_rng(seed), haystack(vocab, length, 0), vocab, length, size.nearest, options)
        assert solve(name, made.tokens[: made.query_position + 1], vocab, options) == made.answer
    assert 1 / task.chance(len(vocab.values), options) <= len(vocab.values)


def test_batches_mix_the_tasks_and_each_keeps_its_own_distance(store, tokenizer):
    vocab = recall_vocabulary(tokenizer, 16, 8)
    shares = dict.fromkeys(TASKS, 1.0)
    distances = {name: task_size(name, vocab, TaskOptions()).nearest + 3 * i for i, name in enumerate(TASKS)}
    options = TaskOptions(hops=1)
    batch = recall_batch(store, vocab, 0, 0, range(240), 90, distances, shares, RowRules(), options)
    seen = {name: batch.distances[batch.groups == i].max().item() for i, name in enumerate(TASKS)}
    assert all(0 < seen[name] <= distances[name] for name in TASKS)
    for i, name in enumerate(TASKS):
        rows = (batch.groups == i).nonzero()[:, 0].tolist()
        assert 20 < len(rows) < 60
        for r in rows:
            for end in batch.distances[r].nonzero()[:, 0].tolist():
                read = solve(name, batch.input_ids[r, : end + 1].tolist(), vocab, options)
                assert read == batch.recall_labels[r, end]
