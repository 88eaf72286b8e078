"""What a step is said to hold is what a real step on the CPU holds."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.config import WindreachConfig
from model.decoder import build_model
from model.errors import UserError
from model.flops import count_parameters
from training.objective import Scorer
from training.optimizer import SummedOptimizer
from training.planning.memory import Form, Rows, held, optimizer_bytes, step_bytes
from training.settings.schema import OptimizerSettings

TOLERANCE = 0.15


def config(layers: list[dict], **fields: int) -> WindreachConfig:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": len(layers)}
    return WindreachConfig(**sizes | fields, sliding_window=8, layers=layers, tie_word_embeddings=False)


def real_step(config: WindreachConfig, rows: Rows, form: Form) -> tuple[int, int]:
    """(kept, peak) bytes of a real forward and backward pass at full depth, gradients there as in accumulation."""
    scorer = Scorer(build_model(config), rows.relay_values).train()
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    if form.checkpointing:
        for layer in scorer.decoder.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows.rows, rows.seq_len), generator=draw)
    n, relayed = rows.rows * rows.scored, rows.rows * rows.relayed
    targets = {"text": (torch.arange(n), torch.randint(config.vocab_size, (n,), generator=draw))}
    if relayed:
        places = torch.randint((len(config.specs) + 1) * ids.numel(), (relayed,), generator=draw)
        targets["relay"] = (places, torch.randint(rows.relay_values or 1, (relayed,), generator=draw))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=form.precision == "bf16"):
            return torch.stack([total for total, _ in scorer(ids, None, targets).values()]).sum()

    return step_bytes(scorer, loss)


SHORT, LONG = {"kind": "sliding", "window": 8}, {"kind": "sliding", "window": 128}
CASES = {
    "short windows": (config([SHORT] * 6), Rows(4, 96, 96), Form()),
    "short windows in bf16": (config([SHORT] * 6), Rows(4, 96, 96), Form("bf16")),
    "short windows recomputed": (config([SHORT] * 6), Rows(4, 96, 96), Form(checkpointing=True)),
    "long windows": (config([LONG] * 4), Rows(2, 512, 512), Form()),
    "long windows recomputed": (config([LONG] * 4), Rows(2, 512, 512), Form("bf16", checkpointing=True)),
    "mixed kinds": (config([SHORT, {"kind": "full"}] * 3), Rows(2, 160, 160), Form("bf16")),
    "large vocabulary": (config([SHORT] * 2, vocab_size=8000), Rows(4, 96, 96), Form()),
    "recall, relays asked": (config([SHORT] * 8), Rows(4, 96, 4, relayed=60, relay_values=16), Form()),
    "recall, recomputed": (config([SHORT] * 8), Rows(4, 96, 4, relayed=60, relay_values=16), Form(checkpointing=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_peak_of_a_step_is_the_planned_one(case: str) -> None:
    planned = held(*CASES[case])
    _, peak = real_step(*CASES[case])
    assert planned.total == pytest.approx(peak, rel=TOLERANCE), f"planned {planned}, measured {peak:,}"


@pytest.mark.parametrize("case", ["short windows", "short windows in bf16", "long windows", "mixed kinds"])
def test_what_layers_keep_is_what_autograd_keeps(case: str) -> None:
    shape, rows, form = CASES[case]
    kept, _ = real_step(shape, rows, form)
    bare, _ = real_step(config([SHORT]), rows, form)
    one, _ = real_step(config([SHORT] * 2), rows, form)
    outside = bare - (one - bare)
    assert held(shape, rows, form).layers == pytest.approx(kept - outside, rel=0.02)


def test_recomputing_holds_less_and_a_longer_row_more() -> None:
    shape, rows, _ = CASES["short windows"]
    assert held(shape, rows, Form(checkpointing=True)).total < held(shape, rows, Form()).total / 2
    assert held(shape, Rows(4, 192, 192), Form()).total > 1.9 * held(shape, rows, Form()).total


def test_a_window_costs_less_than_full_attention_only_where_scores_are_kept() -> None:
    rows = Rows(1, 1024, 1024)
    there = Form("bf16", attention="accelerator")
    fused = Form("bf16", attention="fused")
    assert held(config([LONG]), rows, there).layers > held(config([LONG]), rows, fused).layers
    assert held(config([LONG]), rows, fused).layers == pytest.approx(
        held(config([{"kind": "full"}]), rows, fused).layers, rel=0.01
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("sink", [False, True])
def test_optimizer_state_is_that_of_a_real_step(kind: str, sink: bool) -> None:
    shape = config([SHORT | {"sink": sink}] * 3)
    settings = OptimizerSettings(kind=kind)
    scorer = Scorer(build_model(shape), relay_values=16)
    optimizer = SummedOptimizer(scorer.named_parameters(), ["text", "recall"], settings)
    for objective in ("text", "recall"):
        for p in scorer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.take(objective, 1.0)
    optimizer.step(1e-3, {"text": 1.0, "recall": 1.0})
    real = sum(t.nbytes for name, t in optimizer.state_tensors().items() if "/step/" not in name)
    assert optimizer_bytes(shape, settings, objectives=2, more=64 * 16) == real


def test_weights_and_gradients_are_four_bytes_each() -> None:
    model = build_model(config([SHORT] * 2))
    assert 4 * count_parameters(model.config) == sum(p.nbytes for p in model.parameters())


def test_sizes_beyond_any_machine_are_refused() -> None:
    with pytest.raises(UserError, match=r"one tensor of a step would hold [\d,]+ numbers .* no machine holds that"):
        held(config([SHORT], hidden_size=2**40), Rows(1, 64, 64), Form())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
