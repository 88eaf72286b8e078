"""A decoder of a few thousand weights, a tokenizer of bytes, and the setup of a small benchmark."""

from collections.abc import Sequence

import pytest
import torch

from eval.models import Examined
from model.config import WindreachConfig
from model.decoder import build_model
from scripts.benchmarks.timing import Setup
from training.settings.schema import Settings


class ByteTokenizer:
    """Token i is byte i. 0 begins a text, 255 ends it, 254 is unknown; no UTF-8 text contains the bytes 254 and 255."""

    vocab_size, bos_id, eos_id, unk_id = 256, 0, 255, 254

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture
def tiny_config() -> WindreachConfig:
    return WindreachConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=5, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture
def examined(tiny_config: WindreachConfig) -> Examined:
    model = build_model(tiny_config, seed=3).eval()
    return Examined(
        name="tiny", model=model, tokenizer=ByteTokenizer(), specs=tiny_config.specs, folder=None, run_dir=None
    )


@pytest.fixture
def settings() -> Settings:
    model = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "sliding_window": 5,
    }  # fmt: skip
    data = {"seq_len": 40, "tokenizer": {"vocab_size": 300}}
    return Settings.model_validate(
        {"name": "tiny", "model": model, "data": data, "training": {"max_steps": 1000, "tokens_per_step": 80}}
    )


@pytest.fixture
def setup(settings: Settings) -> Setup:
    return Setup(settings, torch.device("cpu"), "fp32", rounds=1)
