"""Formulas for what a run costs: bytes on each processor, FLOPs and time. Nothing is run and nothing is allocated.

FLOPs are those of `model.flops`: the keys that a query sees, forward and backward, without recomputation.
Weights take 4 bytes, the gradients of those that are trained 4 bytes per objective. DDP holds all of them on each
processor, FSDP2 a share of them. What frozen weights save in activations and FLOPs is not counted.

Assumed:

* The micro-batch is that of the objective that needs more bytes, at the last distance of the curriculum.
* Attention on a GPU is computed by the backend that `model.attention` would choose. A fused kernel keeps queries, keys,
  values and output. `blocked` also keeps the attention weights of short windows, as it does on a CPU, and where a
  window is more than half of the sequence the whole matrix of scores.
* `torch.compile` saves nothing, and a kernel needs no scratch memory.
* With activation checkpointing a layer keeps only its input, and one layer at a time keeps the rest.
* The logits are never alive together with the gradients inside a layer.
* MFU is FLOPs over the peak, communication included. Activation checkpointing runs the layers forward once more, so
  the same rate of the hardware trains fewer tokens per second.

Legend: E hidden size, I intermediate size, H heads, G key/value heads, D head size, V vocabulary.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

from model.attention import Device, plan_attention
from model.attention.parts import halo_size
from model.config import WindreachConfig
from model.flops import count_parameters, forward_flops, parameters
from model.windows import LayerSpec
from training.adaptation import Counts, count_trained
from training.cross_entropy import GPU_FACTOR, LOGITS_AT_ONCE
from training.curriculum import Curriculum
from training.distillation import teacher_config
from training.objective import Plan, step_flops, step_plan, teacher_flops
from training.processes.precision import DTYPES
from training.schedule import interpolate
from training.settings.consistency import last_distance, recall_seq_len
from training.settings.schema import Settings, TrainingSettings

GPU = Device("cuda", (8, 0), frozenset({"triton"}))  # what attention can count on where a plan is for GPUs elsewhere
CPU_BLOCKS_BELOW = {"fp32": 256, "bf16": 1024}  # tokens of window: a rule of thumb for attention on a CPU
LEAST_BLOCK = 16  # tokens; shorter windows are computed in blocks of this size
ANSWERS_PER_ROW = 4  # of a recall row, roughly: so few positions reach the head that the number hardly matters


@dataclass(frozen=True)
class Setup:
    """How a run is spread over `ranks` processes. sharding: `ddp` (a whole model on each) or `fsdp2` (a share)."""

    precision: str
    ranks: int = 1
    sharding: str = "ddp"
    checkpointing: bool = False
    device: Device = GPU
    parts: int = 1  # processes that share each row

    @property
    def product_bytes(self) -> int:
        """Bytes per number of the inputs of matrix products."""
        return 2 if self.precision == "bf16" else 4

    @property
    def stream_bytes(self) -> int:
        """Bytes per number of the residual stream and of a layer's weights: bf16 only where FSDP2 gathers in bf16."""
        return self.product_bytes if self.sharding == "fsdp2" else 4


@dataclass(frozen=True)
class Work:
    """One objective over the whole run, all ranks together. first, last: shapes of its first and its last step."""

    name: str
    first: Plan
    last: Plan
    steps: int
    scored_per_row: int
    relay: bool = False

    @property
    def tokens(self) -> float:
        """Where rows grow, the mean of the first and the last step stands for all steps."""
        return self.steps * (self.first.tokens + self.last.tokens) / 2

    def flops(self, config: WindreachConfig, teacher: WindreachConfig | None = None) -> float:
        """With a teacher also its forward passes over the text."""
        ends = [(p, p.rows * min(self.scored_per_row, p.seq_len)) for p in (self.first, self.last)]
        total = sum(step_flops(config, plan, scored) for plan, scored in ends)
        if teacher is not None and self.name == "text":
            total += sum(teacher_flops(teacher, plan, scored) for plan, scored in ends)
        return self.steps * total / 2


