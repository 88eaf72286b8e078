"""The loss in chunks is the loss at once, in value and gradient, without its memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import training.cross_entropy
from data.tasks.question import UNSCORED
from training.cross_entropy import Lesson, Score, cross_entropy, distillation

N, E, V = 37, 8, 29


def case(n: int = N, v: int = V, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, E, generator=generator, requires_grad=True)
    weight = torch.randn(v, E, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def outcome(score: Score, hidden: Tensor, weight: Tensor, scale: float = 0.25) -> tuple[Tensor, ...]:
    """Loss, hits, the loss of each position, and both gradients, taken through a factor as training does."""
    loss, right, losses = score
    assert not losses.requires_grad
    return (loss.detach(), right, losses, *torch.autograd.grad(scale * loss, (hidden, weight)))


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(2, 40), st.integers(1, 60), st.sampled_from([0.0, 0.01]), st.integers(0, 99))
def test_chunks_of_any_size_equal_the_loss_at_once(n: int, v: int, rows: int, z_weight: float, seed: int) -> None:
    hidden, weight, labels = case(n, v, seed)
    chunks = outcome(cross_entropy(hidden, weight, labels, z_weight, rows), hidden, weight)
    whole = outcome(cross_entropy(hidden, weight, labels, z_weight, rows=n), hidden, weight)
    for a, b in zip(chunks, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [8, N + 3])
def test_labels_that_are_not_scored_change_nothing_and_get_no_gradient(rows: int) -> None:
    hidden, weight, labels = case()
    wide, unscored = torch.cat((hidden, hidden[:3])), torch.cat((labels, labels.new_full((3,), UNSCORED)))
    more = outcome(cross_entropy(wide, weight, unscored, 0.01, rows), hidden, weight)
    less = outcome(cross_entropy(hidden, weight, labels, 0.01, rows), hidden, weight)
    assert not more[1][N:].any()
    assert not more[2][N:].any()
    for a, b in zip((more[0], more[1][:N], more[2][:N], *more[3:]), less, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_let_go_of_their_gradients_once_they_are_handed_on() -> None:
    """A step holds the graph of a micro-batch while the next one is computed."""
    hidden, weight, labels = case()
    loss = cross_entropy(hidden, weight, labels, rows=8).loss
    assert [g.shape for g in loss.grad_fn.gradients] == [hidden.shape, weight.shape]
    loss.backward()
    assert loss.grad_fn.gradients is None


def test_nearly_as_many_positions_are_chunks_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed text scores a few positions less for each document, and every other shape would be compiled."""
    shapes, differentiate = set(), training.cross_entropy._differentiate

    def record(logits: Tensor, *others: Any) -> Any:
        shapes.add(logits.shape)
        return differentiate(logits, *others)

    monkeypatch.setattr(training.cross_entropy, "_differentiate_on", lambda _: record)
    for n in range(1980, 2049, 4):
        cross_entropy(*case(n), rows=1100)
    assert shapes == {(1024, V)}


def test_under_autocast_both_multiply_in_bfloat16_and_sum_in_float32() -> None:
    hidden, weight, labels = case(n=200)
    with torch.autocast("cpu", torch.bfloat16):
        chunks, whole = (cross_entropy(hidden, weight, labels, rows=rows) for rows in (64, 200))
    assert chunks[0].dtype == whole[0].dtype == torch.float32
    assert torch.equal(chunks[1], whole[1])
    torch.testing.assert_close(chunks[0], whole[0], rtol=1e-5, atol=0)
    for a, b in zip(outcome(chunks, hidden, weight)[3:], outcome(whole, hidden, weight)[3:], strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("at_most", "chunked"), [(5 * V, True), (N * V, False)])
def test_many_logits_are_never_there_at_once_and_few_are(
    monkeypatch: pytest.MonkeyPatch, at_most: int, chunked: bool
) -> None:
    monkeypatch.setattr(training.cross_entropy, "LOGITS_AT_ONCE", at_most)
    hidden, weight, labels = case()
    with Largest() as largest:
        outcome(cross_entropy(hidden, weight, labels), hidden, weight)
    assert largest.elements == (N * E if chunked else N * V)  # chunked: the gradient of the hidden states


