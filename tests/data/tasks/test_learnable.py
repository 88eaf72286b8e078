"""A task that a small model with full attention can't learn would be a mistake of the generator.

Two that take seconds are trained here. The others pass through a plateau first: in the same set-up, or with more rows
and layers, they take one to several minutes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.batches import recall_batch
from data.tasks import TASKS
from data.tasks.layout import item
from data.tasks.question import DEFAULT_OPTIONS, UNSCORED
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.config import WindreachConfig
from model.decoder import build_model

VOCAB = RecallVocabulary((1,), (2,), tuple(range(3, 11)), np.arange(19, 64), tuple(range(11, 19)))
TEXT = np.random.default_rng(0).integers(19, 64, 50_000).astype(np.uint16)
STORE = TokenStore.of(TEXT, np.array([0]), np.ones(64, dtype=np.int64))
LENGTH, FAR, STEPS, ITEMS = 32, 20, 130, 100


def small_model():
    config = WindreachConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, sliding_window=8, layers=[{"kind": "full", "window": None}] * 2,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    return build_model(config, None, 0)


def trained(task):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98))
    for step in range(STEPS):
        batch = recall_batch(STORE, VOCAB, 0, step, range(64), LENGTH, {task: FAR}, {task: 1.0})
        asked = batch.recall_labels != UNSCORED
        hidden = model.model(batch.input_ids).last_hidden_state[asked]
        optimizer.zero_grad()
        F.cross_entropy(model.lm_head(hidden), batch.recall_labels[asked]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, task, distance):
    items = [item(task, np.random.default_rng([9, i]), STORE, VOCAB, LENGTH, distance) for i in range(ITEMS)]
    hidden = model.model(torch.tensor([made.tokens for made in items])).last_hidden_state
    best = model.lm_head(hidden[:, items[0].query_position]).argmax(-1).tolist()
    return sum(token == made.answer for token, made in zip(best, items)) / ITEMS


@pytest.mark.parametrize("task", ["needle", "instruction"])
def test_a_small_model_learns_it_in_seconds_from_the_rows_of_training(task):
    torch.manual_seed(0)
    assert accuracy(small_model(), task, FAR) < TASKS[task].chance(len(VOCAB.values), DEFAULT_OPTIONS) + 0.15
    model = trained(task)
    assert min(accuracy(model, task, distance) for distance in (4, FAR)) > 0.9
