"""A small corpus of made-up sentences, its tokenizer, and stores of its tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from data.token_store import TokenStore
from data.tokenizer import Tokenizer, train_tokenizer
from training.settings.schema import Settings

WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "a",
    "ship",
    "came",
    "slowly",
    "over",
    "the",
    "long",
    "grey",
    "water",
    "while",
    "birds",
    "cried",
    "above",
    "its",
    "masts",
]


def made_up(n_words: int, seed: int) -> str:
    """Sentences of eight words, two a paragraph."""
    words = np.random.default_rng(seed).choice(WORDS, n_words)
    sentences = [" ".join(words[i : i + 8]).capitalize() + "." for i in range(0, n_words, 8)]
    return "\n".join(" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)) + "\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([made_up(4000, 0)], 400)


@pytest.fixture(scope="session")
def vocab(tokenizer: Tokenizer) -> RecallVocabulary:
    return recall_vocabulary(tokenizer, 32)


@pytest.fixture(scope="session")
def store(tokenizer: Tokenizer) -> TokenStore:
    """Five documents of unequal length."""
    texts = [made_up(n, n) for n in (40, 800, 8, 2000, 1200)]
    ids = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    starts = np.cumsum([0, *map(len, ids[:-1])])
    tokens = np.concatenate([np.array(i, dtype=np.uint16) for i in ids])
    return TokenStore.of(tokens, starts, tokenizer.token_bytes())


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings that read two small files of `tmp_path` and cache there; arguments replace data settings."""
    (tmp_path / "train.txt").write_text(made_up(3000, 1), encoding="utf-8")
    (tmp_path / "heldout.txt").write_text(made_up(800, 2), encoding="utf-8")

    def make(vocab_size: int | None = None, **data: Any) -> Settings:
        files = {
            "source": "files",
            "train_files": [str(tmp_path / "train.txt")],
            "heldout_files": [str(tmp_path / "heldout.txt")],
            "cache_dir": str(tmp_path / "cache"),
            "tokenizer": {"vocab_size": 400},
        }
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
        model = sizes | {"sliding_window": 4, "vocab_size": vocab_size}
        return Settings.model_validate(
            {"name": "test", "model": model, "training": {"max_steps": 1}, "data": files | data}
        )

    return make
