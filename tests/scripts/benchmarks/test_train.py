from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.decoder import WindreachForCausalLM, build_model
from scripts.benchmarks import TRAINING_PEERS, train
from scripts.benchmarks.timing import Setup
from scripts.benchmarks.train import PRODUCTS, mistral_twin, plain_config, products, training_step
from training.settings.schema import Settings


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindreachForCausalLM, "compile_layers", lambda self: None)
    uncompiled = {name: peer for name, peer in TRAINING_PEERS.items() if not peer[1]}
    monkeypatch.setattr(train, "TRAINING_PEERS", uncompiled)


def test_peers_compute_the_same_function(settings: Settings) -> None:
    ours = build_model(plain_config(settings), seed=0)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    for attention in ("sdpa", "eager"):
        peer = mistral_twin(ours, attention)
        torch.testing.assert_close(peer(ids, use_cache=False).logits, ours(ids).logits, atol=1e-4, rtol=0)


def test_a_row_beside_each_peer_and_beside_the_bare_products(setup: Setup, uncompiled: None) -> None:
    rows = train.bench_train(setup)
    assert [row.peer for row in rows] == ["transformers sdpa", "transformers eager", PRODUCTS]
    assert all(row.ratio == row.peer_s / row.ours_s for row in rows if row.peer_s)
    assert [row.limit for row in rows] == [2.0, 2.0, None]
    assert rows[0].case.endswith("2 x 40 tokens a step")
    assert all(row.note.startswith(f"ours: {80 / row.ours_s:,.0f} tokens/s, MFU ") for row in rows)


def test_peers_that_would_take_too_much_are_left_out(
    setup: Setup, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SCORES_LIMIT", 2 * 4 * 2 * 2 * 48**2)  # two squares in each of 2 layers and 2 heads
    rows = train.bench_train(setup, rows=1, seq_len=48)
    assert [row.peer for row in rows] == ["transformers sdpa", "transformers eager", PRODUCTS]
    monkeypatch.setattr(train, "SCORES_LIMIT", train.SCORES_LIMIT - 1)
    rows = train.bench_train(setup, rows=1, seq_len=48)
    assert [row.peer for row in rows] == ["transformers sdpa", PRODUCTS]
    assert rows[0].case.endswith("1 x 48 tokens a step")
    rows = train.bench_train(setup, only="transformers sdpa")
    assert [row.peer for row in rows] == ["transformers sdpa", PRODUCTS]
    monkeypatch.setattr(train, "LONGEST", 40)
    rows = train.bench_train(setup, rows=1, seq_len=48)
    assert [row.peer for row in rows] == [PRODUCTS]


@pytest.mark.parametrize("tied", [False, True])
def test_the_bare_products_are_those_of_every_matrix_of_the_model(setup: Setup, tied: bool) -> None:
    config = plain_config(setup.settings)
    config.tie_word_embeddings = tied
    model = build_model(config)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    embedding = 0 if tied else model.model.embed_tokens.weight.numel()
    with FlopCounterMode(display=False) as counter:
        products(model, 10, setup)()
    assert counter.get_total_flops() == 3 * 2 * 10 * (weights - embedding)


def test_one_step_changes_the_weights_as_the_loss_says(settings: Settings) -> None:
    model = build_model(plain_config(settings), seed=0).train()
    batch = torch.randint(300, (2, 41), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        return F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).item()

    before, step = loss(), training_step(model, batch, "fp32")
    for _ in range(5):
        step()
    assert loss() < before


def test_on_a_gpu_sequences_may_be_long_and_flash_attention_is_a_peer_where_it_is_installed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gpu = plain_config(setup.settings), replace(setup, device=torch.device("cuda"))
    assert not list(train.peers(setup, config, 1, 16_384))
    sdpa = ["transformers sdpa", "transformers sdpa, layers compiled"]
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert list(train.peers(gpu, config, 4, 16_384)) == [*sdpa, "transformers flex"]
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: object())
    assert list(train.peers(gpu, config, 4, 16_384)) == [*sdpa, "transformers flex", "transformers flash"]
