"""A run folder that was never trained: three layers, W = 8, R = 21, real tokenizer, held-out text on disk."""

from pathlib import Path

import pytest
import yaml

from data.mixture import open_sources, prepare_sources
from data.tokenizer import prepare_tokenizer
from model import hub
from model.decoder import build_model
from tests.integration import tiny_run
from training.run.checkpoint import write_json
from training.run.folder import data_hashes
from training.settings.build import init_options, model_config
from training.settings.schema import Settings


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    tiny_run.write_text(folder)
    described = tiny_run.settings(folder)
    settings = Settings.model_validate(described)
    tokenizer = prepare_tokenizer(settings)
    run = folder / "run"
    model = build_model(model_config(settings, tokenizer.vocab_size), init_options(settings), seed=3)
    hub.save_hf(model, run / "hf")
    tokenizer.save(run / "hf")
    sources = open_sources(prepare_sources(settings, tokenizer), tokenizer, settings.data)
    write_json(run / "run.json", {"data_sha256": data_hashes(sources), "tokenizer_sha256": tokenizer.sha256})
    (run / "settings.yaml").write_text(yaml.safe_dump(described))
    return run
