"""Shares of each processor, the largest micro-batch, tokens and time."""

import pytest

from model.attention import Device
from model.config import WindreachConfig
from model.errors import UserError
from model.flops import count_parameters, flops_per_token
from model.windows import LayerSpec
from training.planning.dry_run import cluster_plan
from training.planning.formulas import (
    GPU,
    Setup,
    exchange_bytes,
    halo_bytes,
    largest_rows,
    layer_bytes,
    longest_row,
    memory,
    recompute_factor,
    work,
)
from training.planning.gpus import GPUS
from training.settings.build import model_config
from training.settings.config_file import load_settings
from training.settings.generate import ROOT
from training.settings.schema import Settings

SEVEN_B = ("training.max_steps=1000", "training.schedule.warmup_steps=100")


def loaded(name: str, *overrides: str) -> tuple[Settings, WindreachConfig]:
    settings = load_settings(ROOT / "configs" / f"{name}.yaml", overrides)
    return settings, model_config(settings, settings.model.vocab_size or 2048)


def test_fsdp2_shares_out_what_ddp_repeats() -> None:
    settings, config = loaded("mistral-7b")
    whole = memory(settings, config, Setup("bf16", 64, "ddp"))
    shared = memory(settings, config, Setup("bf16", 64, "fsdp2"))
    assert whole["weights"] == 4 * count_parameters(config)
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] == pytest.approx(whole[part] / 64, rel=1e-6)
    assert whole["optimizer"] == 2 * whole["weights"]
    assert shared["activations"] < whole["activations"]  # weights are gathered in bf16, and need no cast copies


def test_a_second_objective_has_gradients_and_moments_of_its_own() -> None:
    settings, config = loaded("quickstart")
    with_recall = memory(settings, config, Setup("bf16"))
    settings, config = loaded("quickstart", "recall.enabled=false")
    text = memory(settings, config, Setup("bf16"))
    n, relay, matrices = count_parameters(config), 96 * 32, 884_736 + 1_769_472
    assert (text["gradients"], with_recall["gradients"]) == (4 * n, 8 * (n + relay))
    assert with_recall["optimizer"] == 2 * (8 * (n + relay) - 4 * matrices)  # Muon keeps one moment per matrix


def test_one_process_exchanges_nothing_and_ddp_as_much_as_its_gradients() -> None:
    settings, config = loaded("mistral-7b")
    assert exchange_bytes(config, Setup("bf16"), count_parameters(config)) == 0
    setup = Setup("bf16", 8)
    assert exchange_bytes(config, setup, count_parameters(config)) == memory(settings, config, setup)["gradients"]


def test_fsdp2_gathers_two_layers_and_the_root_in_bf16() -> None:
    _, config = loaded("mistral-7b")
    layer = (count_parameters(config) - 2 * 32_000 * 4_096 - 4_096) // 32
    root = 2 * 32_000 * 4_096 + 4_096
    gathered, on_the_way = 2 * (root + 2 * layer), (2 + 4) * max(layer, root)
    assert exchange_bytes(config, Setup("bf16", 8, "fsdp2"), 0) == gathered + on_the_way


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(checkpointing: bool) -> None:
    settings, config = loaded("twins/text-only")
    setup = Setup("bf16", checkpointing=checkpointing)
    rows = largest_rows(settings, config, setup, available=2e9)
    assert rows > 4

    def total(n: int) -> int:
        tokens = n * settings.data.seq_len
        asked = f"training.tokens_per_step={tokens}"
        return sum(memory(loaded("twins/text-only", asked)[0], config, setup).values())

    assert total(rows) <= 2e9 < total(rows + 1)


def test_no_row_fits_where_the_weights_alone_are_too_large() -> None:
    settings, config = loaded("mistral-7b")
    assert largest_rows(settings, config, Setup("bf16", 8, "ddp"), available=70e9) == 0


def test_a_gpu_keeps_attention_weights_only_in_blocks() -> None:
    settings, config = loaded("mistral-7b")
    fused = memory(settings, config, Setup("bf16"))["activations"]
    _, config = loaded("mistral-7b", "model.attention_backend=blocked")
    weights = 32 * 32 * 16_384 * 4_096 * 2  # layers x heads x queries x window, in bf16
    assert memory(settings, config, Setup("bf16"))["activations"] == pytest.approx(fused + weights, rel=0.03)
    settings, config = loaded("twins/full", "model.attention_backend=blocked")
    whole_row = memory(settings, config, Setup("bf16"))["activations"]
    _, config = loaded("twins/full")
    assert memory(settings, config, Setup("bf16"))["activations"] == whole_row


