"""Plans for many processors: shares, steps, time."""

import pytest

from model.config import WindreachConfig
from model.flops import count_parameters, flops_per_token
from training.planning.cluster import (
    MOST_TOKENS,
    Processor,
    Setup,
    exchange_bytes,
    largest_rows,
    memory,
    pace,
    recompute_factor,
    setups,
    work,
)
from training.planning.gpus import GPUS
from training.settings.build import model_config
from training.settings.config_file import load_settings
from training.settings.generate import ROOT
from training.settings.schema import Settings

GPU = Processor("h100", 1e15, 70e9, "made up", "fused")
SEVEN_B = ("training.max_steps=1000", "training.schedule.warmup_steps=100")


def loaded(name: str, *overrides: str) -> tuple[Settings, WindreachConfig]:
    settings = load_settings(ROOT / "configs" / f"{name}.yaml", overrides)
    return settings, model_config(settings, settings.model.vocab_size or 2048)


def test_fsdp2_shares_out_what_ddp_repeats() -> None:
    settings, config = loaded("mistral-7b")
    whole = memory(settings, config, Setup(GPU, "bf16", 64, "ddp"))
    shared = memory(settings, config, Setup(GPU, "bf16", 64, "fsdp2"))
    assert whole.weights == 4 * count_parameters(config)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(shared, part) == pytest.approx(getattr(whole, part) / 64, rel=1e-6)
    assert whole.optimizer == 2 * whole.weights
    assert shared.activations < whole.activations  # weights are gathered in bf16, and need no cast copies


def test_a_second_objective_has_gradients_and_moments_of_its_own() -> None:
    settings, config = loaded("quickstart")
    with_recall = memory(settings, config, Setup(GPU, "bf16"))
    settings, config = loaded("quickstart", "recall.enabled=false")
    text = memory(settings, config, Setup(GPU, "bf16"))
    n, relay, matrices = count_parameters(config), 96 * 32, 884_736 + 1_769_472
    assert (text.gradients, with_recall.gradients) == (4 * n, 8 * (n + relay))
    assert with_recall.optimizer == 2 * (8 * (n + relay) - 4 * matrices)  # Muon keeps one moment a matrix


def test_one_process_exchanges_nothing_and_is_not_sharded() -> None:
    _, config = loaded("mistral-7b")
    assert exchange_bytes(config, Setup(GPU, "bf16")) == 0
    assert exchange_bytes(config, Setup(GPU, "bf16", 8)) == 4 * count_parameters(config)
    assert [s.sharding for s in setups(GPU, "bf16", 1)] == ["ddp", "ddp"]
    assert [s.sharding for s in setups(GPU, "bf16", 2)] == ["ddp", "ddp", "fsdp2", "fsdp2"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(checkpointing: bool) -> None:
    gpu = Processor("small", 1e14, 2e9, "made up", "fused")
    settings, config = loaded("quickstart-text-only")
    setup = Setup(gpu, "bf16", checkpointing=checkpointing)
    rows = largest_rows(settings, config, setup, memory(settings, config, setup).fixed)
    assert rows > 4

    def total(n: int) -> int:
        tokens = n * settings.data.seq_len
        asked = f"training.tokens_per_step={tokens}"
        return memory(loaded("quickstart-text-only", asked)[0], config, setup).total

    assert total(rows) <= gpu.memory < total(rows + 1)


def test_a_tiny_model_on_a_large_processor_is_counted_up_to_a_limit() -> None:
    settings, config = loaded("smoke")
    setup = Setup(GPU, "bf16")
    most = largest_rows(settings, config, setup, memory(settings, config, setup).fixed)
    assert most == MOST_TOKENS // settings.data.seq_len


def test_no_row_fits_where_the_weights_alone_are_too_large() -> None:
    settings, config = loaded("mistral-7b")
    setup = Setup(GPU, "bf16", 8, "ddp")
    assert largest_rows(settings, config, setup, memory(settings, config, setup).fixed) == 0


def test_time_is_flops_over_the_stated_share_of_the_peak() -> None:
    settings, config = loaded("mistral-7b", *SEVEN_B)
    found = pace(settings, config, GPU, ranks=8, mfu=0.5, checkpointing=False)
    (text,) = work(settings, 8)
    flops = 1000 * 4_194_304 * flops_per_token(config, 16384)
    assert text.flops(config) == pytest.approx(flops, rel=1e-9)
    assert found.seconds == pytest.approx(flops / (8 * 1e15 * 0.5))
    assert found.tokens_per_second * found.seconds == pytest.approx(1000 * 4_194_304)
    assert found.hours(8) == pytest.approx(8 * found.seconds / 3600)


def test_recomputing_the_layers_costs_a_fourth_forward_pass_without_the_head() -> None:
    settings, config = loaded("mistral-7b")
    assert recompute_factor(settings, config) == pytest.approx(4 / 3, abs=0.01)
    assert recompute_factor(settings, config) < 4 / 3


def test_more_processors_than_rows_make_the_step_larger() -> None:
    settings, _ = loaded("mistral-7b")
    assert [work(settings, n)[0].first.tokens // 2**20 for n in (8, 256, 1024)] == [4, 4, 16]


def test_recall_costs_what_its_rows_do_and_hardly_any_head() -> None:
    settings, config = loaded("quickstart")
    text, recall = work(settings, 1)
    assert (recall.first.seq_len, recall.last.seq_len) == (136, 320)
    assert recall.flops(config) / recall.tokens < text.flops(config) / text.tokens


def test_figures_of_gpus_are_dense_and_in_order() -> None:
    assert GPUS["h100"].bf16_flops == pytest.approx(1979e12 / 2, rel=1e-3)
    assert GPUS["a100-40"].bf16_flops == GPUS["a100-80"].bf16_flops == 312e12
    assert all(gpu.source and 20e9 < gpu.memory < 300e9 for gpu in GPUS.values())
