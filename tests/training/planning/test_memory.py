"""The formulas for bytes against real training steps on a CPU, which `PeakBytes` watches from outside."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.attention import Device
from model.config import WindreachConfig
from model.decoder import build_model
from model.flops import count_parameters
from tests.training.updates import update
from training.adaptation import adapt
from training.objective import Plan, Scorer, Target
from training.optimizer import SummedOptimizer
from training.planning.formulas import Setup, Work, micro_batch_bytes, optimizer_bytes, parameter_counts
from training.planning.memory import PeakBytes
from training.settings.schema import TrainingSettings

TOLERANCE = 0.2  # of the measured peak
RELAY_VALUES, RELAYED_PER_ROW = 16, 60


def config(layers: list[dict], backend: str = "auto", **fields: int) -> WindreachConfig:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": len(layers)}
    shape = WindreachConfig(**sizes | fields, sliding_window=8, layers=layers, tie_word_embeddings=False)
    shape.attention_backend = backend
    return shape


def micro_batch(rows: int, seq_len: int, scored: int | None = None, relay: bool = False) -> Work:
    plan = Plan(rows, seq_len, rows)
    return Work("text", plan, plan, 1, scored or seq_len, relay)


def measured_peak(config: WindreachConfig, setup: Setup, work: Work) -> int:
    """Bytes of a real forward and backward pass; weights and gradients exist before, as in accumulation."""
    scorer = Scorer(build_model(config), RELAY_VALUES if work.relay else None).train()
    if setup.checkpointing:
        scorer.decoder.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    draw = torch.Generator().manual_seed(0)
    rows, seq_len = work.last.rows, work.last.seq_len
    ids = torch.randint(config.vocab_size, (rows, seq_len), generator=draw)
    n, relayed = rows * work.scored_per_row, rows * RELAYED_PER_ROW
    targets = {"text": Target(torch.arange(n), torch.randint(config.vocab_size, (n,), generator=draw))}
    if work.relay:
        asked = torch.randint((len(config.specs) + 1) * ids.numel(), (relayed,), generator=draw)
        targets["relay"] = Target(asked, torch.randint(RELAY_VALUES, (relayed,), generator=draw))
    with PeakBytes() as watched:
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16"):
            loss = torch.stack([score.loss for score in scorer(ids, None, targets).values()]).sum()
        loss.backward()
    return watched.peak


SHORT, LONG = {"kind": "sliding", "window": 8}, {"kind": "sliding", "window": 128}
CASES = {
    "short windows": (config([SHORT] * 6), micro_batch(4, 96)),
    "long windows": (config([LONG] * 4), micro_batch(2, 512)),
    "full attention": (config([{"kind": "full"}] * 4), micro_batch(2, 512)),
    "mixed kinds": (config([SHORT, {"kind": "full"}] * 3), micro_batch(2, 160)),
    "dilated, with sinks": (config([SHORT | {"kind": "dilated", "dilation": 3, "sink": True}] * 4), micro_batch(4, 96)),
    "global tokens": (config([SHORT | {"global_tokens": 4}] * 4), micro_batch(4, 96)),
    "reference attention": (config([SHORT] * 4, backend="reference"), micro_batch(4, 96)),
    "weights larger than activations": (
        config([SHORT] * 4, hidden_size=256, intermediate_size=512),
        micro_batch(1, 64),
    ),
    "large vocabulary": (config([SHORT] * 2, vocab_size=8000), micro_batch(4, 96)),
    "recall with relays": (config([SHORT] * 8), micro_batch(4, 96, scored=4, relay=True)),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_peak_of_a_step_is_that_of_the_formula(case: str, precision: str, checkpointing: bool) -> None:
    shape, work = CASES[case]
    setup = Setup(precision, checkpointing=checkpointing, device=Device("cpu"))
    planned = sum(micro_batch_bytes(shape, setup, work, work.last.rows))
    assert planned == pytest.approx(measured_peak(shape, setup, work), rel=TOLERANCE)


LORA = {"rank": 4, "alpha": 8, "dora": True}


@pytest.mark.parametrize(
    "training",
    [
        {}, {"optimizer": {"kind": "muon"}}, {"lora": LORA}, {"train_only": ["*.self_attn.*"]},
        {"train_only": ["*.mlp.*", "*norm*"], "optimizer": {"kind": "muon"}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sink", [False, True])
def test_optimizer_state_is_that_of_a_real_step(training: dict[str, Any], sink: bool) -> None:
    shape = config([SHORT | {"sink": sink}] * 3)
    settings = TrainingSettings.model_validate({"max_steps": 1} | training)
    scorer = Scorer(build_model(shape), relay_values=16)
    adapt(scorer.decoder, settings)
    optimizer = SummedOptimizer(scorer.named_parameters(), ["text", "recall"], settings.optimizer)
    for objective in ("text", "recall"):
        for p in scorer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.take(objective, 1.0)
    update(optimizer, 1e-3, {"text": 1.0, "recall": 1.0})
    real = sum(t.nbytes for name, t in optimizer.state_tensors().items() if "/step/" not in name)
    counts = parameter_counts(settings, shape)
    assert optimizer_bytes(counts, objectives=2, relay_head=64 * 16) == real
    assert counts.every == sum(p.numel() for p in scorer.decoder.parameters())


def test_weights_are_four_bytes_each() -> None:
    model = build_model(config([SHORT] * 2))
    assert 4 * count_parameters(model.config) == sum(p.nbytes for p in model.parameters())


def test_peak_bytes_counts_what_is_alive_at_once_and_not_what_was_there_before() -> None:
    before = torch.zeros(1000)
    with PeakBytes() as watched:
        first = before + 1
        second = first + 1
        del first, second
        before.add_(1)
        third = before * 2
    assert watched.peak == 2 * before.nbytes
    assert third.nbytes == 4000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
