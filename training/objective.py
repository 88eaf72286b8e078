"""What the model is trained on: an objective makes the batch of a step, and says what is scored where.

Legend: B rows, T positions, E hidden size, N scored positions.
The loss of a term is summed over its tokens and divided by their number over all micro-batches and ranks, so that
1 x 8 accumulation, 8 x 1 and two ranks are the same step.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.batches import Batch, recall_batch, text_batch
from data.tasks import need_keys
from data.tasks.layout import RowRules
from data.tasks.question import UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary, TokenizerLike, recall_vocabulary
from data.token_store import TokenStore
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.flops import flops_per_token
from training.cross_entropy import cross_entropy
from training.curriculum import Curriculum
from training.processes.parallel import without_exchange
from training.processes.ranks import sum_over_ranks
from training.settings.consistency import recall_seq_len, row_tokens
from training.settings.schema import Settings

RELAY_HEAD = "relay_head"  # its name in checkpoints


@dataclass(frozen=True)
class Target:
    """Scored positions of a batch: `index` (N,) into its B*T positions, `labels` (N,) what each must predict.

    `tasks` (N,), on the CPU, is the number of the objective's task that asks there.
    """

    index: Tensor
    labels: Tensor
    tasks: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass needs. `input_ids` and `documents` are (B, T); None: every row is one document."""

    input_ids: Tensor
    documents: Tensor | None
    targets: dict[str, Target]

    def arguments(self) -> dict[str, Any]:
        """As `Scorer.forward` takes it; plain containers, so that data parallel wrappers see through them."""
        targets = {term: (t.index, t.labels) for term, t in self.targets.items()}
        return {"input_ids": self.input_ids, "documents": self.documents, "targets": targets}

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        targets = {k: Target(_move(t.index, device), _move(t.labels, device), t.tasks) for k, t in self.targets.items()}
        documents = None if self.documents is None else _move(self.documents, device)
        return MicroBatch(_move(self.input_ids, device), documents, targets)


@dataclass(frozen=True)
class Plan:
    """Shape of an objective's share of a step: `rows` of `seq_len` tokens over all ranks, `micro_rows` at a time."""

    rows: int
    seq_len: int
    micro_rows: int

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def micro_ranges(self, rank: int, ranks: int) -> list[range]:
        """Row ranges of this rank's micro-batches.

        >>> Plan(rows=8, seq_len=4, micro_rows=2).micro_ranges(rank=1, ranks=2)
        [range(4, 6), range(6, 8)]
        """
        share = self.rows // ranks
        first, last = rank * share, (rank + 1) * share
        return [range(i, min(i + self.micro_rows, last)) for i in range(first, last, self.micro_rows)]


class Objective(Protocol):
    """One source of gradients, with its own clipping and its own moments."""

    name: str
    max_grad_norm: float
    points: list[tuple[float, float]]
    term_weights: Mapping[str, float]
    ranks: int
    tasks: list[str]  # whose answers are counted apart

    def plan(self, distances: Mapping[str, int]) -> Plan:
        """`distances` is D of each recall task."""
        ...

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch: ...


class TextObjective:
    """Next-token prediction on packed documents."""

    name = "text"

    def __init__(self, settings: Settings, store: TokenStore, ranks: int):
        self.settings, self.store, self.ranks = settings, store, ranks
        self.max_grad_norm = settings.training.optimizer.max_grad_norm
        self.points = settings.training.text_weight
        self.term_weights: Mapping[str, float] = {"text": 1.0}
        self.tasks: list[str] = []

    def plan(self, distances: Mapping[str, int]) -> Plan:
        t = self.settings.training
        return step_plan(t.tokens_per_step, self.settings.data.seq_len, t.micro_batch_tokens, self.ranks)

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        batch = text_batch(self.store, self.settings.seed, step, rows, plan.seq_len, rows_per_step=plan.rows)
        return _micro_batch(batch, batch.documents, {"text": batch.labels})


