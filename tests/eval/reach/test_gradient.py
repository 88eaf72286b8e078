"""The gradient field: cases whose energy and quantiles are known beforehand."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from eval.models import load_model
from eval.reach import gradient
from model.errors import UserError

MIX = (4.0, 0.0, 2.0, 1.0)


class LinearMixer(nn.Module):
    """Hidden state at t = sum over d of MIX[d] * embedding at t - d: the gradient's energy at d is MIX[d] squared."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)

    @property
    def base_model(self) -> nn.Module:
        return self._run

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def _run(self, inputs_embeds: Tensor, use_cache: bool) -> SimpleNamespace:
        x = inputs_embeds
        back = [nn.functional.pad(x, (0, 0, d, 0))[:, : x.shape[1]] for d in range(len(MIX))]
        return SimpleNamespace(last_hidden_state=sum(c * shifted for c, shifted in zip(MIX, back, strict=True)))


def test_energy_of_a_linear_mixer_is_the_square_of_its_weights() -> None:
    texts = torch.arange(40).reshape(4, 10) % 7
    energy = gradient.gradient_energy(LinearMixer(), texts, directions=3)
    assert energy == pytest.approx([16 / 21, 0, 4 / 21, 1 / 21, 0, 0, 0, 0, 0, 0], abs=1e-6)


def test_energy_lies_within_the_reach_and_nowhere_else(untrained_run: Path) -> None:
    examined = load_model(str(untrained_run), "cpu")
    texts = torch.randint(0, examined.tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    energy = gradient.gradient_energy(examined.model, texts)
    assert energy.sum() == pytest.approx(1.0)
    assert examined.reach == 21
    assert (energy[:22] > 0).all()
    assert (energy[22:] == 0).all()


def test_the_field_before_training_is_that_of_the_runs_own_start(untrained_run: Path) -> None:
    """The fixture's weights were drawn with seed 3, those of a new run of its settings with seed 0."""
    examined = load_model(str(untrained_run), "cpu")
    texts = torch.arange(60).reshape(2, 30)
    field = gradient.gradient_field(examined, texts)
    assert field["before"]["energy"] != field["after"]["energy"]
    same = gradient.gradient_field(replace(examined, settings={**examined.settings, "seed": 3}), texts)
    assert same["before"] == same["after"] == field["after"]


def test_the_field_before_training_is_that_of_the_pretrained_model(untrained_run: Path, tmp_path: Path) -> None:
    shutil.copytree(untrained_run, tmp_path / "run")
    model = shutil.copytree(untrained_run / "hf", tmp_path / "model")
    described = yaml.safe_load((untrained_run / "settings.yaml").read_text())
    described["model"]["init"] = {"from_pretrained": str(model)}
    (tmp_path / "run/settings.yaml").write_text(yaml.safe_dump(described))
    examined = load_model(str(tmp_path / "run"), "cpu")
    field = gradient.gradient_field(examined, torch.arange(60).reshape(2, 30))
    assert field["before"] == field["after"]  # nothing was trained
    shutil.rmtree(model)
    with pytest.raises(UserError, match=r"model.init.from_pretrained"):
        gradient.untrained(examined)


def test_quantiles_are_the_first_distance_within_which_so_much_lies() -> None:
    energy = np.array([0.5, 0.2, 0.15, 0.1, 0.03, 0.02])
    rows = gradient.energy_quantiles(energy, window=2, reach=5)
    assert [row["share"] for row in rows] == [0.5, 0.9, 0.99]
    assert [row["distance"] for row in rows] == [0, 3, 5]
    assert [row["in_windows"] for row in rows] == [0.0, 1.5, 2.5]
    assert [row["percent_of_reach"] for row in rows] == [0.0, 60.0, 100.0]
    assert gradient.energy_quantiles(energy, None, None)[1]["in_windows"] is None
