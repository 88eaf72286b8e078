"""Real tokenizer, text and settings of the tiny run, on disk once."""

from dataclasses import dataclass

import pytest

from data.token_store import TokenStore, prepare_tokens
from data.tokenizer import Tokenizer, prepare_tokenizer
from tests.integration import tiny_run
from training.settings.schema import Settings


@dataclass(frozen=True)
class Prepared:
    """What a run has once its data is ready."""

    settings: Settings
    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore

    @property
    def stores(self) -> dict[str, TokenStore]:
        return {"train": self.train, "heldout": self.heldout}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    tiny_run.write_text(folder)
    settings = Settings.model_validate(tiny_run.settings(folder))
    tokenizer = prepare_tokenizer(settings)
    return Prepared(settings, tokenizer, *prepare_tokens(settings, tokenizer))
