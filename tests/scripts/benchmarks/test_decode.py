from dataclasses import replace

import pytest
import torch

from model.cache import RingCache
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM, build_model
from model.errors import UserError
from scripts.benchmarks import decode
from scripts.benchmarks.decode import Generation, Loop, bench_decode, bench_prefill, bench_stream, dtype_of, held_bytes
from scripts.benchmarks.timing import Setup


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindreachForCausalLM, "compile_decoding", lambda self: None)


def test_the_ring_has_the_bytes_of_a_window_and_all_write_the_same_tokens(setup: Setup) -> None:
    rows = bench_decode(setup, prompt_tokens=12, new_tokens=8, batches=[1, 2])
    assert [row.ours_bytes for row in rows] == [2 * 2 * 5 * 16 * 4] * 3 + [2 * 2 * 2 * 5 * 16 * 4] * 3
    assert {row.note for row in rows} == {""}
    assert all(row.case.endswith(", same tokens") for row in rows)
    assert [row.limit for row in rows] == [3.0, 3.0, None] * 2


def test_our_loop_writes_the_tokens_of_generate(tiny_config: WindreachConfig) -> None:
    model, prompt = build_model(tiny_config).eval(), torch.arange(6).view(2, 3)
    runs = [way(model, lambda: RingCache(tiny_config), prompt, 20) for way in (Loop, Generation)]
    for run in runs:
        run()
    assert torch.equal(runs[0].tokens, runs[1].tokens)


def test_weights_have_the_chosen_precision_on_a_gpu_only(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, in_bf16 = replace(setup, device=torch.device("cuda")), replace(setup, precision="bf16")
    dtypes = [dtype_of(x) for x in (setup, in_bf16, on_gpu, replace(on_gpu, precision="bf16"))]
    assert dtypes == [torch.float32] * 3 + [torch.bfloat16]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    assert held_bytes(on_gpu.device) == 70


def test_prefill_is_timed_alone_and_beside_sdpa(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PREFILL_WINDOW", 16)
    rows = bench_prefill(setup, [200, 300], beside=300)
    assert [(row.peer, row.limit, row.case) for row in rows] == [
        ("–", None, "tiny with 4 layers, W 16, n=200"), ("transformers sdpa", 5.0, "tiny with 4 layers, W 16, n=300"),
    ]  # fmt: skip
    assert all(row.ours_bytes for row in rows)


def test_stream_compares_late_tokens_with_early_ones_in_turns(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "THOUSAND", 20)
    (row,) = bench_stream(setup, 60)
    assert row.ratio == row.peer_s / row.ours_s
    assert (row.peer, row.limit) == ("tokens 10 to 30 of another text", 1 / 1.05)
    assert row.case == "tiny: token 60, W 5, cache 1,280 bytes"
    assert row.ours_bytes >= row.peer_bytes > 2**20
    with pytest.raises(UserError, match=r"^--tokens 49: give at least 50, to compare late tokens with early ones$"):
        bench_stream(setup, 49)
