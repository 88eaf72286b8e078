"""A run on any number of processors: memory of each, FLOPs, time. Nothing is allocated and nothing is trained.

What is counted and what is assumed:

* **FLOPs** by `model.flops`: visible keys only, forward and backward, no recomputation.
* **MFU** is those FLOPs over the peak, for a step that recomputes nothing. With activation checkpointing the layers run
  forward once more, so that at the same rate of the hardware fewer tokens pass. Communication is part of the MFU that
  is stated: give a lower one for slow networks.
* **DDP** keeps everything whole on each processor, and buckets of the size of the gradients where there are several.
* **FSDP2** keeps a share of weights, gradients and moments, and gathers a layer at a time (the next one meanwhile) and,
  for the whole step, embedding, head and final norm; in bf16 it gathers them in bf16 and reduces in float32.
* A **micro-batch** is the larger of the two objectives'. `training.planning.memory` says how its bytes are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from model.config import WindreachConfig
from model.flops import count_parameters, forward_flops, parameters
from training.curriculum import Curriculum
from training.objective import Plan, step_flops, step_plan
from training.planning.memory import Form, Held, Rows, held, optimizer_bytes
from training.schedule import interpolate
from training.settings.consistency import last_distance, recall_seq_len
from training.settings.schema import Settings

SHARDINGS = ("ddp", "fsdp2")
USABLE = 0.92  # of a GPU's memory: the rest goes to its context, the network library and fragments
_COUNTED: dict[tuple[str, Rows, Form], Held] = {}  # a count takes seconds, and plans ask for the same ones
MOST_TOKENS = 1 << 20  # in one micro-batch; larger ones are not looked for
QUESTIONS_A_ROW = 4  # of recall, roughly: how many answers a row asks for decides a head of so few positions only


@dataclass(frozen=True)
class Processor:
    """What one process computes on. flops: peak FLOP/s in the precision of the run; memory: usable bytes."""

    name: str
    flops: float
    memory: float
    source: str
    attention: str


@dataclass(frozen=True)
class Work:
    """One objective over a whole run, on all processors. first and last: shape of its first and last step."""

    name: str
    first: Plan
    last: Plan
    steps: int
    scored_a_row: int

    @property
    def tokens(self) -> float:
        """Where rows grow, the mean of the first and the last step stands for all."""
        return self.steps * (self.first.tokens + self.last.tokens) / 2

    def flops(self, config: WindreachConfig) -> float:
        ends = (step_flops(config, plan, plan.rows * self.scored(plan)) for plan in (self.first, self.last))
        return self.steps * sum(ends) / 2

    def scored(self, plan: Plan) -> int:
        return min(self.scored_a_row, plan.seq_len)


@dataclass(frozen=True)
class Memory:
    """Bytes on each processor. `logits_and_scratch`: what the layers do not keep, at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    exchange: int
    activations: int
    logits_and_scratch: int

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.exchange

    @property
    def total(self) -> int:
        return self.fixed + self.activations + self.logits_and_scratch


@dataclass(frozen=True)
class Setup:
    """How a run is spread: `ranks` processes on such processors, whole on each (`ddp`) or sharded (`fsdp2`)."""

    processor: Processor
    precision: str
    ranks: int = 1
    sharding: str = "ddp"
    checkpointing: bool = False

    @property
    def form(self) -> Form:
        gathered = torch.bfloat16 if self.sharding == "fsdp2" and self.precision == "bf16" else torch.float32
        return Form(self.precision, gathered, self.checkpointing, self.processor.attention)


def work(settings: Settings, ranks: int) -> list[Work]:
    """What a run does: text, and recall where it is enabled."""
    t, recall, seq_len = settings.training, settings.recall, settings.data.seq_len
    text = step_plan(t.tokens_per_step, seq_len, t.micro_batch_tokens, ranks)
    found = [Work("text", text, text, active_steps(settings, t.text_weight), seq_len)]
    if recall.enabled:
        first, last = recall_plans(settings, ranks)
        scored = last.seq_len if recall.text_loss_weight else QUESTIONS_A_ROW
        found.append(Work("recall", first, last, active_steps(settings, recall.weight), scored))
    return found


def active_steps(settings: Settings, points: list[tuple[float, float]]) -> int:
    """Steps in which a weight is above zero."""
    share = sum(interpolate(points, i, 1000) > 0 for i in range(1000)) / 1000
    return round(share * settings.training.max_steps)


def recall_plans(settings: Settings, ranks: int) -> tuple[Plan, Plan]:
    """Shapes of the recall part of a step at the first and at the last distance."""
    recall, last = settings.recall, last_distance(settings)
    curriculum = Curriculum(recall.curriculum, settings.model.sliding_window, last)
    plans = []
    for distance in (curriculum.start().distance, last):
        tokens = (recall.tokens_per_step or settings.training.tokens_per_step) * curriculum.batch_factor(distance)
        row = curriculum.row_length(distance, recall_seq_len(settings))
        plans.append(step_plan(tokens, row, settings.training.micro_batch_tokens, ranks))
    return plans[0], plans[1]


