"""What the model is trained on: an objective makes the batches of a step and says what is scored at which positions.

Legend: B sequences, T positions, E hidden size, N scored positions.
The loss of a term is its sum over tokens, divided by their number over all micro-batches and ranks. So one sequence
eight times, eight sequences at once, and two ranks give the same step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from data.batches import recall_batch, text_batch
from data.tasks.layout import RowRules
from data.tasks.question import UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.flops import flops_per_token
from model.packing import Packing
from training.cross_entropy import Score, cross_entropy
from training.curriculum import Curriculum
from training.processes.parallel import exchange_gradients
from training.processes.ranks import sum_tensor_over_ranks
from training.settings.consistency import recall_seq_len, row_tokens
from training.settings.schema import Settings

RELAY_HEAD = "relay_head"  # its name in checkpoints


class Target(NamedTuple):
    """Scored positions: `index` (N,) into the B*T positions of a batch, `labels` (N,) what each must predict.

    For the relay head `index` counts into the (layers + 1) * B*T positions of the embedding and all layers' outputs.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    labels: Tensor


class MicroBatch(NamedTuple):
    """What one forward pass needs: token ids (B, T), their documents, and what is scored."""

    input_ids: Tensor
    packing: Packing
    targets: dict[str, Target]
    answer_tasks: Tensor  # (N,) number of the task of each answer

    def padded(self) -> "MicroBatch":
        """With targets for an eighth, a quarter, a half or all of its tokens, so that few shapes occur."""
        tokens, spans = self.input_ids.numel(), self.packing.spans
        packing = self.packing if spans is None else replace(self.packing, spans=max(16, 1 << (spans - 1).bit_length()))
        sizes = [-(-tokens // part) for part in (8, 4, 2, 1)]
        missing = {
            term: next(size for size in sizes if len(labels) <= size) - len(labels)
            for term, (_, labels) in self.targets.items()
        }
        targets = {
            term: Target(F.pad(index, (0, missing[term])), F.pad(labels, (0, missing[term]), value=UNSCORED))
            for term, (index, labels) in self.targets.items()
        }
        return MicroBatch(self.input_ids, packing, targets, F.pad(self.answer_tasks, (0, missing.get("answer", 0))))


# So that `tree_map` moves its tensors to a device, as it does those of a named tuple.
register_pytree_node(
    Packing,
    lambda p: ([p.positions, p.documents], (p.whole, p.padded, p.spans)),
    lambda tensors, facts: Packing(*tensors, *facts),
)


@dataclass(frozen=True)
class Plan:
    """An objective's share of a step: `rows` sequences of `seq_len` tokens, `micro_rows` at a time on each rank."""

    rows: int
    seq_len: int
    micro_rows: int

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def micro_ranges(self, rank: int, ranks: int) -> list[range]:
        """Numbers of the sequences in each micro-batch of this rank.

        >>> Plan(rows=8, seq_len=4, micro_rows=2).micro_ranges(rank=1, ranks=2)
        [range(4, 6), range(6, 8)]
        """
        n = self.rows // ranks
        own = range(rank * n, (rank + 1) * n)
        return [own[i : i + self.micro_rows] for i in range(0, n, self.micro_rows)]


def step_plan(tokens: int, seq_len: int, micro_batch_tokens: int | None, ranks: int) -> Plan:
    """The plan nearest to `tokens` a step; every rank has the same number of sequences, and at least one.

    >>> step_plan(tokens=64, seq_len=16, micro_batch_tokens=None, ranks=3)
    Plan(rows=3, seq_len=16, micro_rows=1)
    """
    rows = max(1, round(tokens / (seq_len * ranks))) * ranks
    micro_rows = max(1, micro_batch_tokens // seq_len) if micro_batch_tokens else rows // ranks
    return Plan(rows, seq_len, min(micro_rows, rows // ranks))


class Objective(ABC):
    """A source of gradients with its own clipping and moments. `points`: its weight as [share of all steps, weight]."""

    name: str
    term_weights: Mapping[str, float]
    tasks: tuple[str, ...] = ()  # recall tasks whose accuracy is reported separately

    def __init__(
        self, settings: Settings, store: TokenStore, ranks: int, points: list[tuple[float, float]], max_grad_norm: float
    ):
        self.settings, self.store, self.ranks = settings, store, ranks
        self.points, self.max_grad_norm = points, max_grad_norm

    @abstractmethod
    def plan(self, distances: Mapping[str, int], ranks: int | None = None) -> Plan:
        """The plan of a step for `ranks` processes, default: as many as there are; `distances` is D of each task."""

    @abstractmethod
    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        """Sequences `rows` of a step."""

    def micro_batches(self, step: int, distances: Mapping[str, int], rank: int) -> list[MicroBatch]:
        """All micro-batches of one rank in a step."""
        plan = self.plan(distances)
        return [self.micro_batch(step, plan, rows, distances) for rows in plan.micro_ranges(rank, self.ranks)]


class TextObjective(Objective):
    """Next-token prediction on packed documents."""

    name = "text"
    term_weights: Mapping[str, float] = {"text": 1.0}

    def plan(self, distances: Mapping[str, int], ranks: int | None = None) -> Plan:
        training, seq_len = self.settings.training, self.settings.data.seq_len
        return step_plan(training.tokens_per_step, seq_len, training.micro_batch_tokens, ranks or self.ranks)

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        batch = text_batch(self.store, self.settings.seed, step, rows, plan.seq_len, rows_per_step=plan.rows)
        packing = Packing.of_documents(batch.documents)
        return MicroBatch(batch.input_ids, packing, {"text": _target(batch.labels)}, batch.tasks[:0])


class RecallObjective(Objective):
    """Answers at query positions; with `relay_loss_weight` the relay head also reads the value at filler positions.

    With `relay_pace` the relay head reads after early layers too (deep supervision; Lee and others, 2015). So each
    layer learns directly to pass the value on, and not only through the loss after the last layer.
    """

    name = "recall"

    def __init__(
        self, settings: Settings, store: TokenStore, vocabulary: RecallVocabulary, curriculum: Curriculum, ranks: int
    ):
        recall, self.vocabulary, self.curriculum = settings.recall, vocabulary, curriculum
        max_grad_norm = recall.max_grad_norm or settings.training.optimizer.max_grad_norm
        super().__init__(settings, store, ranks, recall.weight, max_grad_norm)
        optional = {"relay": recall.relay_loss_weight, "text": recall.text_loss_weight}
        self.term_weights = {"answer": recall.answer_loss_weight} | {t: w for t, w in optional.items() if w > 0}
        self.tasks = tuple(str(task) for task in recall.tasks)
        self.rules, self.options = recall_rules(settings)

    def plan(self, distances: Mapping[str, int], ranks: int | None = None) -> Plan:
        """All tasks share a step's sequences, so the largest of their distances decides."""
        farthest, training, full = max(distances.values()), self.settings.training, recall_seq_len(self.settings)
        tokens = self.settings.recall.tokens_per_step or training.tokens_per_step
        tokens *= self.curriculum.batch_factor(farthest)
        seq_len = self.curriculum.row_length(farthest, full, row_tokens(self.settings, distances))
        return step_plan(tokens, seq_len, training.micro_batch_tokens, ranks or self.ranks)

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        batch = recall_batch(
            self.store, self.vocabulary, self.settings.seed, step, rows, plan.seq_len, distances,
            {str(task): share for task, share in self.settings.recall.tasks.items()}, self.rules, self.options,
        )  # fmt: skip
        labels = {"answer": batch.recall_labels, "relay": batch.relay_labels, "text": batch.labels}
        targets = {term: _target(labels[term]) for term in self.term_weights}
        if "relay" in targets:
            index, values = targets["relay"]
            layers = batch.relay_layers.flatten()[index]
            targets["relay"] = Target(layers * batch.input_ids.numel() + index, values)
        packing = Packing.of_whole_rows(plan.seq_len, batch.input_ids.device)
        return MicroBatch(batch.input_ids, packing, targets, batch.tasks[targets["answer"].index // plan.seq_len])


def objectives(
    settings: Settings, store: TokenStore, vocabulary: RecallVocabulary | None, curriculum: Curriculum, ranks: int
) -> list[Objective]:
    """Text, and recall where there is a vocabulary for it."""
    weight, max_grad_norm = settings.training.text_weight, settings.training.optimizer.max_grad_norm
    text = TextObjective(settings, store, ranks, weight, max_grad_norm)
    return [text] if vocabulary is None else [text, RecallObjective(settings, store, vocabulary, curriculum, ranks)]


def recall_rules(settings: Settings) -> tuple[RowRules, TaskOptions]:
    """The layout of recall sequences and the size of their questions, as the recall tasks take them."""
    rows, questions = settings.recall.rows.model_dump(), settings.recall.questions.model_dump()
    return RowRules(**rows, layers=settings.model.num_hidden_layers), TaskOptions(**questions)


class Scorer(nn.Module):
    """The decoder and its auxiliary relay head in one module, so that ranks and precision wrap both.

    The relay head reads the value from the residual stream at a filler position; it is discarded at export.
    """

    def __init__(self, decoder: WindreachForCausalLM, relay_values: int | None, z_loss_weight: float = 0.0):
        super().__init__()
        self.decoder, self.z_loss_weight = decoder, z_loss_weight
        self.relay_head = nn.Linear(decoder.config.hidden_size, relay_values, bias=False) if relay_values else None
        if self.relay_head is not None:
            nn.init.zeros_(self.relay_head.weight)

    def forward(self, input_ids: Tensor, packing: Packing, targets: dict[str, Target]) -> dict[str, Score]:
        """The score of each term. Logits exist only at scored positions."""
        out = self.decoder.model(input_ids, packing=packing, output_hidden_states="relay" in targets)
        scores = {}
        for term, (index, labels) in targets.items():
            if term == "relay" and self.relay_head is not None:
                stream_ne = torch.stack(out.hidden_states).flatten(0, 2).index_select(0, index)
                scores[term] = _score_relay(self.relay_head(self.decoder.model.norm(stream_ne)), labels)
            else:
                hidden_ne = out.last_hidden_state.flatten(0, 1).index_select(0, index)
                scores[term] = cross_entropy(hidden_ne, self.decoder.lm_head.weight, labels, self.z_loss_weight)
        if self.relay_head is not None and "relay" not in targets:
            term, (loss, right) = next(iter(scores.items()))  # DDP waits for a gradient of every weight
            scores[term] = Score(loss + 0.0 * self.relay_head.weight.sum(), right)
        return scores

    def auxiliary(self) -> dict[str, Tensor]:
        """Weights that are trained and saved, but are not part of the decoder."""
        return {} if self.relay_head is None else {RELAY_HEAD: self.relay_head.weight}


@dataclass
class Measured:
    """Sums of one objective in one step, over all ranks: `loss` in nats by term, the others by term and recall task."""

    loss: dict[str, float]
    right: dict[str, float]  # answers
    count: dict[str, float]  # scored positions
    grad_norm: float = math.nan

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.grad_norm, *self.loss.values())))

    def columns(self, objective: str) -> dict[str, float]:
        """For the log: `loss_text`, `accuracy_answer`, `grad_norm_recall` and so on."""
        columns = {f"grad_norm_{objective}": self.grad_norm}
        for name, count in self.count.items():
            shown = f"text_of_{objective}" if name == "text" != objective else name
            if name in self.loss:
                columns[f"loss_{shown}"] = self.loss[name] / max(count, 1.0)
            if name in self.loss or len(self.count) > len(self.loss) + 1:  # one task alone has all answers
                columns[f"accuracy_{shown}"] = self.right[name] / max(count, 1.0)
        return columns


class Work(NamedTuple):
    """One objective's share of a step on this rank. weights, counts: (terms,) and (terms and tasks,), in float64."""

    micro_batches: list[MicroBatch]
    weights: Tensor
    counts: Tensor

    @staticmethod
    def of(objective: Objective, micro_batches: list[MicroBatch]) -> "Work":
        """`counts` are the positions that each term scores, and the answers of each recall task."""
        terms = objective.term_weights
        counts = [sum(len(m.targets[term].labels) for m in micro_batches) for term in terms]
        tasks = torch.cat([m.answer_tasks for m in micro_batches])
        counts += [int((tasks == number).sum()) for number in range(len(objective.tasks))]
        weights = torch.tensor(list(terms.values()), dtype=torch.float64)
        return Work(micro_batches, weights, torch.tensor(counts, dtype=torch.float64))


def differentiate(objective: Objective, accelerator: Accelerator, scorer: nn.Module, work: Work) -> Tensor:
    """Add the objective's gradients to the parameters; returns the figures that `measured_names` names, but the last.

    They are sums over all ranks, in float64 on the device. Nothing here waits for the device.
    """
    terms, counts = list(objective.term_weights), sum_tensor_over_ranks(work.counts)
    scores: list[dict[str, Score]] = []
    for micro_batch in work.micro_batches:
        exchange_gradients(scorer, on=micro_batch is work.micro_batches[-1])
        score = scorer(micro_batch.input_ids, micro_batch.packing, micro_batch.targets)
        in_order = {term: score[term] for term in terms}
        accelerator.backward(weighted_loss(in_order, work.weights, counts[: len(terms)], accelerator.num_processes))
        scores.append({term: Score(s.loss.detach(), s.right) for term, s in in_order.items()})

    sums = [torch.stack([s[t].loss.double() for s in scores]).sum() for t in terms]
    sums += [torch.stack([s[t].right.sum() for s in scores]).sum().double() for t in terms]
    for number in range(len(objective.tasks)):
        pairs = zip(work.micro_batches, scores, strict=True)
        right = [(s["answer"].right & (m.answer_tasks == number)).sum() for m, s in pairs]
        sums.append(torch.stack(right).sum().double())
    return torch.cat((sum_tensor_over_ranks(torch.stack(sums)), counts))


def measured_names(objective: Objective) -> list[tuple[str, str]]:
    """What the figures of a step are, in their order: those of `differentiate`, counts, and the gradient norm."""
    terms, tasks = list(objective.term_weights), list(objective.tasks)
    names = [("loss", t) for t in terms] + [(what, t) for what in ("right", "count") for t in (*terms, *tasks)]
    return [*names, ("grad_norm", "")]


def weighted_loss(scores: dict[str, Score], weights: Tensor, counts: Tensor, ranks: int) -> Tensor:
    """The loss to differentiate, from the `weights` and `counts` of the terms, both (terms,).

    It is multiplied by `ranks` because data parallelism averages gradients over ranks.
    """
    factors = (ranks * weights / counts.clamp_min(1.0)).float()
    return (factors * torch.stack([score.loss for score in scores.values()])).sum()


def step_flops(config: WindreachConfig, plan: Plan, scored: float, relayed: float = 0, relay_values: int = 0) -> float:
    """FLOPs of one forward and backward pass over the plan's sequences.

    The vocabulary head runs at `scored` positions only, the relay head with its `relay_values` outputs at `relayed`.
    """
    head = 6 * config.hidden_size  # for each output; see `model.flops`
    layers = flops_per_token(config, plan.seq_len, training=True) - head * config.vocab_size
    return plan.tokens * layers + head * (scored * config.vocab_size + relayed * relay_values)


def _score_relay(logits: Tensor, labels: Tensor) -> Score:
    """As `cross_entropy`. Before the first value (label: number of values) all values should be equally likely."""
    logits, n = logits.float(), logits.shape[-1]
    normaliser = logits.logsumexp(-1)
    known, scored = labels < n, labels >= 0
    picked = logits.gather(-1, labels.clamp(0, n - 1)[:, None])[:, 0]
    loss = torch.where(known, normaliser - picked, normaliser - logits.mean(-1) - math.log(n))
    peak, best = logits.detach().max(-1)
    right = torch.where(known, best == labels, peak - normaliser < math.log(0.5))
    return Score((loss * scored).sum(), right & scored)


def _target(labels_bt: Tensor) -> Target:
    flat = labels_bt.flatten()
    index = (flat != UNSCORED).nonzero().squeeze(1)
    return Target(index, flat[index])
