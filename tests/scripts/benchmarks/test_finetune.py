"""Fine-tuning beside `transformers.Trainer`: both sides must compute the same step."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.hub import save_hf
from scripts.benchmarks import finetune
from scripts.benchmarks.timing import Setup
from tests.model.tiny import tiny_model, token_ids
from training.settings.schema import LoraSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def test_both_sides_train_all_weights_alike(folder: Path) -> None:
    ids = token_ids(2, 30)
    ours = finetune.our_step(WindreachForCausalLM.from_pretrained(folder), ids, None, "fp32")
    theirs = finetune.their_step(folder, ids, None, "fp32")
    for _ in range(4):
        assert ours().item() == pytest.approx(theirs().item(), rel=1e-5)


def test_both_sides_train_as_many_adapters_from_the_same_start(folder: Path) -> None:
    ids, lora = token_ids(2, 30), LoraSettings(rank=2, alpha=4)
    decoder = WindreachForCausalLM.from_pretrained(folder)
    ours, theirs = finetune.our_step(decoder, ids, lora, "fp32"), finetune.their_step(folder, ids, lora, "fp32")
    first = ours().item()
    assert theirs().item() == pytest.approx(first, rel=1e-5)
    assert sum(p.requires_grad for p in decoder.parameters()) == 3 * 7 * 2
    for _ in range(3):
        assert ours().item() < first
        assert theirs().item() < first


def test_a_row_for_each_way_to_train(setup: Setup, folder: Path) -> None:
    with pytest.raises(UserError, match="starts from no pretrained model"):
        finetune.bench_finetune(setup)
    described = setup.settings.model_dump()
    described["model"]["init"]["from_pretrained"] = str(folder)
    described["training"]["compile"] = False
    setup = replace(setup, settings=type(setup.settings).model_validate(described))
    rows = finetune.bench_finetune(setup, rows=2, seq_len=20)
    assert [row.case.removeprefix(f"{folder}: ") for row in rows] == ["all weights, 2 x 20", "adapters, 2 x 20"]
    assert all(row.ratio for row in rows)
