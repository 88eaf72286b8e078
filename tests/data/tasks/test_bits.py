"""Published results stay reproducible: the rows of `needle` and `needle-noise` have the bits that they always had.

The hashes were taken from the code that trained the quickstart in docs/results.md.
"""

import hashlib

import numpy as np
import pytest

from data.batches import recall_batch
from data.tasks.layout import RowRules, item
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from training.curriculum import Curriculum
from training.objective import RecallObjective
from training.settings.config_file import load_settings
from training.settings.generate import ROOT

VOCAB = RecallVocabulary((3,), (4,), tuple(range(5, 37)), np.arange(37, 2048))
TEXT = np.random.default_rng(17).integers(0, 2048, 50_000).astype(np.uint16)
STORE = TokenStore.of(TEXT, np.array([0, 20_000, 31_234]), np.ones(2048, dtype=np.int64))
RULES = RowRules(relay_share=0.5, relay_pace=9.0, layers=20)


def sha256(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("step", "distance", "expected"),
    [
        (0, 32, "9cd0546713b07e48"),
        (1, 48, "c429be7cf9220119"),
        (400, 162, "797aa7f06c1f3bb9"),
        (879, 288, "63525e568056b534"),
    ],
)
def test_the_recall_batches_of_the_quickstart(step, distance, expected):
    settings = load_settings(ROOT / "configs/quickstart.yaml")
    curriculum = Curriculum(settings.recall.curriculum, settings.model.sliding_window, 480)
    objective = RecallObjective(settings, STORE, VOCAB, curriculum, 1)
    plan = objective.plan({"needle": distance})
    batch = objective.micro_batch(step, plan, range(plan.rows), {"needle": distance})
    scored = [part for term in ("answer", "relay") for part in (batch.targets[term].index, batch.targets[term].labels)]
    assert sha256([batch.input_ids, *scored]) == expected


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ({"needle": 1.0}, "35ebea8d258ed043"),
        ({"needle-noise": 1.0}, "c3e4d57d0a8ebde3"),
        ({"needle": 3.0, "needle-noise": 1.0}, "4b73800f553382d2"),
    ],
)
def test_the_rows_of_each_needle_task(tasks, expected):
    batch = recall_batch(STORE, VOCAB, 5, 7, range(12), 200, dict.fromkeys(tasks, 150), tasks, RULES)
    names = ("input_ids", "labels", "recall_labels", "relay_labels", "relay_layers", "distances")
    assert sha256([getattr(batch, name) for name in names]) == expected


@pytest.mark.parametrize(("task", "expected"), [("needle", "9a5feefc57ed3628"), ("needle-noise", "da9dd2cd744c21f8")])
def test_the_items_of_evaluation(task, expected):
    items = [
        item(task, np.random.default_rng([0, distance, i]), STORE, VOCAB, 320, distance)
        for distance in (1, 16, 288)
        for i in range(3)
    ]
    parts = [
        [*i.tokens, i.value_position, i.query_position, i.value, i.counterfactual_tokens[i.value_position]]
        for i in items
    ]
    assert sha256(map(np.array, parts)) == expected
