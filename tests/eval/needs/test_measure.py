"""Claims about what a text asks of a model: known distances are measured, and intervals hold what they promise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eval.forward import last_logits
from eval.haystack import HeldOutDocument, open_haystack
from eval.models import Examined, load_model
from eval.needs import measure
from model.errors import UserError

VOCABULARY = 2000
CONTEXTS = (8, 16, 32, 64, 128, 256)


class Induction(nn.Module):
    """Predicts what followed the latest earlier copy of the two newest tokens; without a copy, all tokens alike."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(9.0))

    def forward(self, input_ids, use_cache, logits_to_keep):
        same = input_ids[:, :, None] == input_ids[:, None, :]
        copies = (same[:, 1:, 1:] & same[:, :-1, :-1]).tril(-1)  # (B, T-1, T-1): the pair that ends at t, and at s < t
        latest = (copies * torch.arange(1, copies.shape[1] + 1)).amax(-1)  # s, or 0
        follower = input_ids.gather(1, (latest + 1).clamp(max=input_ids.shape[1] - 1))
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[:, 1:].scatter_(2, follower[..., None], (self.strength * (latest > 0))[..., None])
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.fixture(scope="module")
def induction():
    return Examined("induction", Induction(), tokenizer=None, specs=(), folder=None, run_dir=None)


def document(distance, seed, length=700):
    """Random tokens. Of every twelve, up to eight repeat those `distance` tokens earlier; how many differs by text."""
    rng = np.random.default_rng(seed)
    tokens, repeated = rng.integers(VOCABULARY, size=length), rng.integers(4, 9)
    for t in range(distance, length):
        if t % 12 < repeated:
            tokens[t] = tokens[t - distance]
    return HeldOutDocument(tokens, 4 * length)


def rows(examined, documents, contexts=CONTEXTS, budget=4000, seed=0):
    excerpts = measure.draw_excerpts(documents, measure.excerpt_length(contexts, budget), budget, [seed])
    return measure.score(examined, "text", excerpts, contexts, [seed], [].append).result(contexts)["contexts"]


@pytest.mark.parametrize(("distance", "needed"), [(10, 16), (28, 32), (50, 64), (100, 128), (200, 256)])
def test_a_known_distance_is_where_the_gain_is(induction, distance, needed):
    table = rows(induction, [document(distance, seed) for seed in range(12)])
    gains = {row["context"]: row["gain"][0] for row in table[1:]}
    assert max(gains, key=gains.get) == needed
    assert gains[needed] > 0.9 * sum(gains.values())
    for row in table:
        more = row["context"] < needed
        assert (row["need"][1] > 0.1) == more
        assert row["need"][0] == 0 or more
        assert row["by_chance"][0] < 0.01


def test_two_halves_of_a_corpus_agree_within_their_intervals_and_two_corpora_do_not(induction):
    corpus = [document(10 + seed % 90, seed) for seed in range(60)]
    halves = rows(induction, corpus[::2]), rows(induction, corpus[1::2], seed=1)
    other = rows(induction, [document(50, seed) for seed in range(30)])
    assert all(overlap(a, b, key) for a, b in zip(*halves) for key in ("bits", "need"))
    assert not all(overlap(a, b, "bits") for a, b in zip(halves[0], other))


def overlap(a, b, key):
    return a[key][1] <= b[key][2] and b[key][1] <= a[key][2]


def test_95_percent_intervals_hold_the_truth_in_about_95_percent_of_texts():
    rng, held, texts = np.random.default_rng(0), 0, 200
    for text in range(texts):
        units = np.repeat(np.arange(32), rng.integers(5, 40, size=32))
        of_unit = rng.normal(size=32)[units]  # the tokens of a unit depend on each other
        _, low, high = measure.interval(
            measure.bootstrap((of_unit + rng.normal(size=len(units)))[:, None], units, [text])[:, 0]
        )
        held += low <= 0 <= high
    assert 0.88 < held / texts < 0.99


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.sampled_from([1, 4, 16, 64]), st.integers(1, 40))
def test_each_token_is_scored_once_with_the_context_that_was_asked(lengths, context, length):
    documents = [HeldOutDocument(np.arange(n), n) for n in lengths]
    excerpts = measure.draw_excerpts(documents, length, budget=10**9, seed=[0])
    windows = measure.windows_of(excerpts, context)
    scored = sorted((excerpt.document, t) for excerpt, _, first, end in windows for t in range(first, end))
    assert scored == [(i, t) for i, n in enumerate(lengths) for t in range(1, n)]
    for _, start, first, end in windows:
        assert first - start == min(context, first)
        assert end - first <= max(1, context // 4)


def test_excerpts_stop_at_the_budget():
    documents = [HeldOutDocument(np.arange(500), 500)] * 3
    excerpts = measure.draw_excerpts(documents, 20, budget=200, seed=[1])
    assert sum(e.end - e.first for e in excerpts) in range(200, 220)
    assert excerpts != measure.draw_excerpts(documents, 20, budget=200, seed=[2])


def test_a_pass_gives_the_same_loss_as_each_token_with_its_context_alone(untrained_run):
    examined = load_model(str(untrained_run), "cpu")
    documents = open_haystack(examined, max_tokens=200).documents
    excerpts = measure.draw_excerpts(documents, 12, budget=36, seed=[0])
    nats = measure.nats_with_context(examined, excerpts, 16, [].append)
    alone = []
    for excerpt, start, first, end in measure.windows_of(excerpts, 16):
        for t in range(first, end):
            logits = last_logits(examined, torch.from_numpy(excerpt.tokens[start:t])[None])
            alone.append(-float(logits.log_softmax(-1)[0, excerpt.tokens[t]]))
    np.testing.assert_allclose(nats, alone, atol=1e-5)


def test_nothing_is_gained_from_beyond_the_reach(untrained_run):
    examined = load_model(str(untrained_run), "cpu")  # R = 21
    table = rows(examined, open_haystack(examined, max_tokens=2000).documents, (8, 32, 128), budget=640)
    assert table[1]["gain"][0] != 0
    assert abs(table[2]["gain"][0]) < 1e-5


def test_few_documents_are_resampled_by_excerpt_and_too_short_texts_are_refused():
    documents = [HeldOutDocument(np.arange(101), 1)] * 12
    unit, units = measure.units_of("chats", measure.draw_excerpts(documents, 50, 10**9, [0]))
    assert (unit, len(set(units))) == ("documents", 12)
    unit, units = measure.units_of("novel", measure.draw_excerpts(documents[:2], 10, 10**9, [0]))
    assert (unit, len(set(units)), len(units)) == ("excerpts", 20, 200)
    with pytest.raises(UserError, match=r"TEXT 'note' gives only 4 excerpts, .*give more text, or smaller --contexts"):
        measure.units_of("note", measure.draw_excerpts(documents[:2], 50, 10**9, [0]))


def test_a_token_needs_more_where_the_longest_context_makes_it_likely_and_the_shorter_one_does_not():
    nats = np.array([[5.0, 1.0], [3.0, 1.5], [6.0, 3.0], [1.0, 5.0], [3.0, 6.0]])
    need, by_chance = measure.needs_more(nats)
    assert need.tolist() == [[True, False]] + 4 * [[False, False]]
    assert by_chance.tolist() == 3 * [[False, False]] + [[True, False], [False, False]]


def test_a_text_without_gain_has_no_shares():
    nats = np.random.default_rng(0).normal(4, 1, size=(640, 2))
    table = measure.summary(measure.curves_of(nats, np.repeat(np.arange(32), 20), [0]), (16, 64))
    assert [row["share"] for row in table] == [None, None]