class RecallObjective:
    """Answers at query positions; with `relay_loss_weight` also the value, read from plain filler positions.

    `relay_pace` asks fillers after early layers too (deep supervision; Lee and others, 2015): each layer is told
    to hand the value on, where the loss at the end alone would have to find that out through all layers at once.
    """

    name = "recall"

    def __init__(
        self, settings: Settings, store: TokenStore, vocabulary: RecallVocabulary, curriculum: Curriculum, ranks: int
    ):
        self.settings, self.store, self.vocabulary = settings, store, vocabulary
        self.curriculum, self.ranks = curriculum, ranks
        recall = settings.recall
        self.max_grad_norm = recall.max_grad_norm or settings.training.optimizer.max_grad_norm
        self.points = recall.weight
        optional = {"relay": recall.relay_loss_weight, "text": recall.text_loss_weight}
        self.term_weights: Mapping[str, float] = {"answer": recall.answer_loss_weight} | {
            term: weight for term, weight in optional.items() if weight > 0
        }
        self.tasks = [str(task) for task in recall.tasks]

    def plan(self, distances: Mapping[str, int]) -> Plan:
        """All tasks share a step's rows, so the farthest of their distances decides."""
        t, recall = self.settings.training, self.settings.recall
        farthest, needed = max(distances.values()), row_tokens(self.settings, distances)
        tokens = (recall.tokens_per_step or t.tokens_per_step) * self.curriculum.batch_factor(farthest)
        length = self.curriculum.row_length(farthest, recall_seq_len(self.settings), needed)
        return step_plan(tokens, length, t.micro_batch_tokens, self.ranks)

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        batch = recall_batch(
            self.store,
            self.vocabulary,
            self.settings.seed,
            step,
            rows,
            plan.seq_len,
            max_distances=distances,
            tasks={str(task): share for task, share in self.settings.recall.tasks.items()},
            rules=RowRules(**self.settings.recall.rows.model_dump(), layers=self.settings.model.num_hidden_layers),
            options=TaskOptions(**self.settings.recall.questions.model_dump()),
        )
        labels = {"answer": batch.recall_labels, "relay": batch.relay_labels, "text": batch.labels}
        micro = _micro_batch(batch, None, {term: labels[term] for term in self.term_weights})  # one document a row
        answer = micro.targets["answer"]
        micro.targets["answer"] = replace(answer, tasks=batch.tasks[answer.index // plan.seq_len])
        if relay := micro.targets.get("relay"):
            micro.targets["relay"] = _after_layers(relay, batch.relay_layers)
        return micro


def task_vocabulary(settings: Settings, tokenizer: TokenizerLike) -> RecallVocabulary:
    """What the run's recall tasks are made of; keys only where a task uses them."""
    recall = settings.recall
    return recall_vocabulary(tokenizer, recall.values, recall.keys if need_keys(recall.tasks) else 0)


def objectives(
    settings: Settings, store: TokenStore, vocabulary: RecallVocabulary | None, curriculum: Curriculum, ranks: int
) -> list[Objective]:
    """Text, and recall where it is enabled."""
    text = TextObjective(settings, store, ranks)
    if vocabulary is None:
        return [text]
    return [text, RecallObjective(settings, store, vocabulary, curriculum, ranks)]


class Scorer(nn.Module):
    """The decoder and its auxiliary relay head in one module, so that ranks and precision wrap both.

    The relay head reads the value from the residual stream at a filler position; it is discarded at export.
    """

    decoder: WindreachForCausalLM
    relay_head: nn.Linear | None

    def __init__(self, decoder: WindreachForCausalLM, relay_values: int | None, z_loss_weight: float = 0.0):
        super().__init__()
        self.decoder, self.z_loss_weight = decoder, z_loss_weight
        self.relay_head = nn.Linear(decoder.config.hidden_size, relay_values, bias=False) if relay_values else None
        if self.relay_head is not None:
            nn.init.zeros_(self.relay_head.weight)

    def forward(
        self, input_ids: Tensor, documents: Tensor | None, targets: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Per term: the summed loss in nats, and which were right (N,). Logits exist only at scored positions."""
        out = self.decoder.model(input_ids, documents=documents, output_hidden_states="relay" in targets)
        scores = {}
        for term, (index, labels) in targets.items():
            if term == "relay":
                scores[term] = _score_relay(self._relay_logits(out.hidden_states, index), labels)
            else:
                hidden_ne = out.last_hidden_state.flatten(0, 1).index_select(0, index)
                scores[term] = cross_entropy(hidden_ne, self.decoder.lm_head.weight, labels, self.z_loss_weight)
        if self.relay_head is not None and "relay" not in targets:
            term, (loss, right) = next(iter(scores.items()))
            scores[term] = loss + 0.0 * self.relay_head.weight.sum(), right  # ranks wait for a gradient of every weight
        return scores

    def auxiliary(self) -> dict[str, Tensor]:
        """What is trained and saved, but not part of the decoder."""
        return {} if self.relay_head is None else {RELAY_HEAD: self.relay_head.weight}

    def _relay_logits(self, streams: tuple[Tensor, ...] | None, index: Tensor) -> Tensor:
        """(N, values) at `index` into the positions of all streams (B, T, E): the embedding, then after each layer."""
        assert streams is not None
        assert self.relay_head is not None
        stream_ne = torch.stack(streams).flatten(0, 2).index_select(0, index)
        return self.relay_head(self.decoder.model.norm(stream_ne))


@dataclass
class Measured:
    """What an objective gave in one step, over all ranks: per term the loss sum, right answers and tokens scored."""

    sums: dict[str, tuple[float, float, float]]
    grad_norm: float
    answered: dict[str, tuple[float, float]] = field(default_factory=dict)  # right answers and queries of each task

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and all(math.isfinite(total) for total, _, _ in self.sums.values())

    def columns(self, objective: str) -> dict[str, float]:
        """For the log: `loss_text`, `accuracy_answer`, `grad_norm_recall` ..."""
        columns = {f"grad_norm_{objective}": self.grad_norm}
        for term in self.sums:
            name = term if term != "text" or objective == "text" else f"text_of_{objective}"
            columns |= {f"loss_{name}": self.loss(term), f"accuracy_{name}": self.accuracy(term)}
        if len(self.answered) > 1:
            columns |= {f"accuracy_{task}": right / max(n, 1.0) for task, (right, n) in self.answered.items()}
        return columns

    def loss(self, term: str) -> float:
        total, _, count = self.sums[term]
        return total / max(count, 1.0)

    def accuracy(self, term: str) -> float:
        _, right, count = self.sums[term]
        return right / max(count, 1.0)


def differentiate(
    objective: Objective, accelerator: Accelerator, wrapped: nn.Module, step: int, distances: Mapping[str, int]
) -> tuple[Plan, dict[str, tuple[float, float, float]], dict[str, tuple[float, float]]]:
    """Add the objective's gradients of this step to the parameters; returns `sums` and `answered` of `Measured`."""
    plan = objective.plan(distances)
    ranks = accelerator.num_processes
    micro_batches = [
        objective.micro_batch(step, plan, rows, distances)
        for rows in plan.micro_ranges(accelerator.process_index, ranks)
    ]
    terms, tasks = list(objective.term_weights), objective.tasks
    counts = sum_over_ranks([float(sum(len(m.targets[t].labels) for m in micro_batches)) for t in terms])
    totals = torch.zeros(2 * len(terms), dtype=torch.float64)
    answered = torch.zeros(2 * len(tasks), dtype=torch.float64)
    for number, micro_batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with nullcontext() if last else without_exchange(accelerator, wrapped):
            scores = wrapped(**micro_batch.to(accelerator.device).arguments())
            loss = weighted_loss(scores, objective.term_weights, dict(zip(terms, counts, strict=True)), ranks)
            accelerator.backward(loss)
        totals += torch.stack([x.detach().double().sum() for t in terms for x in scores[t]]).cpu()
        if tasks:
            answered += _by_task(micro_batch.targets["answer"].tasks, scores["answer"][1].cpu(), len(tasks))
    sums = sum_over_ranks([*totals.tolist(), *answered.tolist()])
    right, asked = sums[2 * len(terms) :][: len(tasks)], sums[2 * len(terms) + len(tasks) :]
    return (
        plan,
        {t: (sums[2 * i], sums[2 * i + 1], counts[i]) for i, t in enumerate(terms)},
        {task: (right[i], asked[i]) for i, task in enumerate(tasks)},
    )


def _by_task(tasks: Tensor | None, right: Tensor, n: int) -> Tensor:
    """(2 n,) right answers of each task, then queries of each. Both arguments are (N,).

    >>> _by_task(torch.tensor([0, 2, 2]), torch.tensor([True, True, False]), 3).tolist()
    [1.0, 0.0, 1.0, 1.0, 0.0, 2.0]
    """
    assert tasks is not None
    return torch.cat((torch.bincount(tasks, weights=right.double(), minlength=n), torch.bincount(tasks, minlength=n)))


def step_flops(config: WindreachConfig, plan: Plan, scored: float) -> float:
    """FLOPs of one forward and backward pass over the plan's rows, of which only `scored` positions reach a head."""
    head = 6 * config.hidden_size * config.vocab_size
    return plan.tokens * (flops_per_token(config, plan.seq_len, training=True) - head) + scored * head


def weighted_loss(
    scores: dict[str, tuple[Tensor, Tensor]], weights: Mapping[str, float], counts: Mapping[str, float], ranks: int
) -> Tensor:
    """The loss to differentiate. Times `ranks`, because data parallelism averages gradients over ranks."""
    parts = [ranks * weights[term] / max(counts[term], 1.0) * total for term, (total, _) in scores.items()]
    return torch.stack(parts).sum()


def _score_relay(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `cross_entropy`; where there is no value yet (label: their number) all values are to be equally likely."""
    logits, n = logits.float(), logits.shape[-1]
    normaliser = logits.logsumexp(-1)
    known = labels < n
    picked = logits.gather(-1, labels.clamp(max=n - 1)[:, None])[:, 0]
    loss = torch.where(known, normaliser - picked, normaliser - logits.mean(-1) - math.log(n))
    with torch.no_grad():
        peak, best = logits.max(-1)
        right = torch.where(known, best == labels, peak - normaliser < math.log(0.5))
    return loss.sum(), right


def step_plan(tokens: int, seq_len: int, micro_batch_tokens: int | None, ranks: int) -> Plan:
    """The plan nearest to `tokens` a step, every rank with the same number of rows and at least one.

    >>> step_plan(tokens=64, seq_len=16, micro_batch_tokens=None, ranks=3)
    Plan(rows=3, seq_len=16, micro_rows=1)
    """
    rows = max(1, round(tokens / (seq_len * ranks))) * ranks
    micro_rows = max(1, micro_batch_tokens // seq_len) if micro_batch_tokens else rows // ranks
    return Plan(rows, seq_len, min(micro_rows, rows // ranks))


def _micro_batch(batch: Batch, documents: Tensor | None, labels: dict[str, Tensor]) -> MicroBatch:
    return MicroBatch(batch.input_ids, documents, {term: _target(x) for term, x in labels.items()})


def _after_layers(target: Target, layers_bt: Tensor) -> Target:
    """The target with its index into the (layers + 1) * B * T positions of the streams after each layer."""
    return Target(target.index + layers_bt.flatten()[target.index] * layers_bt.numel(), target.labels)


def _target(labels_bt: Tensor) -> Target:
    flat = labels_bt.flatten()
    index = (flat != UNSCORED).nonzero().squeeze(1)
    return Target(index, flat[index])


def _move(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True)
