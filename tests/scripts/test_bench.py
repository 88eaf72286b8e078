import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from scripts import bench
from scripts.peers import mistral_twin, plain_config
from scripts.timing import OURS, Row, alternate, peak_bytes, rows_of
from training.settings import Settings

ROW = Row("attention", "forward n=512 W=64", "peer", 1.0, 1.0, 1.0, None, None, None, "fp32", 1)
KEYS = ["bench", "case", "peer", "ours_s", "peer_s", "ratio", "limit", "ours_bytes", "peer_bytes", "dtype", "threads"]


def test_a_peer_that_can_not_run_says_why_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise NotImplementedError("no kernel for this window\nand a long story")

    rows = rows_of("x", "case", {OURS: int, "works": int, "broken": broken}, 2, "fp32", limits={"works": 2.0})
    works, refused = rows
    assert works.ratio is not None
    assert works.limit == 2.0
    assert (refused.peer_s, refused.note) == (None, "NotImplementedError: no kernel for this window")


def test_our_own_failure_is_no_peer_missing() -> None:
    def broken() -> None:
        raise ValueError("ours")

    with pytest.raises(RuntimeError, match="our own side of the benchmark failed: ValueError: ours"):
        alternate({OURS: broken}, 1)


def test_peak_counts_what_is_alive_at_once() -> None:
    x = torch.zeros(1000)

    def work() -> None:
        for _ in range(5):
            y = x + 1
            y += 1
            del y

    assert peak_bytes(work) == 4000


def test_exponents_are_slopes_on_both_axes() -> None:
    rows = [replace(ROW, case=f"forward n={n} W=64", ours_s=n, peer_s=float(n) ** 2) for n in (512, 1024, 2048)]
    rows += [replace(ROW, case=f"forward n=1024 W={w}", ours_s=16.0 * w, peer_s=1024.0**2) for w in (16, 32)]
    rows = [r for r in rows for r in (r, replace(r, case=r.case.replace("forward", "forward+backward")))]
    fits = bench.exponents(rows)
    assert fits["ours, forward: time ~ n^"] == pytest.approx(1)
    assert fits["peer, forward: time ~ n^"] == pytest.approx(2)
    assert fits["ours, forward+backward: time ~ W^"] == pytest.approx(1)
    assert fits["peer, forward+backward: time ~ W^"] == pytest.approx(0)


def test_training_peers_compute_the_same_function(settings: Settings) -> None:
    ours = bench.build_model(plain_config(settings), seed=0)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    for _, attention, _ in bench.PEERS_OF_TRAINING:
        peer = mistral_twin(ours, attention)
        torch.testing.assert_close(peer(ids, use_cache=False).logits, ours(ids).logits, atol=1e-4, rtol=0)


def test_training_rows_stand_beside_each_peer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindreachForCausalLM, "compile_layers", lambda self: None)
    monkeypatch.setattr(bench, "PEERS_OF_TRAINING", [peer for peer in bench.PEERS_OF_TRAINING if not peer[2]])
    rows = bench.bench_train(settings, "fp32", rounds=1)
    assert [row.peer for row in rows] == ["transformers sdpa", "transformers eager"]
    assert all(row.ratio == row.peer_s / row.ours_s for row in rows if row.peer_s)
    assert rows[0].case.endswith("2 x 40 tokens a step")
    assert "tokens/s" in bench.tokens_per_second(rows)


def test_a_stack_that_mistral_can_not_express_has_no_peer(settings: Settings) -> None:
    mixed = settings.model.model_dump() | {"layers": [{"kind": "sliding"}, {"kind": "full"}]}
    with pytest.raises(UserError, match="so Mistral is no peer for it"):
        plain_config(Settings.model_validate(settings.model_dump() | {"model": mixed}))


def test_attention_rows_and_json_have_the_fixed_keys(tmp_path: Path) -> None:
    rows = bench.bench_attention("fp32", 1, lengths=(128, 160, 200), windows=(16, 64, 96))
    bench.write_json(rows, tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert all(set(KEYS) <= row.keys() for row in written)
    assert {row["peer"] for row in written} == {
        "sdpa, dense window mask", "sdpa, causal, no window", "transformers eager",
    }  # fmt: skip
    bench.plot_attention(rows, tmp_path / "attention.png")
    assert bench.table_of(rows).row_count == len(rows)


@pytest.mark.parametrize("name", ["rounds", "threads", "rows", "prompt-tokens", "new-tokens"])
def test_a_count_below_one_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} 0: give at least 1"):
        bench.parse(["train", f"--{name}=0"])
