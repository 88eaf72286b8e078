"""One training step and one decoded text, beside `MistralForCausalLM` of transformers with the same weights."""

import torch

from scripts.benchmarks.decode import bench_decode
from scripts.benchmarks.timing import Row, Setup
from scripts.benchmarks.train import bench_train
from scripts.checks import Section
from training.settings.schema import Settings

SIZES = {  # seconds of work for the device: hidden size, layers, W, tokens of a sequence
    "cpu": (128, 4, 32, 512),
    "cuda": (1024, 8, 1024, 8192),
}
PROMPT, NEW = 48, 64  # tokens


def speed(device: torch.device, precision: str) -> Section:
    """Tokens/s of ours and of the peer. It is a problem to be slower."""
    hidden, layers, window, seq_len = SIZES[device.type]
    model = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "sliding_window": window,
        "num_attention_heads": hidden // 64, "num_key_value_heads": 2, "vocab_size": 4096,
    }  # fmt: skip
    training = {"max_steps": 1000, "tokens_per_step": 2 * seq_len}
    settings = Settings.model_validate(
        {"name": "doctor", "model": model, "data": {"seq_len": seq_len}, "training": training}
    )
    setup = Setup(settings, device, precision, rounds=3)
    section = Section(f"Tokens per second: {layers} layers, hidden size {hidden}, W {window}")
    _add(section, "training", bench_train(setup, only="transformers sdpa")[0], 2 * seq_len)
    _add(section, "decoding", bench_decode(setup, PROMPT, NEW, [1])[0], NEW)
    return section


def _add(section: Section, what: str, row: Row, tokens: int) -> None:
    theirs = tokens / row.peer_s if row.peer_s else None
    columns = {"ours": tokens / row.ours_s, "beside": row.peer, "its": theirs, "ratio": row.ratio}
    section.rows.append({"what": f"{what}, {row.dtype}"} | columns)
    if row.ratio is None or row.ratio < 1:
        how = "could not be compared with" if row.ratio is None else "is slower than"
        remedy = f"end other programs and run again; python scripts/bench.py {row.bench} measures more"
        section.problem(f"{what} {how} {row.peer} {row.note}".strip(), remedy)
