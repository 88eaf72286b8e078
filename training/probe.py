"""In-loop validation: bits per byte on held-out text, and recall at a few distances with one needle and one query.

Layers run uncompiled here: other shapes and no gradients would compile them again.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

from data.packing import TokenStore
from data.recall import RecallItem, item
from data.recall_vocabulary import RecallVocabulary
from training.curriculum import Curriculum
from training.settings import Settings

ROWS = 16  # rows of a forward pass


def default_distances(window: int, reach: int) -> list[int]:
    """W, 2W, 4W ... and R.

    >>> default_distances(16, 480)
    [16, 32, 64, 128, 256, 480]
    """
    return [d for i in range(32) if (d := window << i) < reach] + [reach]


class Probe:
    """Asks the same questions all through a run; the store is held-out text."""

    def __init__(
        self, settings: Settings, store: TokenStore, vocabulary: RecallVocabulary | None, curriculum: Curriculum
    ):
        self.settings, self.store = settings, store
        far, window = curriculum.last_distance, curriculum.window
        distances = settings.training.probe_distances or default_distances(window, far)
        self.total_length = max(distances) + 2 * window
        self.items = {d: self._questions(vocabulary, d) for d in distances} if vocabulary is not None else {}

    def _questions(self, vocabulary: RecallVocabulary, distance: int) -> list[RecallItem]:
        task, seed = next(iter(self.settings.recall.tasks)), self.settings.seed
        return [
            item(task, random.Random(f"{seed}/{distance}/{i}"), self.store, vocabulary, self.total_length, distance)
            for i in range(self.settings.training.probe_items)
        ]

    @torch.no_grad()
    def text(self, decoder: nn.Module) -> float:
        """Bits per byte over the first `training.validation_tokens` tokens, in rows of `data.seq_len`."""
        seq_len = self.settings.data.seq_len
        rows = max(1, min(self.settings.training.validation_tokens, len(self.store.tokens)) // seq_len)
        nats, n_bytes = 0.0, 0
        with _evaluating(decoder):
            for first in range(0, rows, ROWS):
                last = min(first + ROWS, rows)
                ids = torch.from_numpy(self.store.tokens[first * seq_len : last * seq_len].astype("int64"))
                ids = ids.view(-1, seq_len).to(_device(decoder))
                logits = decoder(ids).logits[:, :-1].float()
                nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
                n_bytes += sum(self.store.n_bytes(r * seq_len + 1, (r + 1) * seq_len) for r in range(first, last))
        return nats / math.log(2) / max(1, n_bytes)

    @torch.no_grad()
    def recall(self, decoder: nn.Module) -> dict[int, float]:
        """Share of questions whose value is the most likely of all tokens, by distance; empty without recall."""
        with _evaluating(decoder):
            return {
                distance: sum(_right(decoder, group[i : i + ROWS]) for i in range(0, len(group), ROWS)) / len(group)
                for distance, group in self.items.items()
            }


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


def _right(decoder: nn.Module, group: list[RecallItem]) -> int:
    ids = torch.tensor([list(i.tokens) for i in group], device=_device(decoder))
    last = torch.tensor([i.query_position for i in group], device=ids.device)
    wanted = torch.tensor([i.value for i in group], device=ids.device)
    hidden = decoder.model(ids).last_hidden_state[torch.arange(len(group), device=ids.device), last]
    return int((decoder.lm_head(hidden).argmax(-1) == wanted).sum())


def _device(decoder: nn.Module) -> torch.device:
    return next(decoder.parameters()).device


class _evaluating:
    """Eval mode and no compilation inside; training mode again after."""

    def __init__(self, decoder: nn.Module):
        self.decoder, self.stance = decoder, torch.compiler.set_stance("force_eager")

    def __enter__(self) -> None:
        self.decoder.eval()
        self.stance.__enter__()

    def __exit__(self, *problem: object) -> None:
        self.stance.__exit__(*problem)
        self.decoder.train()
