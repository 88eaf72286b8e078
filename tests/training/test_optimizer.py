import pytest
import torch
from torch import nn

from model.decoder import WindreachForCausalLM
from model.projections import FUSED, row_sizes
from tests.model.tiny import tiny_model, token_ids
from tests.training.updates import update
from training.muon import orthogonalise
from training.optimizer import SummedOptimizer, decayed
from training.settings.schema import OptimizerSettings

SETTINGS = OptimizerSettings(lr=0.01, weight_decay=0.1, max_grad_norm=1.0)


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model: nn.Module, scale: float, seed: int) -> torch.Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return scale * model(x).square().mean()


def steps(model: nn.Module, optimizer: SummedOptimizer, scales: dict[str, float], first: int, last: int) -> None:
    for step in range(first, last):
        for number, (name, scale) in enumerate(scales.items()):
            loss(model, scale, 100 * step + number).backward()
            optimizer.take(name, 1.0)
        update(optimizer, 0.01, dict.fromkeys(scales, 1.0))


def test_one_objective_is_torch_adamw_with_clipping() -> None:
    ours, theirs = small_model(), small_model()
    optimizer = SummedOptimizer(ours.named_parameters(), ["text"], SETTINGS)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for step in range(5):
        loss(ours, 50.0, step).backward()
        optimizer.take("text", 1.0)
        update(optimizer, 0.01, {"text": 1.0})
        loss(theirs, 50.0, step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_objective_with_huge_gradients_does_not_shrink_the_update_of_another() -> None:
    """Adam's direction for `text` is the same whatever the scale of `recall`."""
    moved = []
    for scale in (1.0, 1000.0):
        model = small_model()
        optimizer = SummedOptimizer(model.named_parameters(), ["text", "recall"], SETTINGS)
        loss(model, 1.0, 0).backward()
        optimizer.take("text", 1.0)
        loss(model, scale, 1).backward()
        optimizer.take("recall", 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        update(optimizer, 0.01, {"text": 1.0, "recall": 0.0})
        moved.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    for a, b in zip(*moved, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 1e-4


def test_updates_are_the_weighted_sum_and_decay_does_not_depend_on_the_number_of_objectives() -> None:
    one, two = small_model(), small_model()
    single = SummedOptimizer(one.named_parameters(), ["text"], SETTINGS)
    double = SummedOptimizer(two.named_parameters(), ["text", "recall"], SETTINGS)
    loss(one, 1.0, 0).backward()
    single.take("text", 1.0)
    update(single, 0.01, {"text": 1.0})
    for name in ("text", "recall"):
        loss(two, 1.0, 0).backward()
        double.take(name, 1.0)
    update(double, 0.01, {"text": 0.25, "recall": 0.75})
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # second order in rate * decay


def test_a_step_without_objectives_changes_nothing() -> None:
    """Both weights may be 0 for a while."""
    model, untouched = small_model(), small_model()
    update(SummedOptimizer(model.named_parameters(), ["text"], SETTINGS), 0.01, {})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))


@pytest.mark.cuda
def test_parameters_that_are_offloaded_to_the_cpu_are_updated_with_rates_on_the_gpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = small_model()
        optimizer = SummedOptimizer(model.named_parameters(), ["text"], SETTINGS)
        loss(model, 1.0, 0).backward()
        optimizer.take("text", 1.0)
        rate, weight, finite = (torch.tensor(x, device=device) for x in (0.01, 1.0, True))
        optimizer.step(rate, {"text": weight}, finite)
        results.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_take_returns_the_norm_before_clipping_and_clears_the_gradients() -> None:
    model = small_model()
    optimizer = SummedOptimizer(model.named_parameters(), ["text"], SETTINGS)
    loss(model, 1000.0, 0).backward()
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert optimizer.take("text", 1.0).item() == pytest.approx(expected.item())
    assert all(p.grad is None for p in model.parameters())


def test_restored_moments_continue_bit_for_bit() -> None:
    scales = {"text": 1.0, "recall": 30.0}
    whole, halves = small_model(), small_model()
    steps(whole, SummedOptimizer(whole.named_parameters(), scales, SETTINGS), scales, 0, 6)
    first = SummedOptimizer(halves.named_parameters(), scales, SETTINGS)
    steps(halves, first, scales, 0, 3)
    second = SummedOptimizer(halves.named_parameters(), scales, SETTINGS)
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    steps(halves, second, scales, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


class Stack(nn.Module):
    """Two layers of one shape under the names of the decoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})
        self.lm_head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.decoder["layers"]:
            x = layer(x).tanh()
        return self.lm_head(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_orthogonalises_the_matrices_of_the_layers_and_leaves_the_rest_to_adamw(dtype: torch.dtype) -> None:
    muon, both = OptimizerSettings(kind="muon", lr=0.01, weight_decay=0.1), {"text": 1.0, "recall": 1.0}
    model, twin = Stack(), Stack()
    optimizer = SummedOptimizer(model.named_parameters(), ["text"], muon, dtype)
    steps(model, optimizer, {"text": 1.0}, 0, 3)
    matrices = [p for n, p in twin.named_parameters() if "layers" in n and p.ndim == 2]
    rest = [p for n, p in twin.named_parameters() if "layers" not in n or p.ndim < 2]
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p], "weight_decay": 0.1 if p.ndim == 2 else 0.0} for p in rest], lr=0.01, betas=(0.9, 0.98)
        ),
    ]
    for step in range(3):
        loss(twin, 1.0, 100 * step).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for each in theirs:
            each.step()
            each.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # theirs is in bfloat16; one step is 4e-3
    whole, halves = Stack(), Stack()
    steps(whole, SummedOptimizer(whole.named_parameters(), both, muon), both, 0, 4)
    first = SummedOptimizer(halves.named_parameters(), both, muon)
    steps(halves, first, both, 0, 2)
    second = SummedOptimizer(halves.named_parameters(), both, muon)
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    steps(halves, second, both, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_orthogonalising_keeps_the_precision_it_is_given() -> None:
    matrices = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    exact, rough = orthogonalise(matrices), orthogonalise(matrices.bfloat16())
    assert (exact.dtype, rough.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.03)
    assert not torch.equal(rough.float(), exact)


def test_matrices_decay_and_norms_embeddings_and_sinks_do_not() -> None:
    model = tiny_model([{"window": 5, "sink": True}], qk_norm=True)
    names = {name for name, p in model.named_parameters() if decayed(name, p)}
    matrices = ("self_attn.qkv_weight", "self_attn.o_proj.weight", "mlp.gate_up_weight", "mlp.down_proj.weight")
    assert names == {f"model.layers.0.{m}" for m in matrices} | {"lm_head.weight"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SummedOptimizer(model.named_parameters(), ["text"], SETTINGS)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.take("text", 1.0)
    update(optimizer, 0.5, {"text": 1.0})
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in names else 1.0))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone_and_the_next_step_goes_on(kind: str) -> None:
    settings = OptimizerSettings(kind=kind, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]
    model, twin = Stack(), Stack()
    ours, theirs = (SummedOptimizer(m.named_parameters(), ["text"], settings) for m in (model, twin))
    for step in range(4):
        if step == 2:
            before = {name: t.clone() for name, t in (model.state_dict() | ours.state_tensors()).items()}
            loss(model, float("nan"), 0).backward()
            norm = ours.take("text", 1.0)
            update(ours, 0.01, {"text": 1.0}, finite=bool(norm.isfinite()))
            after = model.state_dict() | ours.state_tensors()
            assert before.keys() == after.keys()
            assert all(torch.equal(after[name], t) for name, t in before.items())
        for m, optimizer in ((model, ours), (twin, theirs)):
            loss(m, 1.0, step).backward()
            optimizer.take("text", 1.0)
            update(optimizer, 0.01, {"text": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def joined(kind: str) -> tuple[WindreachForCausalLM, SummedOptimizer]:
    model = tiny_model()
    settings = OptimizerSettings(kind=kind, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]
    return model, SummedOptimizer(model.named_parameters(), ["text"], settings, torch.float32, row_sizes(model))


def decoder_steps(model: WindreachForCausalLM, optimizer: SummedOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        ids = token_ids(2, 17, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.take("text", 1.0)
        update(optimizer, 0.01, {"text": 1.0})


def test_muon_orthogonalises_each_projection_of_a_joined_parameter_alone() -> None:
    model, optimizer = joined("muon")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = token_ids(2, 17)
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[1].self_attn
    gradient = layer.qkv_weight.grad.clone()
    optimizer.take("text", 1e9)
    update(optimizer, 0.01, {"text": 1.0})
    rows = dict(zip(("q_proj", "k_proj", "v_proj"), gradient.split(layer.fused_sizes), strict=True))
    for name, part in rows.items():
        key = f"model.layers.1.self_attn.{name}.weight"
        alone = nn.Parameter(before[key].clone())
        alone.grad = part.clone()
        torch.optim.Muon([alone], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        torch.testing.assert_close(model.state_dict()[key], alone.detach(), atol=2e-4, rtol=0.02)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_of_single_projections_as_the_first_version_saved_them_continue_bit_for_bit(kind: str) -> None:
    (whole, of_whole), (halves, first) = joined(kind), joined(kind)
    decoder_steps(whole, of_whole, 0, 6)
    decoder_steps(halves, first, 0, 3)
    saved = {}
    for key, tensor in first.state_tensors().items():
        stem, _, parameter = key.rpartition(".")
        names = FUSED.get(parameter, ())
        sizes = row_sizes(halves)[key.rpartition("/")[2]] if names else ()
        parts = tensor.split(sizes) if names and tensor.ndim else [tensor] * len(names)
        saved |= {f"{stem}.{n}.weight": part.clone() for n, part in zip(names, parts, strict=True)} or {key: tensor}
    assert any("q_proj" in name for name in saved)
    second = SummedOptimizer(
        halves.named_parameters(), ["text"], OptimizerSettings(kind=kind, lr=0.01, weight_decay=0.1), torch.float32,
        row_sizes(halves),
    )  # type: ignore[arg-type]  # fmt: skip
    second.load_state_tensors(saved)
    decoder_steps(halves, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
