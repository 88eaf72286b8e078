"""Every backend gives what the oracle gives. Kernels of a GPU are replaced by the oracle."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from model.attention import Attend, cudnn, flex, plan, varlen
from model.attention.plan import plan_attention
from model.attention.varlen import Segments, find_segments
from model.errors import UserError
from model.packing import Packing, may_see
from model.windows import LayerSpec
from tests.model.attention.oracle import H100, HEADS, attend, close, draw_qkv, oracle, packed, packings, whole
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


def on_h100(spec: LayerSpec, packing: Packing, backend: str, batch: int = 2) -> Attend:
    """What training in bf16 on an H100 prepares."""
    return plan_attention(spec, 64, backend, H100, torch.bfloat16, True).prepare(packing, batch)


# -- flex --------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), layers(), st.integers(1, 100), st.sampled_from([1, 2, 4]), st.integers(1, 2))
def test_flex_equals_reference_whatever_the_layer(
    data: st.DataObject, spec: LayerSpec, total: int, groups: int, batch: int
) -> None:
    packing = data.draw(packings(batch, total))
    q, k, v, sinks = (x.detach().float() for x in draw_qkv(batch, groups, total, seed=total))
    chosen = sinks if spec.sink else None
    with pytest.MonkeyPatch.context() as patch:  # a compilation for each shape would take hours
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        actual = on_h100(spec, packing, "flex", batch)(q, k, v, chosen)
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
    message = r"^model\.attention_backend is 'flex', which has no gradient on a CPU; choose auto or blocked$"
    with pytest.raises(UserError, match=message):
        tiny_model(attention_backend="flex", head_dim=16)(token_ids(1, 12))


@settings(max_examples=60)
@given(st.data(), layers(sinks=False), st.integers(1, 90), st.sampled_from([1, 4, 16]))
def test_blocks_that_somebody_sees_are_scored_and_only_those_that_all_see_are_not_masked(
    data: st.DataObject, spec: LayerSpec, total: int, side: int
) -> None:
    packing = data.draw(packings(2, total))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "SIDE", side)
        packing = flex._pad(packing, -total % side)
        partial, full = flex._blocks_seen(spec, packing)
    blocks = may_see(spec, packing, packing)
    blocks = blocks.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3).flatten(3)[:, None]
    assert not (blocks.any(-1) & ~partial & ~full).any()
    assert not (full & ~blocks.all(-1)).any()
    assert not (full & partial).any()


def test_blocks_are_as_few_as_the_window_needs() -> None:
    long_documents = Packing(*(x[None] for x in packed([3000, 2000, 500], 100, 8192)))
    for packing in (whole(8192), long_documents):
        partial, full = flex._blocks_seen(LayerSpec("sliding", 1024), packing)
        assert (partial | full).sum(-1).max() <= 1024 // 128 + 1
        assert full.sum() > (6 if packing.whole else 4) * 64


def test_flex_compiles_itself_under_a_layer_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(flex, "_compiled", lambda q, k, v, **options: calls.append(q) or q)
    x = torch.empty(1, HEADS, 200, 16, device="meta")
    packing = Packing.of_whole_rows(200, torch.device("meta"))
    with torch.compiler.set_stance("force_eager"):
        flex.Flex.of(LayerSpec("sliding", 20), packing)(x, x, x)
    assert len(calls) == 1


# -- kernels for segments ----------------------------------------------------------------------------------------------


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None) -> Tensor:
    """What flash attention and others compute, segment by segment, with the oracle."""
    spec = LayerSpec("full") if window is None else LayerSpec("sliding", window)
    outs = []
    borders = segments.borders.tolist()
    assert borders[-1] == len(q)
    for first, end in itertools.pairwise(borders):
        assert end - first <= segments.longest
        if first < end:
            one = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
            outs.append(oracle(*one, spec, whole(end - first))[0].transpose(0, 1))
    return torch.cat(outs)


def dense_operator(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
    """What cuDNN's operator computes. Its window counts the current token, and -1 means none."""
    assert options["is_causal"]
    assert options["return_lse"]
    window = None if options["window_left"] < 0 else options["window_left"]
    if q.ndim == 3:
        segments = Segments(options["cu_seqlens_q"], options["max_seqlen_q"], None)
        return dense_kernel(q, k, v, segments, window), q
    spec = LayerSpec("full") if window is None else LayerSpec("sliding", window)
    return oracle(q, k, v, spec, whole(q.shape[2])), q


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle in place of the kernels of flash attention and of cuDNN."""
    monkeypatch.setitem(plan._VARLEN_KERNELS, "flash", lambda: dense_kernel)
    monkeypatch.setattr(cudnn, "_register", lambda: None)
    monkeypatch.setattr(torch.ops, "cudnn", SimpleNamespace(sdpa_fwd=dense_operator), raising=False)


def with_facts(packing: Packing) -> Packing:
    """The packing as training makes it."""
    return packing if packing.documents is None else Packing.of_documents(packing.documents)


@pytest.mark.usefixtures("kernels")
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.data(), st.sampled_from(["flash", "cudnn"]), layers(sinks=False, global_tokens=False), st.integers(1, 100),
    st.sampled_from([1, 2, 4]), st.booleans(),
)  # fmt: skip
def test_segments_are_what_a_layer_sees_forward_and_backward(
    data: st.DataObject, backend: str, spec: LayerSpec, total: int, groups: int, facts: bool
) -> None:
    packing = data.draw(packings(2, total))
    packing = with_facts(packing) if facts else packing
    q, k, v, _ = draw_qkv(2, groups, total, seed=total)
    close(on_h100(spec, packing, backend)(q, k, v, None), oracle(q, k, v, spec, packing, None), [q, k, v])


@settings(max_examples=60)
@given(st.data(), layers(sinks=False, global_tokens=False), st.integers(1, 100))
def test_segments_are_the_same_whether_counted_on_the_host_or_not(
    data: st.DataObject, spec: LayerSpec, total: int
) -> None:
    packing = data.draw(packings(2, total))
    read, known = find_segments(spec, packing, 2), find_segments(spec, with_facts(packing), 2)
    assert read is not None
    assert known is not None
    assert torch.equal(read.borders.unique(), known.borders.unique())
    if known.padding is not None:
        assert torch.equal(read.padding, known.padding)


def test_what_training_knows_is_not_read_from_the_device() -> None:
    """On `meta` there are no values, so that every read is an error."""
    documents = torch.tensor([[1] * 90 + [2] * 60 + [-1] * 50, [3] * 200])
    packing = Packing.of_documents(documents).to(torch.device("meta"))
    backends = {"flex": True, "blocked": True, "flash": False}
    for backend, sinks in backends.items():
        for kind in (LayerSpec("sliding", 8), LayerSpec("full"), LayerSpec("chunked", 8), LayerSpec("dilated", 4, 3)):
            on_h100(replace(kind, sink=sinks), packing, backend)
            on_h100(replace(kind, sink=sinks), Packing.of_whole_rows(200, torch.device("meta")), backend)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("backend", ["blocked", "flash", "cudnn", "flex"])
def test_a_compiled_layer_is_one_graph_for_all_batches(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(cudnn, "_register", lambda: None)
    for name in ("flash", "cudnn"):
        monkeypatch.setitem(plan._VARLEN_KERNELS, name, lambda: lambda q, k, v, segments, window: q)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def layer(x: Tensor, attend: Attend, sinks: Tensor | None) -> Tensor:
        return attend(x * 2, x, x, sinks)

    compiled = torch.compile(
        layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=False
    )
    x, sinks = torch.randn(2, HEADS, 200, 16), torch.zeros(HEADS) if backend in ("blocked", "flex") else None
    for lengths in ([30, 70], [50], [200, 1]):
        rows = [packed(lengths, padding, 200) for padding in (0, 20)]
        packing = Packing.of_documents(torch.stack([documents for _, documents in rows]))
        for spec in (LayerSpec("sliding", 9), LayerSpec("dilated", 4, dilation=3)):
            compiled(x, on_h100(replace(spec, sink=sinks is not None), packing, backend), sinks)
    assert len(graphs) == 2


GAP = Packing(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, -1, 0]]))


@pytest.mark.parametrize("packing", [GAP, with_facts(GAP)])
def test_padding_inside_a_document_is_refused_by_kernels_for_segments(packing: Packing) -> None:
    message = r"^model\.attention_backend is 'flash', which can't leave out padding inside a document; choose auto"
    with pytest.raises(UserError, match=message):
        on_h100(LayerSpec("full"), packing, "flash", 1)


def test_padding_inside_a_document_is_blocked_where_the_choice_is_ours() -> None:
    plan = plan_attention(LayerSpec("full"), 64, "auto", H100, torch.bfloat16, True)
    assert plan.backend == "cudnn"
    q, k, v, _ = draw_qkv(1, 2, 4, seed=1)
    close(plan.prepare(GAP, 1)(q, k, v, None), oracle(q, k, v, LayerSpec("full"), GAP), [q, k, v])


@pytest.mark.usefixtures("kernels")
def test_rows_of_padding_alone_give_zeros() -> None:
    packing = Packing(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -1))
    q = torch.randn(2, HEADS, 3, 8)
    assert not on_h100(LayerSpec("full"), packing, "flash")(q, q, q, None).any()


@pytest.mark.parametrize("knows_gqa", [True, False])
def test_flash_is_called_as_each_version_of_pytorch_wants_it(monkeypatch: pytest.MonkeyPatch, knows_gqa: bool) -> None:
    from torch.nn.attention import varlen as library

    calls: list[Any] = []

    def new(q, k, v, a, b, c, d, *, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        calls.append((window_size, enable_gqa))
        return q

    def old(q, k, v, a, b, c, d, *, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        calls.append((window_size, False))
        return q

    monkeypatch.setattr(library, "varlen_attn", new if knows_gqa else old)
    varlen.flash_kernel.cache_clear()
    q, k = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
    for window in (None, 3):
        varlen.flash_kernel()(q, k, k, Segments(torch.tensor([0, 5]), 5, None), window)
    varlen.flash_kernel.cache_clear()
    assert calls == [((-1, 0), knows_gqa), ((2, 0), knows_gqa)]


# -- where they are ----------------------------------------------------------------------------------------------------


def test_xformers_counts_the_window_as_we_do() -> None:
    pytest.importorskip("xformers", reason="the package xformers is not installed")
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    bias = BlockDiagonalCausalMask.from_seqlens([5, 3]).make_local_attention(3)
    documents = torch.tensor([[0] * 5 + [1] * 3])
    packing = Packing(torch.tensor([[*range(5), *range(3)]]), documents)
    assert torch.equal(bias.materialize((1, 8, 8))[0] == 0, may_see(LayerSpec("sliding", 3), packing, packing)[0])
