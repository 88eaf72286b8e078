"""Which backend `auto` is, and what each is refused: tables over devices that nobody here has."""

from dataclasses import replace

import pytest
import torch

from model.attention import BACKENDS, Device, check_backend, plan_attention
from model.errors import UserError
from model.windows import LayerSpec
from tests.model.attention.oracle import H100
from tests.model.tiny import tiny_model, token_ids

ALL = frozenset({"cudnn", "triton", "xformers"})
GPUS = {name: Device("cuda", (int(name[3:-1]), int(name[-1])), ALL) for name in
        ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")}  # fmt: skip
CPU = Device("cpu", packages=ALL)
PLAIN, SINK, GLOBAL = LayerSpec("sliding", 4096), LayerSpec("full", sink=True), LayerSpec("full", global_tokens=2)


def chosen(
    spec: LayerSpec = PLAIN, head_size: int = 64, device: Device = H100, dtype: torch.dtype = torch.bfloat16
) -> str:
    return plan_attention(spec, head_size, "auto", device, dtype, True).backend


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [("sm_70", "flex"), ("sm_75", "flex"), *((name, "cudnn") for name in GPUS if name not in ("sm_70", "sm_75"))],
)
def test_auto_in_halves_by_capability(gpu: str, expected: str) -> None:
    assert chosen(device=GPUS[gpu]) == expected
    assert chosen(device=GPUS[gpu], dtype=torch.float16) == expected


@pytest.mark.parametrize(
    ("packages", "expected"),
    [({"cudnn", "triton"}, "cudnn"), ({"cudnn"}, "cudnn"), ({"triton", "xformers"}, "flex"), (set(), "flash")],
)
def test_auto_by_installed_packages(packages: set[str], expected: str) -> None:
    assert chosen(device=replace(H100, packages=frozenset(packages))) == expected


@pytest.mark.parametrize(
    ("head_size", "hopper", "ampere", "in_fp32"),
    [
        (8, "cudnn", "cudnn", "blocked"),
        (12, "blocked", "blocked", "blocked"),
        (16, "cudnn", "cudnn", "flex"),
        (20, "flex", "flex", "flex"),
        (64, "cudnn", "cudnn", "flex"),
        (128, "cudnn", "cudnn", "flex"),
        (256, "cudnn", "flex", "flex"),
    ],
)
def test_auto_by_head_size(head_size: int, hopper: str, ampere: str, in_fp32: str) -> None:
    assert chosen(head_size=head_size) == hopper
    assert chosen(head_size=head_size, device=GPUS["sm_80"]) == ampere
    assert chosen(head_size=head_size, dtype=torch.float32) == in_fp32


def test_auto_by_layer() -> None:
    assert chosen(SINK) == chosen(GLOBAL) == "flex"
    assert chosen(replace(SINK, sink=True), head_size=12) == "blocked"
    assert chosen(LayerSpec("sliding", 16), head_size=64) == chosen(LayerSpec("sliding", 64), head_size=12) == "blocked"
    assert chosen(LayerSpec("sliding", 17), head_size=64) == "cudnn"
    assert chosen(dtype=torch.float64) == "blocked"
    assert chosen(device=CPU) == chosen(device=Device("meta")) == "blocked"


