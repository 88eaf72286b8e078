"""In-loop validation: bits per byte on held-out text, and recall at a few distances with one needle and one query.

Layers run uncompiled here: other shapes and no gradients would compile them again.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState

from data.batches import text_batch
from data.packing import TokenStore
from data.recall import UNSCORED, RecallItem, item
from data.recall_vocabulary import RecallVocabulary
from model.decoder import WindreachForCausalLM
from training.curriculum import Curriculum
from training.ranks import sum_over_ranks
from training.settings import Settings

ROWS = 16  # rows of a forward pass


def default_distances(window: int, reach: int) -> list[int]:
    """W, 2W, 4W ... and R.

    >>> default_distances(16, 480)
    [16, 32, 64, 128, 256, 480]
    """
    return [d for i in range(32) if (d := window << i) < reach] + [reach]


class Probe:
    """Asks the same questions all through a run; the store is held-out text. Ranks share the work."""

    def __init__(
        self, settings: Settings, store: TokenStore, vocabulary: RecallVocabulary | None, curriculum: Curriculum
    ):
        self.settings, self.store = settings, store
        self.rank, self.ranks = PartialState().process_index, PartialState().num_processes
        far, window = curriculum.last_distance, curriculum.window
        distances = settings.training.probe_distances or default_distances(window, far)
        self.total_length = max(distances) + 2 * window
        self.items = {d: self._questions(vocabulary, d) for d in distances} if vocabulary is not None else {}

    def _questions(self, vocabulary: RecallVocabulary, distance: int) -> list[RecallItem]:
        task, seed = next(iter(self.settings.recall.tasks)), self.settings.seed
        return [
            item(task, np.random.default_rng([seed, distance, i]), self.store, vocabulary, self.total_length, distance)
            for i in range(self.settings.training.probe_items)
        ]

    @torch.no_grad()
    def text(self, decoder: WindreachForCausalLM) -> float:
        """Bits per byte over the first `training.validation_tokens` tokens, in rows of `data.seq_len`."""
        seq_len = self.settings.data.seq_len
        rows = max(1, min(self.settings.training.validation_tokens, len(self.store.tokens) - 1) // seq_len)
        nats, n_bytes = 0.0, 0
        with _evaluating(decoder):
            for first in range(self.rank * ROWS, rows, self.ranks * ROWS):
                chosen = range(first, min(first + ROWS, rows))
                batch = text_batch(self.store, 0, 0, chosen, seq_len, rows_per_step=rows)
                logits = decoder(batch.input_ids.to(_device(decoder)), batch.documents.to(_device(decoder))).logits
                labels = batch.labels.flatten()
                nats += F.cross_entropy(logits.flatten(0, 1).float(), labels.to(logits.device), reduction="sum").item()
                n_bytes += int(self.store.token_bytes[labels[labels != UNSCORED].numpy()].sum())
        nats, total = sum_over_ranks([nats, float(n_bytes)])
        return nats / math.log(2) / max(1.0, total)

    @torch.no_grad()
    def recall(self, decoder: WindreachForCausalLM) -> dict[int, float]:
        """Share of questions whose value is the most likely of all tokens, by distance; empty without recall."""
        right = []
        with _evaluating(decoder):
            for group in self.items.values():
                mine = group[self.rank :: self.ranks]
                right.append(float(sum(_right(decoder, mine[i : i + ROWS]) for i in range(0, len(mine), ROWS))))
        return {d: n / len(self.items[d]) for d, n in zip(self.items, sum_over_ranks(right), strict=True)}


def horizon(accuracy: dict[int, float], level: float = 0.9) -> int:
    """Largest measured distance up to which every measured distance reaches `level`; 0 if the first does not.

    >>> horizon({16: 1.0, 32: 0.95, 64: 0.2, 128: 0.9})
    32
    """
    reached = 0
    for distance in sorted(accuracy):
        if accuracy[distance] < level:
            break
        reached = distance
    return reached


def _right(decoder: WindreachForCausalLM, group: list[RecallItem]) -> int:
    ids = torch.tensor([list(i.tokens) for i in group], device=_device(decoder))
    last = torch.tensor([i.query_position for i in group], device=ids.device)
    wanted = torch.tensor([i.value for i in group], device=ids.device)
    hidden = decoder.model(ids).last_hidden_state[torch.arange(len(group), device=ids.device), last]
    return int((decoder.lm_head(hidden).argmax(-1) == wanted).sum())


def _device(decoder: WindreachForCausalLM) -> torch.device:
    return next(decoder.parameters()).device


class _evaluating:
    """Eval mode and no compilation inside; training mode again after."""

    def __init__(self, decoder: WindreachForCausalLM):
        self.decoder, self.stance = decoder, torch.compiler.set_stance("force_eager")

    def __enter__(self) -> None:
        self.decoder.eval()
        self.stance.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.stance.__exit__(*problem)
        self.decoder.train()