def work(settings: Settings, ranks: int, steps: range | None = None) -> list[Work]:
    """The objectives of a run, or of some of its steps: text, and recall where it is enabled."""
    ranks = max(1, ranks // settings.training.context_parallel)  # groups, each of which shares rows
    t, recall, seq_len = settings.training, settings.recall, settings.data.seq_len
    steps = steps or range(t.max_steps)

    def active_steps(weight: list[tuple[float, float]]) -> int:
        samples = [steps.start + len(steps) * i / 1000 for i in range(1000)]
        return round(sum(interpolate(weight, step, t.max_steps) > 0 for step in samples) / 1000 * len(steps))

    def recall_plan(distance: int) -> Plan:
        tokens = (recall.tokens_per_step or t.tokens_per_step) * curriculum.batch_factor(distance)
        length = curriculum.row_length(distance, recall_seq_len(settings))
        return step_plan(tokens, length, t.tokens_at_a_time, ranks)

    plan = step_plan(t.tokens_per_step, seq_len, t.tokens_at_a_time, ranks)
    text = Work("text", plan, plan, active_steps(t.text_weight), seq_len)
    if not recall.enabled:
        return [text]
    curriculum = Curriculum(recall.curriculum, settings.model.sliding_window, last_distance(settings))
    first, last = recall_plan(curriculum.start().distance), recall_plan(last_distance(settings))
    scored = last.seq_len if recall.text_loss_weight else ANSWERS_PER_ROW
    return [text, Work("recall", first, last, active_steps(recall.weight), scored, recall.relay_loss_weight > 0)]


def recompute_factor(config: WindreachConfig, seq_len: int) -> float:
    """FLOPs of a step that runs the layers forward twice, over those of a step that does not: 4/3, less the head."""
    parts = forward_flops(config, seq_len)
    whole = sum(parts.values())
    return (4 * whole - parts["output"]) / (3 * whole)


def memory(settings: Settings, config: WindreachConfig, setup: Setup) -> dict[str, int]:
    """Bytes on each processor, by part, of a step with the micro-batches of the settings."""
    objectives, recall = work(settings, setup.ranks), settings.recall
    relay_head = config.hidden_size * recall.values if any(w.relay for w in objectives) else 0  # it exists in training
    shards = setup.ranks if setup.sharding == "fsdp2" else 1
    counts = parameter_counts(settings.training, config)
    weights, gradients = (4 * -(-(n + relay_head) // shards) for n in (counts.every, counts.trained))
    moments = optimizer_bytes(counts, len(objectives), relay_head)
    activations, rest = max((micro_batch_bytes(config, setup, w, w.last.micro_rows) for w in objectives), key=sum)
    teacher = teacher_config(settings)
    return {
        "weights": weights, "gradients": gradients * len(objectives), "optimizer": -(-moments // shards),
        **({} if teacher is None else {"teacher": 4 * count_parameters(teacher)}),  # whole on every processor
        "exchange": exchange_bytes(config, setup, counts.trained),
        "activations": activations, "logits_and_scratch": rest,
    }  # fmt: skip


def largest_rows(settings: Settings, config: WindreachConfig, setup: Setup, available: float) -> int:
    """Rows of the largest text micro-batch that fits into the available bytes; 0 if not even one row fits."""
    needed, text = memory(settings, config, setup), work(settings, setup.ranks)[0]
    left = available - sum(needed.values()) + needed["activations"] + needed["logits_and_scratch"]
    return bisect_right(range(1, 2**40), left, key=lambda rows: sum(micro_batch_bytes(config, setup, text, rows)))


def longest_row(settings: Settings, config: WindreachConfig, setup: Setup, available: float) -> int:
    """Tokens of the longest row of text that fits if all processes share it, in steps of 1,024 for each; or 0."""
    needed, together = memory(settings, config, setup), replace(setup, parts=setup.ranks)
    left = available - sum(needed.values()) + needed["activations"] + needed["logits_and_scratch"]

    def row_bytes(thousands: int) -> int:
        tokens = 1024 * thousands * setup.ranks
        plan = Plan(1, tokens, 1)
        return sum(micro_batch_bytes(config, together, Work("text", plan, plan, 1, tokens), 1))

    return 1024 * setup.ranks * bisect_right(range(1, 2**20), left, key=row_bytes)


def halo_bytes(config: WindreachConfig, setup: Setup, spec: LayerSpec, rows: int, seq_len: int) -> int:
    """Keys and values that a layer of the last process receives; their gradients are as large and go back.

    In a sliding layer these are 2 (W - 1) x key/value heads x head size numbers a row, whatever its length.
    """
    position = torch.tensor(seq_len * (setup.parts - 1) // setup.parts)
    numbers = 2 * config.num_key_value_heads * config.head_dim * int(halo_size(spec, position))
    return rows * numbers * setup.product_bytes


def _bytes_behind(config: WindreachConfig, setup: Setup, spec: LayerSpec, rows: int, seq_len: int) -> int:
    """What a layer of the last process keeps because rows are shared.

    A full layer also keeps its own keys and values once more, behind the others, and on a GPU masks.
    """
    kept, own = halo_bytes(config, setup, spec, rows, seq_len), -(-seq_len // setup.parts)
    if spec.window is None:
        kept += 2 * rows * own * config.num_key_value_heads * config.head_dim * setup.product_bytes
        kept += own * seq_len * setup.product_bytes * (setup.device.type == "cuda")
    return kept


def parameter_counts(s: TrainingSettings, config: WindreachConfig) -> Counts:
    """Parameters with their adapters, those that are trained, and those that Muon updates."""
    if s.lora is not None or s.train_only:
        return count_trained(config, s)
    parts = parameters(config)
    muon = parts["attention"] + parts["feed-forward"] if s.optimizer.kind == "muon" else 0
    return Counts(sum(parts.values()), sum(parts.values()), muon)


def optimizer_bytes(counts: Counts, objectives: int, relay_head: int = 0) -> int:
    """Moments in float32, a set for each objective: AdamW has two per trained parameter, Muon one."""
    return 4 * objectives * (2 * (counts.trained + relay_head) - counts.by_muon)


def exchange_bytes(config: WindreachConfig, setup: Setup, trained: int) -> int:
    """DDP: buckets as large as the gradients.

    FSDP2: embedding, head and final norm for the whole step, two layers (one in use, the next on its way), and the
    gradients of one unit before and after their reduction in float32.
    """
    if setup.ranks == 1 or setup.sharding == "ddp":
        return 4 * trained if setup.ranks > 1 else 0
    parts, size = parameters(config), setup.stream_bytes
    root = parts["embedding"] + parts["output"] + config.hidden_size
    layer = -(-(count_parameters(config) - root) // config.num_hidden_layers)
    return size * (root + 2 * layer) + (size + 4) * max(root, layer)


def micro_batch_bytes(config: WindreachConfig, setup: Setup, w: Work, rows: int) -> tuple[int, int]:
    """(activations of the layers, logits and scratch) at the peak of forward and backward over `rows` rows.

    With a relay head the streams after all layers are alive twice at the head (stacked, and their gradient), and once
    during the backward pass of the layers.
    """
    seq_len, depth = -(-w.last.seq_len // setup.parts), len(config.specs)
    stream = rows * seq_len * config.hidden_size * setup.stream_bytes
    layers = {spec: layer_bytes(config, setup, spec, rows, seq_len) for spec in set(config.specs)}
    if setup.parts > 1:
        behind = {spec: _bytes_behind(config, setup, spec, rows, w.last.seq_len) for spec in layers}
        layers = {spec: (kept + behind[spec], *rest) for spec, (kept, *rest) in layers.items()}
    if setup.checkpointing:
        activations = depth * stream
        backward, forward = max(map(sum, layers.values())), sum(layers[spec][2] for spec in config.specs)
    else:
        activations = sum(layers[spec][0] + layers[spec][2] for spec in config.specs)
        backward, forward = max(scratch for _, scratch, _ in layers.values()), 0
    streams = (depth + 1) * stream if w.relay else 0
    e, logits = config.hidden_size, rows * min(w.scored_per_row, seq_len) * config.vocab_size
    head = 3 * 4 * e * rows * seq_len  # the final norm
    on_gpu = setup.device.type == "cuda"
    at_once = max(config.vocab_size, LOGITS_AT_ONCE * (GPU_FACTOR if on_gpu else 1))
    if logits <= at_once:  # logits, softmax and gradient in float32
        head += 3 * 4 * logits
    else:  # computed in parts, while the gradient of the head is kept; fused on a GPU, where two copies are left
        head += at_once * (2 * setup.product_bytes if on_gpu else 3 * 4) + 4 * config.vocab_size * e
    return activations, max(forward + head + 2 * streams, backward + streams)


def layer_bytes(config: WindreachConfig, setup: Setup, spec: LayerSpec, rows: int, seq_len: int) -> tuple[int, ...]:
    """What a layer keeps for its backward pass, what that pass needs besides, and the copies that autocast makes."""
    e, i, d, s = config.hidden_size, config.intermediate_size, config.head_dim, setup.product_bytes
    h, g = config.num_attention_heads, config.num_key_value_heads
    kept_scores, scratch_scores = _score_bytes(config, setup, spec, seq_len)
    kept_per_token = (
        2 * e * setup.stream_bytes  # inputs of the two norms
        + 2 * e * 4  # the same, normalised in float32
        + 2 * e * s  # inputs of the projections
        + (2 * h + 2 * g) * d * s  # queries, keys, values, output
        + (0 if kept_scores else (h + g) * d * s)  # q and k before rotation: a fused kernel takes v as a view of them
        + h * kept_scores
        + 4 * i * s  # gate, up, silu(gate), and its product with up
    )
    scratch_per_token = h * scratch_scores + 2 * i * s  # gradients of the scores, and of gate and up
    autocast = s < setup.stream_bytes  # casts every matrix, and keeps the copies until the forward pass ends
    copies = s * e * ((2 * h + 2 * g) * d + 3 * i) if autocast else 0
    # The gradient of the last matrix, or that of gate and up, when what they kept is freed.
    gradient = max(e * i * setup.stream_bytes, 2 * e * i * setup.stream_bytes - rows * seq_len * 4 * i * s)
    return rows * seq_len * kept_per_token, rows * seq_len * scratch_per_token + gradient, copies


def _score_bytes(config: WindreachConfig, setup: Setup, spec: LayerSpec, seq_len: int) -> tuple[int, int]:
    """Of one query in one head: what is kept for the backward pass, and what that pass needs besides.

    Fused kernels and tiles keep no scores.
    """
    s, keys = setup.product_bytes, min(seq_len, max(LEAST_BLOCK, spec.window or 0) + spec.global_tokens)
    blocks, everything = (s * keys, 3 * 4 * keys), ((3 * 4 + s) * seq_len, 2 * 4 * seq_len)
    dtype, on_cpu = DTYPES[setup.precision], setup.device.type == "cpu"
    backend = plan_attention(spec, config.head_dim, config.attention_backend, setup.device, dtype, True).backend
    if backend == "reference":  # autograd keeps each step of a float32 softmax over the whole sequence
        return everything
    if backend != "blocked" or (spec.window is None and (on_cpu or not spec.sink)):
        return 0, 0
    if on_cpu:
        return blocks if spec.window and spec.window < CPU_BLOCKS_BELOW[setup.precision] else (0, 0)
    return blocks if spec.ring_slots and 2 * spec.ring_slots < seq_len else everything
