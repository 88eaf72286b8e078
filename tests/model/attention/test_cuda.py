"""On a GPU: every backend against the oracle on the same device, without waiting for it, and in a captured graph."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import BACKENDS, Device, plan_attention
from model.attention.reference import attend_dense
from model.packing import Packing, may_see
from model.windows import LayerSpec

pytestmark = pytest.mark.cuda

T, HEADS, GROUPS, HEAD_SIZE = 300, 4, 2, 64
LAYERS = [
    LayerSpec("sliding", 127),
    LayerSpec("sliding", 128),
    LayerSpec("sliding", 129),
    LayerSpec("sliding", 1),
    LayerSpec("full"),
    LayerSpec("chunked", 40),
    LayerSpec("dilated", 9, dilation=3),
    LayerSpec("sliding", 20, sink=True),
    LayerSpec("full", sink=True),
    LayerSpec("sliding", 20, global_tokens=3, sink=True),
]
DOCUMENTS = {
    "packed": [[1] * 200 + [2] * 1 + [3] * 99, [1] * 300],
    "padded": [[-1] * 30 + [1] * 170 + [2] * 100, [1] * 140 + [-1] * 160],
}


def packing_of(name: str, facts: bool = True) -> Packing:
    if name == "whole":
        return Packing.of_whole_rows(T, torch.device("cuda"))
    packing = Packing.of_documents(torch.tensor(DOCUMENTS[name]))
    return (packing if facts else replace(packing, padded=True, spans=None)).to(torch.device("cuda"))


def inputs(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (2, T, HEADS, HEAD_SIZE), (2, T, GROUPS, HEAD_SIZE), (2, T, GROUPS, HEAD_SIZE), (HEADS,)
    drawn = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]
    return [(x.transpose(1, 2) if x.ndim == 4 else x).requires_grad_() for x in drawn]


def run(backend: str, spec: LayerSpec, packing: Packing, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output, and the gradients of everything that takes part."""
    plan = plan_attention(spec, HEAD_SIZE, backend, "cuda", tensors[0].dtype, True)
    used = tensors if spec.sink else tensors[:3]
    out = plan.prepare(packing, 2)(*tensors[:3], tensors[3] if spec.sink else None)
    return [out, *torch.autograd.grad(out, used, upstream.to(out.dtype))]


def oracle(spec: LayerSpec, packing: Packing, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    exact = [x.detach().float().requires_grad_() for x in tensors]
    used = exact if spec.sink else exact[:3]
    out = attend_dense(*exact[:3], may_see(spec, packing, packing), exact[3] if spec.sink else None)
    return [out, *torch.autograd.grad(out, used, upstream)]


def skip_if_unable(backend: str, spec: LayerSpec, dtype: torch.dtype, deterministic: bool = False) -> None:
    reason = BACKENDS[backend].unable(spec, HEAD_SIZE, Device.here("cuda"), dtype, True, deterministic)
    if reason:
        pytest.skip(f"{backend} {reason}")


CASES = [
    (torch.bfloat16, name, facts) for name, facts in (("whole", True), ("packed", False), ("padded", True))
] + [(torch.float32, "padded", True)]  # fmt: skip


@pytest.mark.parametrize("spec", LAYERS, ids=str)
@pytest.mark.parametrize(("dtype", "rows", "facts"), CASES)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_forward_and_gradients_equal_the_oracle(
    backend: str, dtype: torch.dtype, rows: str, facts: bool, spec: LayerSpec
) -> None:
    if backend != "auto":
        skip_if_unable(backend, spec, dtype)
    packing, tensors = packing_of(rows, facts), inputs(dtype)
    upstream = torch.randn(2, HEADS, T, HEAD_SIZE, device="cuda")
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for ours, exact in zip(
        run(backend, spec, packing, tensors, upstream), oracle(spec, packing, tensors, upstream), strict=True
    ):
        size = torch.maximum(exact.norm(), upstream.norm() / 10)  # with W = 1 the gradients of queries and keys are 0
        assert (ours.float() - exact).norm() / size < tolerance


@pytest.mark.parametrize("spec", [LAYERS[1], LAYERS[4], LAYERS[5], LAYERS[6]], ids=str)
@pytest.mark.parametrize("rows", ["whole", "packed", "padded"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "xformers"])
def test_the_host_does_not_wait_for_a_batch_that_it_knows(backend: str, rows: str, spec: LayerSpec) -> None:
    skip_if_unable(backend, spec, torch.bfloat16)
    packing, tensors = packing_of(rows), inputs(torch.bfloat16)
    upstream = torch.randn(2, HEADS, T, HEAD_SIZE, device="cuda")
    run(backend, spec, packing, tensors, upstream)  # compiles, and makes plans
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, spec, packing, tensors, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec", [LAYERS[1], LAYERS[4], LAYERS[5], LAYERS[7]], ids=str)
@pytest.mark.parametrize("backend", ["blocked", "flex", "cudnn"])
def test_a_captured_graph_serves_other_documents(backend: str, spec: LayerSpec) -> None:
    skip_if_unable(backend, spec, torch.bfloat16)
    packing, tensors = replace(packing_of("packed"), padded=True, spans=16), inputs(torch.bfloat16)
    upstream = torch.randn(2, HEADS, T, HEAD_SIZE, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(backend, spec, packing, tensors, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, spec, packing, tensors, upstream)
    other = packing_of("padded")
    assert packing.documents is not None
    assert other.documents is not None
    packing.positions.copy_(other.positions)
    packing.documents.copy_(other.documents)
    graph.replay()
    for ours, exact in zip(captured, oracle(spec, other, tensors, upstream), strict=True):
        assert (ours.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("spec", [LAYERS[1], LAYERS[4], LAYERS[7]], ids=str)
@pytest.mark.parametrize("rows", ["whole", "padded"])
@pytest.mark.parametrize("backend", ["blocked", "cudnn", "flex"])
def test_what_promises_the_same_bits_gives_them(
    monkeypatch: pytest.MonkeyPatch, backend: str, rows: str, spec: LayerSpec
) -> None:
    skip_if_unable(backend, spec, torch.bfloat16, deterministic=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    packing, tensors = packing_of(rows), inputs(torch.bfloat16)
    upstream = torch.randn(2, HEADS, T, HEAD_SIZE, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(backend, spec, packing, tensors, upstream) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