@pytest.mark.parametrize("spec", [PLAIN, SINK, GLOBAL, LayerSpec("dilated", 4, 3), LayerSpec("chunked", 9)])
@pytest.mark.parametrize("head_size", [8, 12, 16, 72, 96, 192, 256, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_never_chooses_what_cannot_do_the_layer(spec: LayerSpec, head_size: int, dtype: torch.dtype) -> None:
    for gpu in GPUS.values():
        for packages in (ALL, frozenset[str]()):
            plan = plan_attention(spec, head_size, "auto", replace(gpu, packages=packages), dtype, True)
            assert plan.unable is None


def test_the_plan_says_why() -> None:
    def reason(spec: LayerSpec, backend: str = "auto", device: Device = H100) -> str:
        return plan_attention(spec, 64, backend, device, torch.bfloat16, True).reason

    assert reason(PLAIN) == "auto in bf16 on cuda (sm_90)"
    assert reason(SINK) == "auto in bf16 on cuda (sm_90); cudnn has no learned sinks"
    assert reason(PLAIN, device=replace(H100, packages=frozenset())) == (
        "auto in bf16 on cuda (sm_90); cudnn needs the package nvidia-cudnn-frontend, which is not installed; "
        "flex needs the package triton, which is not installed"
    )
    assert reason(PLAIN, device=CPU) == "auto on cpu"
    assert reason(PLAIN, "reference") == "model.attention_backend is reference"


def test_a_deterministic_run_is_served_by_what_adds_up_in_a_fixed_order() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == "cudnn"
        assert chosen(device=GPUS["sm_80"]) == "flex"
        assert chosen(device=replace(GPUS["sm_80"], packages=frozenset())) == "blocked"
    finally:
        torch.use_deterministic_algorithms(False)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(name: str, *specs: LayerSpec, head_size: int = 64, device: Device = H100, **facts: object) -> str:
    with pytest.raises(UserError) as caught:
        check_backend(name, specs, head_size, device, **facts)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_a_backend_cannot_do_is_refused_with_the_layer_and_a_remedy() -> None:
    assert refusal("flash", PLAIN, SINK) == (
        "model.attention_backend is 'flash', which has no learned sinks, but model.layers[1] asks for them; "
        "choose one of auto, reference, blocked, flex"
    )
    assert refusal("xformers", GLOBAL) == (
        "model.attention_backend is 'xformers', which has no global tokens, but model.layers[0] asks for them; "
        "choose one of auto, reference, blocked, flex"
    )
    assert refusal("fast") == (
        "model.attention_backend is 'fast'; choose one of auto, reference, blocked, cudnn, flash, flex, xformers"
    )


@pytest.mark.parametrize(
    ("name", "head_size", "device", "reason"),
    [
        ("flash", 20, H100, "needs a head size that is a multiple of 8, not 20"),
        ("flex", 8, H100, "needs a head size of at least 16, not 8"),
        ("cudnn", 256, GPUS["sm_100"], "needs a head size of at most 128, not 256"),
        ("flash", 64, CPU, "needs an NVIDIA GPU, but the device is cpu"),
        ("cudnn", 64, GPUS["sm_75"], "needs an NVIDIA GPU of compute capability 8.0 or more, but the device is cuda"),
        ("xformers", 64, replace(H100, packages=frozenset()), "needs the package xformers, which is not installed"),
    ],
)
def test_head_sizes_and_what_the_machine_lacks_are_refused(
    name: str, head_size: int, device: Device, reason: str
) -> None:
    said = refusal(name, PLAIN, head_size=head_size, device=device)
    assert said.startswith(f"model.attention_backend is {name!r}, which {reason}")
    assert "; choose one of auto, reference, blocked" in said


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "computes in fp16 and bf16, not in fp32"),
        ("flash", {"gradients": True, "deterministic": True}, "has no deterministic backward pass on cuda (sm_90)"),
        ("flex", {"device": CPU, "gradients": True}, "has no gradient on a CPU"),
    ],
)
def test_precision_and_training_are_refused(name: str, facts: dict[str, object], reason: str) -> None:
    assert f"which {reason}; choose one of auto, reference, blocked" in refusal(name, PLAIN, **facts)  # type: ignore[arg-type]


def test_deterministic_training_refuses_only_what_cannot() -> None:
    able = [name for name in BACKENDS if not BACKENDS[name].unable(PLAIN, 64, H100, torch.bfloat16, True, True)]
    assert able == ["reference", "blocked", "cudnn", "flex"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be had here")
def test_a_model_that_this_machine_cannot_run_is_not_built() -> None:
    with pytest.raises(UserError, match=r"^model\.attention_backend is 'flash', which needs an NVIDIA GPU"):
        tiny_model(attention_backend="flash")


@pytest.mark.parametrize("spec", [{"kind": "chunked", "window": 4}, {"window": 4, "global_tokens": 2}])
def test_rows_that_do_not_begin_at_0_are_refused_where_the_beginning_counts(spec: dict[str, object]) -> None:
    message = r"^position_ids must start at 0 for chunked layers and global tokens, unless a cache is used$"
    with pytest.raises(UserError, match=message):
        tiny_model([spec] * 2)(token_ids(1, 12), position_ids=torch.arange(3, 15)[None])
