import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.decoder import WindreachForCausalLM, build_model
from scripts.benchmarks import TRAINING_PEERS, train
from scripts.benchmarks.peers import mistral_twin, plain_config
from scripts.benchmarks.timing import Setup
from scripts.benchmarks.train import PRODUCTS, products, scores_kept, speeds, training_step, weight_shapes
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
    ours, *peers = speeds(rows, setup)
    assert ours.startswith(f"  ours: {80 / rows[0].ours_s:,.0f} tokens/s, MFU ")
    assert peers == [f"  {row.peer}: {80 / row.peer_s:,.0f} tokens/s" for row in rows if row.peer_s]


def test_peers_that_would_take_too_much_are_left_out_with_the_reason(
    setup: Setup, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SCORES_LIMIT", 1000)
    rows = train.bench_train(setup, rows=1, seq_len=48)
    notes = {row.peer: row.note for row in rows}
    assert notes["transformers eager"] == "MemoryError: its dense scores need 0.0 GiB, more than this benchmark allows"
    assert rows[0].case.endswith("1 x 48 tokens a step")
    rows = train.bench_train(setup, only="transformers sdpa")
    assert [row.peer for row in rows] == ["transformers sdpa", PRODUCTS]
    monkeypatch.setattr(train, "LONGEST", 40)
    rows = train.bench_train(setup, rows=1, seq_len=48)
    assert [row.peer for row in rows] == [PRODUCTS]


def test_the_rate_that_long_rows_keep_is_measured_over_equally_many_tokens(setup: Setup, uncompiled: None) -> None:
    (row,) = train.bench_long_rows(setup, rows=2, lengths=[48, 16, 32])
    assert (row.case.split(": ")[1], row.peer) == ("2 x 48 tokens a step", "3 steps of 2 x 16 tokens")
    assert row.peer_s is not None
    assert (row.ratio, row.limit) == (row.peer_s / row.ours_s, 0.9)


def test_scores_kept_are_two_float32_squares_a_head_and_layer(settings: Settings) -> None:
    config = plain_config(settings)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    assert scores_kept(config, rows=3, t=100) == 2 * 4 * layers * 3 * heads * 100 * 100


def test_the_bare_products_are_those_of_every_matrix_of_the_model(setup: Setup) -> None:
    config = plain_config(setup.settings)
    matrices = [p for n, p in build_model(config).named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    assert sum(n * k for n, k in weight_shapes(config)) == sum(p.numel() for p in matrices)
    with FlopCounterMode(display=False) as counter:
        products(config, 10, setup)()
    assert counter.get_total_flops() == 3 * 2 * 10 * sum(p.numel() for p in matrices)


def test_one_step_changes_the_weights_as_the_loss_says(settings: Settings) -> None:
    model = build_model(plain_config(settings), seed=0).train()
    batch = torch.randint(300, (2, 41), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        return F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).item()

    before, step = loss(), training_step(model, batch, "fp32")
    for _ in range(5):
        step()
    assert loss() < before
