"""Alpha: shares of the residual stream that are known beforehand, and what is predicted from them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from eval.models import Examined, load_model
from eval.reach import theory
from model.windows import LayerSpec


class Scaled(nn.Module):
    """In the place of attention: writes `factor` times what it is given."""

    def __init__(self, factor: float, in_tuple: bool) -> None:
        super().__init__()
        self.factor, self.in_tuple = factor, in_tuple

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        return (self.factor * x, None) if self.in_tuple else self.factor * x


class Layer(nn.Module):
    def __init__(self, factor: float, in_tuple: bool) -> None:
        super().__init__()
        self.self_attn = Scaled(factor, in_tuple)

    def forward(self, hidden_states: Tensor) -> Tensor:
        written = self.self_attn(hidden_states)
        return hidden_states + (written[0] if isinstance(written, tuple) else written)


class Stack(nn.Module):
    def __init__(self, factors: list[float], in_tuple: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(Layer(factor, in_tuple) for factor in factors)

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Tensor:
        x = self.embedding(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x) if i % 2 else layer(hidden_states=x)
        return x


def examined(model: nn.Module, specs: list[LayerSpec]) -> Examined:
    return Examined("made", model, SimpleNamespace(vocab_size=7), tuple(specs), None, None)


@pytest.mark.parametrize("in_tuple", [False, True])
def test_alpha_is_the_streams_share_of_stream_and_what_attention_writes(in_tuple: bool) -> None:
    model = Stack([3.0, 1.0, 0.0, 0.25], in_tuple)
    shares = theory.residual_shares(examined(model, [LayerSpec("sliding", 4)] * 4), torch.arange(6).reshape(2, 3))
    assert shares == pytest.approx([0.25, 0.5, 1.0, 0.8])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_alpha_of_a_model_that_hides_its_attention_is_not_known() -> None:
    hidden = nn.Sequential(nn.Embedding(7, 5))
    hidden.forward = lambda input_ids, **_: hidden[0](input_ids)  # type: ignore[method-assign]
    assert (
        theory.residual_shares(examined(hidden, [LayerSpec("sliding", 4)]), torch.zeros(1, 3, dtype=torch.long)) == []
    )


def test_predictions_are_those_of_the_theory_at_the_measured_alpha(untrained_run: Path) -> None:
    model = load_model(str(untrained_run), "cpu")
    said = theory.predictions(model, [0.5, 0.7, 0.9])
    assert said["xiao_bound"] == pytest.approx(theory.xiao_bound(8, 0.7))
    influence = theory.mixture([8] * 3, [0.5, 0.7, 0.9], 22)
    assert said["mixture_mean"] == pytest.approx((0.5 + 0.3 + 0.1) * 3.5)
    assert said["mixture"] == pytest.approx(list(influence), rel=1e-3)
    assert sum(said["mixture"]) == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_predicted_for_a_reach_without_bound_or_an_alpha_that_is_not_known(untrained_run: Path) -> None:
    model = load_model(str(untrained_run), "cpu")
    assert theory.predictions(model, []) == {}
    unbounded = replace(model, specs=(LayerSpec("full"), *model.specs[1:]))
    assert theory.predictions(unbounded, [0.5, 0.7, 0.9]) == {}
