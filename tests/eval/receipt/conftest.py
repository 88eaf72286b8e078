"""The model before `untrained_run` got its windows: the same weights with full attention, and the same tokenizer."""

from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from model import hub
from model.decoder import WindreachForCausalLM, build_model


@pytest.fixture(scope="session")
def before(untrained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before") / "before"
    windowed = WindreachForCausalLM.from_pretrained(untrained_run / "hf")
    fields = windowed.config.to_dict() | {"layers": [{"kind": "full"}] * 3, "sliding_window": None}
    full = build_model(type(windowed.config)(**fields))
    full.load_state_dict(windowed.state_dict())
    hub.save_hf(full, folder, tokenizer=load_tokenizer(untrained_run / "hf"))
    return folder
