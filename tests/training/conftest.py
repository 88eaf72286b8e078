"""Real tokenizer, text and settings of the tiny run, on disk once."""

from dataclasses import dataclass

import pytest

from data.mixture import Source, open_sources, prepare_sources
from data.tokenizer import Tokenizer, prepare_tokenizer
from tests.integration import tiny_run
from training.settings.schema import Settings


@dataclass(frozen=True)
class Prepared:
    """What a run has once its data is ready."""

    settings: Settings
    tokenizer: Tokenizer
    sources: dict[str, Source]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    tiny_run.write_text(folder)
    settings = Settings.model_validate(tiny_run.settings(folder))
    tokenizer = prepare_tokenizer(settings)
    folders = prepare_sources(settings, tokenizer)
    return Prepared(settings, tokenizer, open_sources(folders, tokenizer, settings.data))
