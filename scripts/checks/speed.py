"""One training step and one decoded text, beside `MistralForCausalLM` of transformers with the same weights."""

import torch

from scripts.benchmarks.decode import PEERS, bench_decode
from scripts.benchmarks.timing import Row, Setup
from scripts.benchmarks.train import bench_train
from scripts.checks import Section
from training.processes.precision import measure
from training.settings.schema import Settings

SIZES = {  # seconds of work for the device: hidden size, layers, W, tokens of a sequence
    "cpu": (128, 4, 32, 512),
    "cuda": (1024, 8, 1024, 8192),
}
PROMPT, NEW = 48, 64  # tokens
SLOW = 0.9  # of the peer's speed; other programs make single figures vary by a tenth


def training(device: torch.device) -> Section:
    setup = _setup(device)
    row = bench_train(setup, only="transformers sdpa")[0]
    return _compared("Training", row, setup.settings.training.tokens_per_step)


def decoding(device: torch.device) -> Section:
    return _compared("Decoding", bench_decode(_setup(device), PROMPT, NEW, [1], only=PEERS[0])[0], NEW)


def _setup(device: torch.device) -> Setup:
    hidden, layers, window, seq_len = SIZES[device.type]
    model = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "sliding_window": window,
        "num_attention_heads": hidden // 64, "num_key_value_heads": 2, "vocab_size": 4096,
    }  # fmt: skip
    steps = {"max_steps": 1000, "tokens_per_step": 2 * seq_len}
    tree = {"name": "doctor", "model": model, "data": {"seq_len": seq_len}, "training": steps}
    return Setup(Settings.model_validate(tree), device, measure(device).choose("auto"), rounds=3)


def _compared(title: str, row: Row, tokens: int) -> Section:
    """Tokens/s of ours and of the peer. It is a problem to be clearly slower."""
    theirs = None if row.peer_s is None else tokens / row.peer_s
    columns = {"precision": row.dtype, "ours": tokens / row.ours_s, row.peer: theirs, "ratio": row.ratio}
    section = Section(f"{title}, tokens/s ({row.case.removeprefix('doctor: ')})", [columns])
    if row.ratio is None or row.ratio < SLOW:
        how = f"is slower than {row.peer}" if row.ratio else f"could not be compared with {row.peer}: {row.note}"
        remedy = f"end other programs and run again; python scripts/bench.py {row.bench} measures more"
        section.problem(f"{title} {how}", remedy)
    return section