def test_z_loss_pulls_the_normaliser_to_one_and_is_not_in_the_reported_loss() -> None:
    hidden, weight, labels = case()
    plain, *_ = cross_entropy(hidden, weight, labels)
    loss, *_ = cross_entropy(hidden, weight, labels, z_weight=0.5)
    assert torch.equal(loss, plain)
    explicit = plain + 0.5 * F.linear(hidden, weight).logsumexp(-1).square().sum()
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, explicit)), strict=True):
        torch.testing.assert_close(a, b)


# -- distillation -----------------------------------------------------------------------------------------------------


def lesson(n: int, weight: float = 0.7, temperature: float = 2.0) -> Lesson:
    """Of a teacher of another width."""
    generator = torch.Generator().manual_seed(7)
    hidden, head = torch.randn(n, 5, generator=generator), torch.randn(V, 5, generator=generator)
    return Lesson(hidden, head, weight, temperature)


def plain_divergences(hidden: Tensor, weight: Tensor, taught: Lesson) -> Tensor:
    """t^2 x KL(teacher || model) of each position, by torch's own function."""
    t = taught.temperature
    ours = (F.linear(hidden, weight) / t).log_softmax(-1)
    theirs = (F.linear(taught.hidden_nf, taught.weight_vf) / t).log_softmax(-1)
    return t**2 * F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("rows", [1, 8, N, N + 9])
@pytest.mark.parametrize("z_weight", [0.0, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_of_distillation_is_that_of_a_plain_computation(
    rows: int, z_weight: float, temperature: float
) -> None:
    hidden, weight, labels = case()
    labels[3] = UNSCORED
    taught = lesson(N, temperature=temperature)
    score, taught_score = distillation(hidden, weight, labels, taught, z_weight, rows)
    divergences = plain_divergences(hidden, weight, taught) * (labels >= 0)
    plain = cross_entropy(hidden, weight, labels, z_weight, rows=N)
    torch.testing.assert_close(score.losses, plain.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(taught_score.losses, divergences.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taught_score.loss, divergences.sum().detach())
    assert not taught_score.loss.requires_grad
    assert torch.equal(score.right, plain.right)
    alike = F.linear(hidden, weight).argmax(-1) == F.linear(taught.hidden_nf, taught.weight_vf).argmax(-1)
    assert torch.equal(taught_score.right, alike & (labels >= 0))
    ours = torch.autograd.grad(0.25 * score.loss, (hidden, weight))
    theirs = torch.autograd.grad(0.25 * (plain.loss + taught.weight * divergences.sum()), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_any_position_there_is_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = case()
    score, taught_score = distillation(hidden[:0], weight, labels[:0], lesson(0))
    assert (score.loss, taught_score.loss) == (0.0, 0.0)
    assert not any(x.any() for x in torch.autograd.grad(score.loss, (hidden, weight)))


def test_a_teacher_that_says_the_same_has_no_divergence_and_no_gradient() -> None:
    hidden, weight, labels = case()
    same = Lesson(hidden.detach(), weight.detach(), 3.0, 1.5)
    score, taught_score = distillation(hidden, weight, labels, same, rows=8)
    assert not taught_score.losses.any()
    assert taught_score.right.all()
    plain = torch.autograd.grad(cross_entropy(hidden, weight, labels, rows=8).loss, (hidden, weight))
    taught = torch.autograd.grad(score.loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, taught, strict=True))


def test_the_logits_of_model_and_teacher_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cross_entropy, "LOGITS_AT_ONCE", 10 * V)
    hidden, weight, labels = case()
    with Largest() as largest:
        outcome(distillation(hidden, weight, labels, lesson(N))[0], hidden, weight)
    assert largest.elements == N * E