def test_flops_of_text_are_those_of_its_tokens() -> None:
    settings, config = loaded("mistral-7b", *SEVEN_B)
    (text,) = work(settings, 8)
    assert text.tokens == 1000 * 4_194_304
    assert text.flops(config) == pytest.approx(text.tokens * flops_per_token(config, 16384), rel=1e-9)


def test_recomputing_the_layers_costs_a_fourth_forward_pass_without_the_head() -> None:
    _, config = loaded("mistral-7b")
    head = 2 * config.hidden_size * config.vocab_size / flops_per_token(config, 16384)
    assert recompute_factor(config, 16384) == pytest.approx(4 / 3 - head)


def test_more_processors_than_rows_make_the_step_larger() -> None:
    settings, _ = loaded("mistral-7b")
    assert [work(settings, n)[0].first.tokens // 2**20 for n in (8, 256, 1024)] == [4, 4, 16]


def test_recall_costs_what_its_rows_do_and_hardly_any_head() -> None:
    settings, config = loaded("quickstart")
    text, recall = work(settings, 1)
    assert (recall.first.seq_len, recall.last.seq_len) == (136, 320)
    assert recall.flops(config) / recall.tokens < text.flops(config) / text.tokens


def test_rates_of_gpus_are_dense() -> None:
    assert GPUS["h100"].bf16_flops == pytest.approx(1979e12 / 2, rel=1e-3)


def test_a_gpu_keeps_what_the_backend_keeps_that_auto_chooses() -> None:
    """Short windows with thin heads are computed in blocks. Windows over half of a sequence are not."""
    blocks = LayerSpec("sliding", 16)

    def kept(backend: str, spec: LayerSpec, seq_len: int, device: Device = GPU) -> int:
        _, config = loaded("quickstart", f"model.attention_backend={backend}")
        return layer_bytes(config, Setup("bf16", device=device), spec, 1, seq_len)[0] // seq_len

    fused, heads, groups, head_size = kept("flex", blocks, 256), 4, 2, 24
    weights, unrotated = 2 * heads * 16, 2 * (heads + groups) * head_size  # q and k before rotation, in bf16
    assert kept("auto", blocks, 256) == kept("blocked", blocks, 256) == fused + weights - unrotated
    assert kept("auto", LayerSpec("sliding", 512), 2048) == kept("blocked", LayerSpec("full"), 256) == fused
    assert kept("blocked", LayerSpec("sliding", 200), 256) == kept("reference", LayerSpec("full"), 256)
    old = Device("cuda", (7, 5))  # for which there is no fused kernel without triton
    assert kept("auto", LayerSpec("sliding", 512), 2048, old) == fused + 2 * heads * 512 - unrotated


def test_a_window_sends_the_same_whatever_the_length_and_a_full_layer_sends_all_that_is_earlier() -> None:
    """2 (W - 1) x 2 heads x 64 numbers of 2 bytes; a full layer of the last of four processes: 3/4 of the row."""
    _, config = loaded("quickstart")
    setup, number = Setup("bf16", 4, parts=4), 2 * config.num_key_value_heads * config.head_dim * 2
    sliding = LayerSpec("sliding", 64)
    assert [halo_bytes(config, setup, sliding, 1, tokens) for tokens in (4096, 1 << 20)] == [63 * number] * 2
    assert halo_bytes(config, setup, LayerSpec("full"), 2, 4096) == 2 * 3072 * number


def test_the_longest_row_grows_with_the_processes_that_share_it() -> None:
    settings, config = loaded("mistral-7b")
    rows = [longest_row(settings, config, Setup("bf16", n, "fsdp2"), 80e9) for n in (8, 64)]
    assert rows[0] > 0
    assert rows[1] > 8 * rows[0]  # weights and moments are shared too
    assert longest_row(settings, config, Setup("bf16", 64, "ddp"), 80e9) == 0


def test_gpus_that_are_no_multiple_of_the_processes_that_share_rows_are_refused() -> None:
    settings, _ = loaded("quickstart", "training.context_parallel=4")
    with pytest.raises(UserError, match=r"context_parallel is 4, but --gpus is 6; give a multiple of 4"):
        cluster_plan(settings, "h100", 6, 0.4)
