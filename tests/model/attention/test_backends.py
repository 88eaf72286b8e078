"""Every backend gives what the oracle gives, or is refused with the reason."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from model.attention import plan
from model.attention.plan import BACKENDS, check_backend, plan_attention
from model.attention.varlen import Segments, Varlen, find_segments
from model.errors import UserError
from model.packing import Packing, may_see
from model.windows import LayerSpec
from tests.model.attention.oracle import HEADS, attend, close, draw_qkv, forget_plans, oracle, packings, whole
from tests.model.tiny import tiny_model, token_ids


@st.composite
def layers(draw: st.DrawFn, sinks: bool = True, global_tokens: bool = True) -> LayerSpec:
    kind = draw(st.sampled_from(["sliding", "full", "chunked", "dilated"]))
    return LayerSpec(
        kind,
        window=None if kind == "full" else draw(st.one_of(st.just(1), st.integers(2, 40))),
        dilation=draw(st.integers(2, 5)) if kind == "dilated" else 1,
        global_tokens=draw(st.integers(0, 5)) if global_tokens else 0,
        sink=draw(st.booleans()) if sinks else False,
    )


# -- flex --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data(), layers(), st.integers(1, 100), st.sampled_from([1, 2, 4]), st.integers(1, 2))
def test_flex_equals_reference_whatever_the_layer(
    data: st.DataObject, spec: LayerSpec, total: int, groups: int, batch: int
) -> None:
    packing = data.draw(packings(batch, total))
    q, k, v, sinks = (x.detach().float() for x in draw_qkv(batch, groups, total, seed=total))
    chosen = sinks if spec.sink else None
    with pytest.MonkeyPatch.context() as patch:  # a compilation for each shape would take hours
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        actual = attend(q, k, v, spec, packing, "flex", chosen)
    torch.testing.assert_close(actual, oracle(q, k, v, spec, packing, chosen), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", [LayerSpec("sliding", 20), LayerSpec("chunked", 20, global_tokens=2, sink=True)])
def test_flex_as_it_runs_here_equals_reference_forward(spec: LayerSpec) -> None:
    packing = whole(200)
    q, k, v, sinks = (x.detach().float() for x in draw_qkv(2, 2, 200, seed=1))
    q, k, v = (torch.cat((x, x), -1) for x in (q, k, v))
    chosen = sinks if spec.sink else None
    actual = attend(q, k, v, spec, packing, "flex", chosen)
    torch.testing.assert_close(actual, oracle(q, k, v, spec, packing, chosen), atol=1e-5, rtol=1e-4)


def test_a_model_on_flex_gives_the_logits_of_the_reference() -> None:
    pattern = [{"window": 5}, {"kind": "full"}]
    ids = token_ids(1, 40)
    with torch.no_grad():
        logits = [tiny_model(pattern, attention_backend=b, head_dim=16)(ids).logits for b in ("reference", "flex")]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)


def test_training_with_flex_on_a_cpu_is_refused() -> None:
    message = (
        r"^model\.attention_backend is 'flex', and FlexAttention has no gradient on a CPU; train with auto or blocked$"
    )
    with pytest.raises(UserError, match=message):
        tiny_model(attention_backend="flex", head_dim=16)(token_ids(1, 12))


# -- kernels for segments ----------------------------------------------------------------------------------------------


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None) -> Tensor:
    """What flash attention and xFormers compute, segment by segment, with the oracle."""
    spec = LayerSpec("full") if window is None else LayerSpec("sliding", window)
    outs = []
    for first, end in zip(segments.borders[:-1].tolist(), segments.borders[1:].tolist(), strict=True):
        packing = whole(end - first)
        one = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
        outs.append(oracle(*one, spec, packing)[0].transpose(0, 1))
    assert segments.longest == max(len(out) for out in outs)
    return torch.cat(outs)


@settings(deadline=None, max_examples=60)
@given(st.data(), layers(sinks=False, global_tokens=False), st.integers(1, 100), st.sampled_from([1, 2, 4]))
def test_segments_are_what_a_layer_sees_forward_and_backward(
    data: st.DataObject, spec: LayerSpec, total: int, groups: int
) -> None:
    packing = data.draw(packings(2, total))
    q, k, v, _ = draw_qkv(2, groups, total, seed=total)
    expected = oracle(q, k, v, spec, packing, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan._VARLEN_KERNELS, "flash", dense_kernel)
        actual = attend(q, k, v, spec, packing, "flash", None)
    close(actual, expected, [q, k, v])


def test_padding_inside_a_document_is_refused_by_kernels_that_leave_it_out() -> None:
    packing = Packing(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, -1, 0]]))
    with pytest.raises(UserError, match=r"^this attention backend can't leave out padding inside a document; use auto"):
        find_segments(LayerSpec("full"), packing, 1)


def test_rows_of_padding_alone_give_zeros() -> None:
    packing = Packing(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -1))
    q = torch.randn(2, HEADS, 3, 8)
    assert not Varlen.of(LayerSpec("full"), packing, 2, dense_kernel)(q, q, q).any()


# -- where they are ----------------------------------------------------------------------------------------------------


def test_xformers_counts_the_window_as_we_do() -> None:
    pytest.importorskip("xformers", reason="the package xformers is not installed")
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    bias = BlockDiagonalCausalMask.from_seqlens([5, 3]).make_local_attention(3)
    documents = torch.tensor([[0] * 5 + [1] * 3])
    packing = Packing(torch.tensor([[*range(5), *range(3)]]), documents)
    assert torch.equal(bias.materialize((1, 8, 8))[0] == 0, may_see(LayerSpec("sliding", 3), packing, packing)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@settings(deadline=None, max_examples=20)
@given(data=st.data(), total=st.integers(1, 300), groups=st.sampled_from([1, 2, 4]))
def test_on_cuda_forward_and_gradients_equal_the_reference(
    backend: str, data: st.DataObject, total: int, groups: int
) -> None:
    if reason := BACKENDS[backend].missing():
        pytest.skip(f"{backend} {reason}")
    able = BACKENDS[backend]
    spec = data.draw(layers(able.sinks, able.global_tokens))
    packing = data.draw(packings(2, total))
    packing = Packing(packing.positions.cuda(), None if packing.documents is None else packing.documents.cuda())
    drawn = [x.detach().repeat(*[1] * (x.ndim - 1), 4 if x.ndim == 4 else 1) for x in draw_qkv(2, groups, total, 1)]
    q, k, v, sinks = (x.cuda().bfloat16().requires_grad_() for x in drawn)
    chosen = sinks if spec.sink else None
    inputs = [q, k, v, *([sinks] if spec.sink else [])]
    actual = attend(q, k, v, spec, packing, backend, chosen)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = oracle(exact[0], exact[1], exact[2], spec, packing, exact[3] if spec.sink else None)
    torch.testing.assert_close(actual.float(), expected, atol=3e-2, rtol=3e-2)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(actual, inputs, upstream.bfloat16())
    for ours, theirs in zip(got, torch.autograd.grad(expected, exact, upstream), strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=1e-1, rtol=5e-2)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_auto_takes_what_can_do_the_layer_on_the_device_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_plans()

    def chosen(device: str, spec: LayerSpec, head_size: int, backend: str = "auto") -> tuple[str, str]:
        made = plan_attention(spec, head_size, backend, device, torch.bfloat16, True)
        return made.backend, made.reason

    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: object())
    layer = LayerSpec("sliding", 64)
    assert chosen("cpu", layer, 64) == ("blocked", "auto on cpu")
    assert chosen("cuda", layer, 64) == ("flex", "auto on cuda")
    assert chosen("cuda", layer, 12) == ("blocked", "auto on cuda: flex needs a head size of at least 16, not 12")
    assert chosen("cpu", layer, 64, "reference") == ("reference", "model.attention_backend is reference")


def refusal(name: str, *specs: LayerSpec, head_dim: int = 64) -> str:
    with pytest.raises(UserError) as caught:
        check_backend(name, specs, head_dim)
    return str(caught.value)


def test_what_a_backend_cannot_do_is_refused_with_the_layer_and_a_remedy() -> None:
    plain, sink, far = LayerSpec("sliding", 4), LayerSpec("sliding", 4, sink=True), LayerSpec("full", global_tokens=2)
    assert refusal("flash", plain, sink) == (
        "model.attention_backend is 'flash', which has no learned sinks, but model.layers[1] asks for them; "
        "choose one of auto, reference, blocked, flex"
    )
    assert refusal("xformers", far) == (
        "model.attention_backend is 'xformers', which has no global tokens, but model.layers[0] asks for them; "
        "choose one of auto, reference, blocked, flex"
    )
    assert refusal("flash", plain, head_dim=20).startswith(
        "model.attention_backend is 'flash', which needs a head size that is a multiple of 8, not 20; choose one of"
    )
    assert refusal("flex", plain, head_dim=8) == (
        "model.attention_backend is 'flex', which needs a head size of at least 16, not 8; "
        "choose one of auto, reference, blocked"
    )
    assert refusal("fast") == (
        "model.attention_backend is 'fast'; choose one of auto, reference, blocked, flex, flash, xformers"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be had here")
def test_what_the_machine_lacks_is_refused_with_the_reason() -> None:
    assert refusal("flash", LayerSpec("full")) == (
        "model.attention_backend is 'flash', which needs an NVIDIA GPU, and this machine has none; "
        "choose one of auto, reference, blocked, flex"
    )
    assert "'xformers', which needs " in refusal("xformers", LayerSpec("full"))
    with pytest.raises(UserError, match=r"^model\.attention_backend is 'flash', which needs an NVIDIA GPU"):
        tiny_model(attention_backend="flash")


@pytest.mark.parametrize("spec", [{"kind": "chunked", "window": 4}, {"window": 4, "global_tokens": 2}])
def test_rows_that_do_not_begin_at_0_are_refused_where_the_beginning_counts(spec: dict[str, object]) -> None:
    message = r"^position_ids must start at 0 for chunked layers and global tokens, unless a cache is used$"
    with pytest.raises(UserError, match=message):
        tiny_model([spec] * 2)(token_ids(1, 12), position_ids=torch.arange(3, 15)[None])