def attention_form(config: WindreachConfig, device: str) -> str:
    """How `training.planning.memory` counts attention: as our own code does it there, or as a fused kernel.

    On a GPU `auto` is FlexAttention, which like flash and xformers is fused; see `model.attention.backends.serving`.
    """
    if device == "cpu":
        return "cpu"
    return "accelerator" if config.attention_backend in ("reference", "blocked") else "fused"


# -- memory -----------------------------------------------------------------------------------------------------------


def setups(processor: Processor, precision: str, ranks: int) -> Iterator[Setup]:
    """Each sharding that makes sense, without and with activation checkpointing."""
    for sharding in SHARDINGS if ranks > 1 else SHARDINGS[:1]:
        for checkpointing in (False, True):
            yield Setup(processor, precision, ranks, sharding, checkpointing)


def memory(settings: Settings, config: WindreachConfig, setup: Setup) -> Memory:
    """Of the run as its settings cut it into micro-batches."""
    objectives, relay = 1 + settings.recall.enabled, relay_parameters(settings, config)
    shards = setup.ranks if setup.sharding == "fsdp2" else 1
    share = -(-(count_parameters(config) + relay) // shards)
    micro = [_held(settings, config, w, setup, w.last.micro_rows) for w in work(settings, setup.ranks)]
    largest = max(micro, key=lambda h: h.total)
    return Memory(
        weights=4 * share,
        gradients=4 * objectives * share,
        optimizer=-(-optimizer_bytes(config, settings.training.optimizer, objectives, relay) // shards),
        exchange=exchange_bytes(config, setup),
        activations=largest.layers,
        logits_and_scratch=largest.outside,
    )


def largest_rows(settings: Settings, config: WindreachConfig, setup: Setup, fixed: int) -> int:
    """Rows of a text micro-batch that fits beside `fixed` bytes where one row more does not; 0: none fits.

    At most those of `MOST_TOKENS`, so that a tiny model on a large processor is counted in seconds.

    Goes on by what one more row adds. That is less once the logits are taken in chunks, so it is asked anew each time,
    and no more than 256 times as many rows are tried next.
    """
    text = work(settings, setup.ranks)[0]

    @cache
    def room(rows: int) -> float:
        return setup.processor.memory - fixed - _held(settings, config, text, setup, rows).total

    if room(1) < 0:
        return 0
    most = max(1, MOST_TOKENS // text.last.seq_len)
    if room(most) >= 0:
        return most
    fits, too_many = 1, most
    while too_many - fits > 1:
        more = int(room(fits) // max(1, room(fits) - room(fits + 1)))
        rows = fits + min(max(1, more), 255 * fits)
        rows = rows if rows < too_many else (fits + too_many) // 2
        fits, too_many = (rows, too_many) if room(rows) >= 0 else (fits, rows)
    return fits


def relay_parameters(settings: Settings, config: WindreachConfig) -> int:
    """Weights of the auxiliary head, which training alone holds."""
    recall = settings.recall
    return config.hidden_size * recall.values if recall.enabled and recall.relay_loss_weight else 0


def exchange_bytes(config: WindreachConfig, setup: Setup) -> int:
    """Buckets of DDP; of FSDP2 what is gathered at once, and the gradients of one unit on their way to their owners."""
    if setup.ranks == 1:
        return 0
    if setup.sharding == "ddp":
        return 4 * count_parameters(config)
    parts, size = parameters(config), setup.form.weights.itemsize
    root = parts["embedding"] + parts["output"] + config.hidden_size
    layer = -(-(count_parameters(config) - root) // config.num_hidden_layers)
    return size * (root + 2 * layer) + (size + 4) * max(root, layer)


def _held(settings: Settings, config: WindreachConfig, w: Work, setup: Setup, rows: int) -> Held:
    """What a micro-batch of `rows` rows holds, at the last distance."""
    batch = Rows(rows, w.last.seq_len, w.scored(w.last))
    if relay_parameters(settings, config):
        relayed = round(settings.recall.rows.relay_share * w.last.seq_len) if w.name == "recall" else 0
        batch = replace(batch, relayed=relayed, relay_values=settings.recall.values)
    key = (config.to_json_string(), batch, setup.form)
    if key not in _COUNTED:
        _COUNTED[key] = held(config, batch, setup.form)
    return _COUNTED[key]


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Of all processors together at a stated MFU."""

    checkpointing: bool
    tokens_per_second: float
    seconds: float

    def hours(self, ranks: int) -> float:
        """Processor hours."""
        return self.seconds * ranks / 3600


def pace(
    settings: Settings, config: WindreachConfig, processor: Processor, ranks: int, mfu: float, checkpointing: bool
) -> Pace:
    works = work(settings, ranks)
    flops, tokens = sum(w.flops(config) for w in works), sum(w.tokens for w in works)
    seconds = flops * (recompute_factor(settings, config) if checkpointing else 1) / (ranks * processor.flops * mfu)
    return Pace(checkpointing, tokens / seconds, seconds)


def recompute_factor(settings: Settings, config: WindreachConfig) -> float:
    """FLOPs of a step whose layers run forward twice over those of one that keeps everything: 4/3 but for the head."""
    parts = forward_flops(config, settings.data.seq_len)
    whole = sum(parts.values())
    return (3 * whole + whole - parts["output"]) / (3 * whole)
