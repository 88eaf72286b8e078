"""The memory that a plan promises, beside what the allocator of a GPU held at most in real training steps."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from model.attention import Device
from model.config import WindreachConfig
from model.decoder import build_model
from model.packing import Packing
from training.objective import Scorer, Target
from training.optimizer import SummedOptimizer
from training.planning.formulas import Setup, memory
from training.settings.build import init_options, model_config
from training.settings.schema import Settings

TOLERANCE = 0.15  # of the measured peak
VOCABULARY = 2048
LAYERS: dict[str, list[dict[str, Any]]] = {
    "short windows, in blocks": [{"window": 16}],
    "long windows, by a fused kernel": [{"window": 512}],
    "full layers between short windows": [{"kind": "full"}, {"window": 16}],
}


def a_run(layers: list[dict[str, Any]], **training: Any) -> tuple[Settings, WindreachConfig]:
    """A step of two micro-batches of 4 x 2,048 tokens: in the second one gradients exist already."""
    model = {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "sliding_window": 512, "layers": layers,
    }  # fmt: skip
    steps = {"max_steps": 1000, "tokens_per_step": 16_384, "micro_batch_tokens": 8192, "precision": "bf16"}
    tree = {"name": "memory", "model": model, "data": {"seq_len": 2048}, "recall": {"enabled": False}}
    settings = Settings.model_validate(tree | {"training": steps | training})
    return settings, model_config(settings, VOCABULARY)


def measured_peak(settings: Settings, config: WindreachConfig, device: str, compiled: bool = False) -> int:
    """Bytes of weights, gradients, moments and activations, without the workspace of cuBLAS, which is there before."""
    torch.ones(8, 8, device=device, dtype=torch.bfloat16).mm(torch.ones(8, 8, device=device, dtype=torch.bfloat16))
    before = torch.cuda.memory_allocated()
    scorer = Scorer(build_model(config, init_options(settings)), None).to(device).train()
    if settings.training.activation_checkpointing:
        recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        scorer.decoder.model.gradient_checkpointing = True  # as transformers does, by a name that differs by version
        scorer.decoder.model._gradient_checkpointing_func = recomputed
    if compiled:
        scorer.decoder.compile_layers()
    optimizer = SummedOptimizer(scorer.named_parameters(), ["text"], settings.training.optimizer)
    ids = torch.randint(VOCABULARY, (4, settings.data.seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    packing = Packing.of_whole_rows(settings.data.seq_len, ids.device)
    targets = {"text": Target(torch.arange(ids.numel(), device=device), ids.flatten())}
    for _ in range(3):  # the first one also makes the moments, and what compilation needs
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                loss = scorer(ids, packing, targets)["text"].loss
            loss.backward()
        optimizer.take("text", 1.0)
        rate, weights = torch.tensor(1e-3, device=device), {"text": torch.tensor(1.0, device=device)}
        optimizer.step(rate, weights, torch.tensor(True, device=device))
    return torch.cuda.max_memory_allocated() - before


def planned(settings: Settings, config: WindreachConfig) -> int:
    setup = Setup("bf16", checkpointing=settings.training.activation_checkpointing, device=Device.here("cuda"))
    return sum(memory(settings, config, setup).values())


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", LAYERS)
def test_the_plan_is_what_the_allocator_held(case: str, checkpointing: bool) -> None:
    settings, config = a_run(LAYERS[case], activation_checkpointing=checkpointing)
    assert planned(settings, config) == pytest.approx(measured_peak(settings, config, "cuda"), rel=TOLERANCE)


@pytest.mark.cuda
def test_a_compiled_run_needs_no_more_than_planned() -> None:
    settings, config = a_run(LAYERS["long windows, by a fused kernel"])
    assert measured_peak(settings, config, "cuda", compiled=True) < (1 + TOLERANCE) * planned(settings, config)
