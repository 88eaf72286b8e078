"""In-loop validation: bits per byte on held-out text, and recall at a few distances with one needle and one query.

Layers run uncompiled here: other shapes and no gradients would compile them again.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState

from data.batches import text_batch
from data.tasks.layout import RecallItem, item, task_size
from data.tasks.question import UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.decoder import WindreachForCausalLM
from training.curriculum import Curriculum
from training.processes.ranks import sum_over_ranks
from training.settings.schema import Settings

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
        self.items: dict[str, dict[int, list[RecallItem]]] = {}
        if vocabulary is not None:
            self.items = {
                str(task): self._questions(str(task), vocabulary, distances) for task in settings.recall.tasks
            }

    def _questions(self, task: str, vocabulary: RecallVocabulary, distances: list[int]) -> dict[int, list[RecallItem]]:
        """By distance, those that the task can have."""
        seed, options = self.settings.seed, TaskOptions(**self.settings.recall.questions.model_dump())
        size = task_size(task, vocabulary, options)
        length = max(self.total_length, size.row(max(distances)))
        return {
            d: [
                item(task, np.random.default_rng([seed, d, i]), self.store, vocabulary, length, d, options)
                for i in range(self.settings.training.probe_items)
            ]
            for d in distances
            if d >= size.nearest
        }

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
    def recall(self, decoder: WindreachForCausalLM) -> "Recalled":
        """Share of questions whose answer is the most likely of all tokens; nothing without recall."""
        groups = [(task, d, group) for task, by_distance in self.items.items() for d, group in by_distance.items()]
        right = []
        with _evaluating(decoder):
            for _, _, group in groups:
                mine = group[self.rank :: self.ranks]
                right.append(float(sum(_right(decoder, mine[i : i + ROWS]) for i in range(0, len(mine), ROWS))))
        found = Recalled({task: {} for task in self.items})
        for (task, d, group), n in zip(groups, sum_over_ranks(right), strict=True):
            found[task][d] = n / len(group)
        return found


class Recalled(dict[str, dict[int, float]]):
    """Share of right answers by task and distance.

    >>> print(Recalled({"needle": {16: 1.0, 32: 0.5}}))
      16:1.00  32:0.50
    >>> print(Recalled({"needle": {16: 1.0}, "keys": {16: 0.5}}))
      needle  16:1.00  keys  16:0.50
    """

    @property
    def horizon(self) -> int:
        """Of the first task, in tokens."""
        return horizon(next(iter(self.values()), {}))

    def columns(self) -> dict[str, Any]:
        """For the log: the first task's figures, and each one's where there are several."""
        first = {"accuracy": next(iter(self.values()), {}), "horizon": self.horizon}
        if len(self) < 2:
            return first
        return first | {"by_task": dict(self)} | {f"horizon_{task}": horizon(found) for task, found in self.items()}

    def __str__(self) -> str:
        shown = {task: "".join(f"  {d}:{a:.2f}" for d, a in found.items()) for task, found in self.items()}
        return "".join(f"  {task}{figures}" if len(self) > 1 else figures for task, figures in shown.items()) or " off"


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
    wanted = torch.tensor([i.answer for i in group], device=ids.device)
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
