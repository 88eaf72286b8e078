"""Validation during training: bits per byte of held-out text, and recall at a few distances with one query per item.

Layers run uncompiled here, because other shapes and no gradients would compile them again. Ranks share the work.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from data.batches import text_batch
from data.mixture import ConcatRows, HeldOutRows, Mixture, Rows, Shares
from data.tasks.distance import last_distance_holding
from data.tasks.layout import RecallItem, item, task_size
from data.tasks.question import UNSCORED
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.decoder import WindreachForCausalLM
from model.packing import Packing
from training.cross_entropy import cross_entropy
from training.curriculum import Curriculum
from training.objective import recall_rules
from training.processes.context import ALONE, Layout
from training.processes.ranks import sum_over_ranks
from training.settings.schema import Settings

ROWS = 16  # sequences of a forward pass, or those of a micro-batch if they are fewer


class Probe:
    """Measures the same held-out text and the same questions all through a run."""

    def __init__(
        self, settings: Settings, heldout: Mapping[str, TokenStore], vocabulary: RecallVocabulary | None,
        curriculum: Curriculum, micro_rows: int = ROWS, layout: Layout = ALONE,
    ):  # fmt: skip
        """`heldout`: the held-out text of each source."""
        self.settings, self.heldout, self.rows, self.layout = settings, heldout, min(ROWS, micro_rows), layout
        self.items: dict[str, dict[int, list[RecallItem]]] = {}  # by task and distance
        if vocabulary is None:
            return
        store = TokenStore.joined(list(heldout.values()))
        far, window, options = curriculum.last_distance, curriculum.window, recall_rules(settings)[1]
        doubled = [d for i in range(32) if (d := window << i) < far]  # W, 2W, 4W ...
        distances = settings.training.probe_distances or [*doubled, far]
        for task in map(str, settings.recall.tasks):
            size, questions = task_size(task, vocabulary, options), self.items.setdefault(task, {})
            length = max(max(distances) + 2 * window, size.row(max(distances)))
            for d in (d for d in distances if d >= size.nearest):
                seeds = ([settings.seed, d, i] for i in range(settings.training.probe_items))
                rngs = map(np.random.default_rng, seeds)
                questions[d] = [item(task, rng, store, vocabulary, length, d, options) for rng in rngs]

    def text(self, decoder: WindreachForCausalLM) -> dict[str, float]:
        """Bits per byte of `training.validation_tokens` tokens of each source, and under "" of all of them together."""
        nats: dict[str, float] = {}
        n_bytes: dict[str, float] = {}
        with _evaluating(decoder):
            for name, store in self.heldout.items():
                nats[name], n_bytes[name] = self._source(decoder, store)
        nats, n_bytes = sum_over_ranks(nats), sum_over_ranks(n_bytes)
        nats[""], n_bytes[""] = sum(nats.values()), sum(n_bytes.values())
        return {name: nats[name] / math.log(2) / max(1.0, n_bytes[name]) for name in nats}

    def _source(self, decoder: WindreachForCausalLM, store: TokenStore) -> tuple[float, float]:
        """Nats and bytes of this rank's share of a source, in sequences of `data.seq_len` tokens or all that it has."""
        seq_len = min(self.settings.data.seq_len, store.n_tokens - 1)
        rows: Rows = HeldOutRows(store, seq_len) if store.conversations else ConcatRows(store, seq_len)
        n = min(len(rows), max(1, self.settings.training.validation_tokens // seq_len))
        mixture, device = Mixture({"": rows}, Shares([1.0], n, 1, seed=0)), decoder.device
        nats, n_bytes = torch.zeros((), dtype=torch.float64, device=device), 0
        for first in range(self.layout.rank * self.rows, n, self.layout.ranks * self.rows):
            batch = text_batch(mixture, 0, range(first, min(first + self.rows, n)))
            own = self.layout.own(batch.input_ids.shape[1])
            packing, labels = self.layout.packing(Packing.of_documents(batch.documents)), batch.labels[:, own].flatten()
            ids = batch.input_ids[:, own].to(device)
            hidden = decoder.model(ids, packing=packing.to(device)).last_hidden_state.flatten(0, 1)
            nats += cross_entropy(hidden, decoder.lm_head.weight, labels.to(device)).loss
            n_bytes += int(store.token_bytes[labels[labels != UNSCORED].numpy()].sum())
        return nats.item(), float(n_bytes)

    def recall(self, decoder: WindreachForCausalLM) -> "Recalled":
        """Share of questions whose answer is the most likely of all tokens; empty without recall."""
        right: dict[tuple[str, int], float] = {}
        with _evaluating(decoder):
            for task, by_distance in self.items.items():
                for distance, items in by_distance.items():
                    mine = items[self.layout.rank :: self.layout.ranks]
                    parts = [mine[i : i + self.rows] for i in range(0, len(mine), self.rows)]
                    right[task, distance] = sum(_right(decoder, part, self.layout) for part in parts)
        total = sum_over_ranks(right)
        return Recalled({t: {d: total[t, d] / len(asked[d]) for d in asked} for t, asked in self.items.items()})


class Recalled(dict[str, dict[int, float]]):
    """Share of right answers by task and distance.

    >>> print(Recalled({"needle": {16: 1.0, 32: 0.5}}))
      16:1.00  32:0.50
    >>> print(Recalled({"needle": {16: 1.0}, "keys": {16: 0.5}}))
      needle  16:1.00  keys  16:0.50
    >>> print(Recalled())
     off
    """

    def columns(self) -> dict[str, Any]:
        """For the log: the figures of the first task, and those of each where there are several."""
        first = next(iter(self.values()), {})
        each = {"by_task": dict(self)} | {f"horizon_{task}": horizon(shares) for task, shares in self.items()}
        return {"accuracy": first, "horizon": horizon(first)} | (each if len(self) > 1 else {})

    def __str__(self) -> str:
        shown = {task: "".join(f"  {d}:{share:.2f}" for d, share in shares.items()) for task, shares in self.items()}
        return "".join(f"  {task}{shares}" if len(self) > 1 else shares for task, shares in shown.items()) or " off"


def horizon(accuracy: dict[int, float]) -> int:
    """Largest distance up to which 90 % are right at every measured distance; 0 if they are not at the first."""
    return last_distance_holding(accuracy, accuracy.values(), 0.9)


def _right(decoder: WindreachForCausalLM, items: list[RecallItem], layout: Layout) -> int:
    """How many of these questions the decoder answers right, of those whose query this process holds."""
    tokens = len(items[0].tokens)
    own, packing = layout.own(tokens), layout.packing(Packing.of_whole_rows(tokens, torch.device("cpu")))
    ids = torch.tensor([i.tokens[own] for i in items], device=decoder.device)
    last = torch.tensor([i.query_position for i in items], device=ids.device) - own.start
    wanted = torch.tensor([i.answer for i in items], device=ids.device)
    mine = ((last >= 0) & (last < own.stop - own.start)).nonzero()[:, 0]
    hidden = decoder.model(ids, packing=packing.to(ids.device)).last_hidden_state[mine, last[mine]]
    return int((decoder.lm_head(hidden).argmax(-1) == wanted[mine]).sum())


@contextmanager
def _evaluating(decoder: WindreachForCausalLM) -> Iterator[None]:
    """Eval mode without gradients and compilation inside; training mode again after."""
    decoder.eval()
    try:
        with torch.no_grad(), decoder.uncompiled_layers():
            yield
    finally:
        decoder.train()
