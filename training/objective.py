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
from data.mixture import Mixture, Shares, Source
from data.tasks.layout import RowRules
from data.tasks.question import UNSCORED, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.flops import flops_per_token
from model.packing import Packing
from training.adaptation import trained_beside
from training.cross_entropy import Score, cross_entropy, distillation
from training.curriculum import Curriculum
from training.distillation import Teacher
from training.processes.parallel import exchange_gradients
from training.processes.ranks import sum_tensor_over_ranks
from training.settings.consistency import recall_seq_len, row_tokens
from training.settings.schema import Settings

RELAY_HEAD = "relay_head"  # its name in checkpoints
DISTILLATION = "distillation"  # a term of text, scored together with it
TERMS = ("text", DISTILLATION, "answer", "relay")  # what may be scored


class Target(NamedTuple):
    """Scored positions: `index` (N,) into the B*T positions of a batch, `labels` (N,) what each must predict.

    `groups` (N,): the number of the task or source of each, in the one term of an objective that counts them apart.
    For the relay head `index` counts into the (layers + 1) * B*T positions of the embedding and all layers' outputs.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    labels: Tensor
    groups: Tensor | None = None

    def padded(self, n: int) -> "Target":
        """With `n` more, which are not scored and belong to no group."""
        groups = None if self.groups is None else F.pad(self.groups, (0, n), value=-1)
        return Target(F.pad(self.index, (0, n)), F.pad(self.labels, (0, n), value=UNSCORED), groups)


class MicroBatch(NamedTuple):
    """What one forward pass needs: token ids (B, T), their documents, and what is scored."""

    input_ids: Tensor
    packing: Packing
    targets: dict[str, Target]

    def padded(self) -> "MicroBatch":
        """With targets for an eighth, a quarter, a half or all of its tokens, so that few shapes occur."""
        tokens, spans = self.input_ids.numel(), self.packing.spans
        packing = self.packing if spans is None else replace(self.packing, spans=max(16, 1 << (spans - 1).bit_length()))
        sizes = [-(-tokens // part) for part in (8, 4, 2, 1)]
        missing = {
            term: next(size for size in sizes if len(target.labels) <= size) - len(target.labels)
            for term, target in self.targets.items()
        }
        targets = {term: target.padded(missing[term]) for term, target in self.targets.items()}
        return MicroBatch(self.input_ids, packing, targets)


# So that `tree_map` moves its tensors to a device, as it does those of a named tuple.
register_pytree_node(
    Packing,
    lambda p: ([p.positions, p.documents], (p.whole, p.padded, p.spans, p.part)),
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
    grouped: str  # the term whose targets have groups
    groups: tuple[str, ...] = ()  # recall tasks, or sources of text, which are also reported one by one

    def __init__(self, settings: Settings, ranks: int, points: list[tuple[float, float]], max_grad_norm: float):
        self.settings, self.ranks, self.points, self.max_grad_norm = settings, ranks, points, max_grad_norm

    @abstractmethod
    def plan(self, distances: Mapping[str, int], ranks: int | None = None) -> Plan:
        """The plan of a step for `ranks` groups of processes that share each row, default: as many as there are.

        `distances` is D of each task.
        """

    @abstractmethod
    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        """Sequences `rows` of a step."""

    def micro_batches(self, step: int, distances: Mapping[str, int], rank: int) -> list[MicroBatch]:
        """All micro-batches of one rank in a step."""
        plan = self.plan(distances)
        return [self.micro_batch(step, plan, rows, distances) for rows in plan.micro_ranges(rank, self.ranks)]


class TextObjective(Objective):
    """Next-token prediction on packed documents, and with `training.distillation` that of a teacher's distribution."""

    name = grouped = "text"

    def __init__(self, settings: Settings, sources: Mapping[str, Source], ranks: int, first: int = 0):
        """`first`: the step at which the order of the rows begins."""
        training, data = settings.training, settings.data
        super().__init__(settings, ranks, training.text_weight, training.optimizer.max_grad_norm)
        taught = training.distillation
        self.term_weights = {"text": 1.0} | ({} if taught is None else {DISTILLATION: taught.weight})
        self.groups = tuple(f"text_{name}" for name in sources) if len(sources) > 1 else ()
        weights = [source.weight for source in data.mixture]
        shares = Shares(weights, self.plan({}).rows, training.max_steps, settings.seed, first)
        self.mixture = Mixture({name: source.rows for name, source in sources.items()}, shares)

    def plan(self, distances: Mapping[str, int], ranks: int | None = None) -> Plan:
        training, seq_len = self.settings.training, self.settings.data.seq_len
        return step_plan(training.tokens_per_step, seq_len, training.tokens_at_a_time, ranks or self.ranks)

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        batch = text_batch(self.mixture, step, rows)
        text = _target(batch.labels)
        targets = dict.fromkeys(self.term_weights, text)
        if self.groups:
            targets["text"] = text._replace(groups=batch.groups[text.index // plan.seq_len])
        return MicroBatch(batch.input_ids, Packing.of_documents(batch.documents), targets)


class RecallObjective(Objective):
    """Answers at query positions; with `relay_loss_weight` the relay head also reads the value at filler positions.

    With `relay_pace` the relay head reads after early layers too (deep supervision; Lee and others, 2015). So each
    layer learns directly to pass the value on, and not only through the loss after the last layer.
    """

    name, grouped = "recall", "answer"

    def __init__(
        self, settings: Settings, store: TokenStore, vocabulary: RecallVocabulary, curriculum: Curriculum, ranks: int
    ):
        recall, self.vocabulary, self.curriculum = settings.recall, vocabulary, curriculum
        max_grad_norm = recall.max_grad_norm or settings.training.optimizer.max_grad_norm
        super().__init__(settings, ranks, recall.weight, max_grad_norm)
        self.store = store
        optional = {"relay": recall.relay_loss_weight, "text": recall.text_loss_weight}
        self.term_weights = {"answer": recall.answer_loss_weight} | {t: w for t, w in optional.items() if w > 0}
        self.groups = tuple(str(task) for task in recall.tasks)
        self.rules, self.options = recall_rules(settings)

    def plan(self, distances: Mapping[str, int], ranks: int | None = None) -> Plan:
        """All tasks share a step's sequences, so the largest of their distances decides."""
        farthest, training, full = max(distances.values()), self.settings.training, recall_seq_len(self.settings)
        tokens = self.settings.recall.tokens_per_step or training.tokens_per_step
        tokens *= self.curriculum.batch_factor(farthest)
        seq_len = self.curriculum.row_length(farthest, full, row_tokens(self.settings, distances))
        return step_plan(tokens, seq_len, training.tokens_at_a_time, ranks or self.ranks)

    def micro_batch(self, step: int, plan: Plan, rows: range, distances: Mapping[str, int]) -> MicroBatch:
        batch = recall_batch(
            self.store, self.vocabulary, self.settings.seed, step, rows, plan.seq_len, distances,
            {str(task): share for task, share in self.settings.recall.tasks.items()}, self.rules, self.options,
        )  # fmt: skip
        labels = {"answer": batch.recall_labels, "relay": batch.relay_labels, "text": batch.labels}
        targets = {term: _target(labels[term]) for term in self.term_weights}
        if "relay" in targets:
            index, values, _ = targets["relay"]
            layers = batch.relay_layers.flatten()[index]
            targets["relay"] = Target(layers * batch.input_ids.numel() + index, values)
        answers = targets["answer"]
        targets["answer"] = answers._replace(groups=batch.groups[answers.index // plan.seq_len])
        return MicroBatch(batch.input_ids, Packing.of_whole_rows(plan.seq_len, batch.input_ids.device), targets)


def objectives(
    settings: Settings, sources: Mapping[str, Source], vocabulary: RecallVocabulary | None, curriculum: Curriculum,
    ranks: int, text_first: int = 0,
) -> list[Objective]:  # fmt: skip
    """Text, and recall where there is a vocabulary for it. Its filler is any stretch of any source."""
    text = TextObjective(settings, sources, ranks, text_first)
    if vocabulary is None:
        return [text]
    store = TokenStore.joined([source.train for source in sources.values()])
    return [text, RecallObjective(settings, store, vocabulary, curriculum, ranks)]


def recall_rules(settings: Settings) -> tuple[RowRules, TaskOptions]:
    """The layout of recall sequences and the size of their questions, as the recall tasks take them."""
    rows, questions = settings.recall.rows.model_dump(), settings.recall.questions.model_dump()
    return RowRules(**rows, layers=settings.model.num_hidden_layers), TaskOptions(**questions)


class Scorer(nn.Module):
    """The decoder and its auxiliary relay head in one module, so that ranks and precision wrap both.

    The relay head reads the value from the residual stream at a filler position; it is discarded at export.
    """

    def __init__(
        self, decoder: WindreachForCausalLM, relay_values: int | None, z_loss_weight: float = 0.0,
        teacher: Teacher | None = None,
    ):  # fmt: skip
        super().__init__()
        self.decoder, self.z_loss_weight, self.teacher = decoder, z_loss_weight, teacher
        self.relay_head = nn.Linear(decoder.config.hidden_size, relay_values, bias=False) if relay_values else None
        if self.relay_head is not None:
            nn.init.zeros_(self.relay_head.weight)

    def forward(self, input_ids: Tensor, packing: Packing, targets: dict[str, Target]) -> dict[str, Score]:
        """The score of each term. Logits exist only at scored positions."""
        out = self.decoder.model(input_ids, packing=packing, output_hidden_states="relay" in targets)
        scores = {}
        for term, (index, labels, _) in targets.items():
            if term == "relay" and self.relay_head is not None:
                stream_ne = torch.stack(out.hidden_states).flatten(0, 2).index_select(0, index)
                scores[term] = _score_relay(self.relay_head(self.decoder.model.norm(stream_ne)), labels)
            elif term != DISTILLATION:
                hidden_ne = out.last_hidden_state.flatten(0, 1).index_select(0, index)
                facts = hidden_ne, self.decoder.lm_head.weight, labels
                if DISTILLATION in targets and self.teacher is not None:
                    lesson = self.teacher.lesson(input_ids, packing, index)
                    scores[term], scores[DISTILLATION] = distillation(*facts, lesson, self.z_loss_weight)
                else:
                    scores[term] = cross_entropy(*facts, self.z_loss_weight)
        if self.relay_head is not None and "relay" not in targets:
            term, score = next(iter(scores.items()))  # DDP waits for a gradient of every weight
            scores[term] = score._replace(loss=score.loss + 0.0 * self.relay_head.weight.sum())
        return scores

    def auxiliary(self) -> dict[str, Tensor]:
        """Weights that are trained and saved, but are no part of the exported decoder: relay head and adapters."""
        head = {} if self.relay_head is None else {RELAY_HEAD: self.relay_head.weight}
        return trained_beside(self.decoder) | head


@dataclass
class Measured:
    """Sums of one objective in one step, over all ranks, by term and by group: recall task or source of text."""

    loss: dict[str, float]  # nats
    right: dict[str, float]  # answers
    count: dict[str, float]  # scored positions
    grad_norm: float = math.nan

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.grad_norm, *self.loss.values())))

    def columns(self, objective: str) -> dict[str, float]:
        """For the log: `loss_text`, `accuracy_answer`, `grad_norm_recall` and so on."""
        columns = {f"grad_norm_{objective}": self.grad_norm}
        groups = self.count.keys() - TERMS
        for name, count in self.count.items():
            shown = f"text_of_{objective}" if name == "text" != objective else name
            if name in TERMS or (len(groups) > 1 and count):  # one group alone has all positions of its term
                columns[f"loss_{shown}"] = self.loss[name] / max(count, 1.0)
                columns[f"accuracy_{shown}"] = self.right[name] / max(count, 1.0)
        return columns


class Work(NamedTuple):
    """One objective's share of a step on this rank. weights, counts: (terms,) and (terms and groups,), in float64."""

    micro_batches: list[MicroBatch]
    weights: Tensor
    counts: Tensor

    @staticmethod
    def of(objective: Objective, micro_batches: list[MicroBatch]) -> "Work":
        """`counts` are the positions that each term scores, and those of each group."""
        terms, grouped = objective.term_weights, [m.targets[objective.grouped] for m in micro_batches]
        counts = [sum(len(m.targets[term].labels) for m in micro_batches) for term in terms]
        groups = [t.groups for t in grouped if t.groups is not None]
        counts += [sum(int((g == number).sum()) for g in groups) for number in range(len(objective.groups))]
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
        scores.append({term: score._replace(loss=score.loss.detach()) for term, score in in_order.items()})

    losses = [torch.stack([s[t].loss.double() for s in scores]).sum() for t in terms]
    rights = [torch.stack([s[t].right.sum() for s in scores]).sum().double() for t in terms]
    pairs = [(m.targets[objective.grouped].groups, s[objective.grouped]) for m, s in zip(work.micro_batches, scores)]
    for number in range(len(objective.groups)):
        losses.append(torch.stack([(s.losses * (groups == number)).sum().double() for groups, s in pairs]).sum())
        rights.append(torch.stack([(s.right & (groups == number)).sum() for groups, s in pairs]).sum().double())
    return torch.cat((sum_tensor_over_ranks(torch.stack(losses + rights)), counts))


def measured_names(objective: Objective) -> list[tuple[str, str]]:
    """What the figures of a step are, in their order: those of `differentiate`, counts, and the gradient norm."""
    names = [
        (what, name) for what in ("loss", "right", "count") for name in (*objective.term_weights, *objective.groups)
    ]
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


def teacher_flops(config: WindreachConfig, plan: Plan, scored: float) -> float:
    """FLOPs of a teacher in a step: a forward pass over the plan's sequences. Its head runs at `scored` positions."""
    return step_flops(config, plan, scored) / 3


def _score_relay(logits: Tensor, labels: Tensor) -> Score:
    """As `cross_entropy`. Before the first value (label: number of values) all values should be equally likely."""
    logits, n = logits.float(), logits.shape[-1]
    normaliser = logits.logsumexp(-1)
    known, scored = labels < n, labels >= 0
    picked = logits.gather(-1, labels.clamp(0, n - 1)[:, None])[:, 0]
    loss = torch.where(known, normaliser - picked, normaliser - logits.mean(-1) - math.log(n))
    peak, best = logits.detach().max(-1)
    right = torch.where(known, best == labels, peak - normaliser < math.log(0.5))
    return Score((loss * scored).sum(), right & scored, (loss * scored).detach())


def _target(labels_bt: Tensor) -> Target:
    flat = labels_bt.flatten()
    index = (flat != UNSCORED).nonzero().squeeze(1)
    return Target(index, flat[index])
