"""Claims about the recall of a receipt: shared reading changes nothing, and rounds and intervals are right."""

import numpy as np
import pytest
import torch

from eval.forward import last_logits
from eval.haystack import open_haystack
from eval.models import load_model
from eval.receipt import recall

DISTANCES = (36, 40, 48)


@pytest.fixture(scope="module")
def examined(untrained_run):
    return load_model(str(untrained_run), "cpu")


@pytest.fixture(scope="module")
def probes(examined):
    return recall.open_probes(examined.tokenizer, open_haystack(examined), DISTANCES, 0)


def test_items_of_one_number_share_all_tokens_before_the_query(probes):
    for probe in probes:
        near, far = (probe.item(3, d) for d in (40, 48))
        shared = len(near.tokens) - recall.query_tokens(probe)
        assert near.tokens[:shared] == far.tokens[:shared]
        assert near.tokens[shared:] == far.tokens[-recall.query_tokens(probe) :]
        assert (near.distance, far.distance) == (40, 48)
        assert near.value == far.value == near.answer
        assert near.value_position >= recall.LEAD


def test_the_question_is_asked_in_words(examined, probes):
    text = examined.tokenizer.decode(probes[1].item(0, 48).tokens)
    assert text.count("The secret word is") == 2
    assert text.endswith("\nWhat is the secret word? The secret word is")


def test_branches_off_one_reading_give_the_logits_of_whole_rows(examined, probes):
    for probe in probes:
        distances = [d for d in DISTANCES if d >= recall.nearest(probe)]
        for distance, logits in zip(distances, recall.answers(examined, probe, distances, range(2)), strict=True):
            rows = torch.tensor([probe.item(i, distance).tokens for i in range(2)])
            torch.testing.assert_close(logits, last_logits(examined, rows), atol=2e-5, rtol=1e-5)


def test_a_distance_gets_items_until_its_interval_is_clear_of_the_bounds(examined, probes, monkeypatch):
    """A model that always answers right at 36 tokens, always wrong at 40, and every other time at 48."""

    def answers(examined, probe, distances, items):
        for distance in distances:
            logits = torch.zeros(len(items), examined.tokenizer.vocab_size)
            for row, i in enumerate(items):
                right = distance == 36 or (distance == 48 and i % 2)
                logits[row, probe.item(i, distance).answer] = 1.0 if right else -1.0
            yield logits

    monkeypatch.setattr(recall, "answers", answers)
    right = recall.measure(examined, probes[0], 120, lambda read: None)
    assert {d: len(of) for d, of in right.items()} == {36: 40, 40: 40, 48: 120}
    assert {d: of.mean() for d, of in right.items()} == {36: 1.0, 40: 0.0, 48: 0.5}


def test_paired_differences_have_the_interval_of_agresti_and_min():
    # Agresti and Min (2005), section 5: 794 pairs, 150 changed one way and 86 the other.
    before, after = np.zeros(1600, dtype=bool), np.zeros(1600, dtype=bool)
    before[:236], after[:86] = [True] * 150 + [False] * 86, False
    after[150:236] = True
    difference, low, high = recall.paired(before, after)
    assert difference == pytest.approx((86 - 150) / 1600)
    n = 1602
    middle = (86 - 150) / n
    margin = 1.96 * (((86.5 + 150.5) - (86.5 - 150.5) ** 2 / n) ** 0.5) / n
    assert (low, high) == (pytest.approx(middle - margin), pytest.approx(middle + margin))
    same = recall.paired(before, before)
    assert same[0] == 0.0
    assert same[1] < 0 < same[2]
