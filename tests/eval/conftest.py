"""A run folder that was never trained: three layers, W = 8, R = 21, real tokenizer, held-out text on disk."""

from pathlib import Path

import pytest
import yaml

from data.tokenizer import prepare_tokenizer
from model import hub
from model.decoder import InitOptions, build_model
from tests.integration import tiny_run
from training.build import model_config
from training.settings import Settings


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    tiny_run.write_text(folder)
    described = tiny_run.settings(folder)
    settings = Settings.model_validate(described)
    tokenizer = prepare_tokenizer(settings)
    init = InitOptions(**settings.model.init.model_dump())
    run = folder / "run"
    hub.save_hf(build_model(model_config(settings, tokenizer.vocab_size), init, seed=3), run / "hf")
    tokenizer.save(run / "hf")
    (run / "settings.yaml").write_text(yaml.safe_dump(described))
    return run
