"""Tokens drawn on the device, in blocks, by a step that is recorded once: the same as by plain steps."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import cache as ring
from model import decoder
from model.attention import reference
from model.cache import Recording, RingCache
from model.decoder import WindreachForCausalLM
from model.decoding import Sampler, token_blocks
from tests.model.test_cache import STACKS, W, with_sinks
from tests.model.tiny import tiny_config, tiny_model, token_ids

GREEDY = Sampler()


def sampler(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, device: str = "cpu") -> Sampler:
    return Sampler(temperature, top_p, torch.Generator(device).manual_seed(seed))


def shares(logits_v: Tensor, how: Sampler, draws: int = 40_000) -> Tensor:
    return torch.bincount(how(logits_v.expand(draws, -1)), minlength=len(logits_v)) / draws


def test_greedy_takes_the_likeliest_token_of_each_row() -> None:
    assert GREEDY(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(shares(logits, sampler(temperature)), expected, atol=0.01, rtol=0)


def test_top_p_keeps_the_likeliest_tokens_that_hold_the_mass_in_each_row() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    expected = torch.tensor([0.0, 0.625, 0.0, 0.375])
    torch.testing.assert_close(shares(logits, sampler(1.0, 0.79)), expected, atol=0.01, rtol=0)
    assert shares(logits, sampler(1.0, 1e-6), draws=100)[1] == 1
    rows = torch.stack((logits, logits.flip(0))).repeat(200, 1)
    ids = sampler(1.0, 0.79)(rows).view(200, 2)
    assert ids[:, 0].unique().tolist() == [1, 3]
    assert ids[:, 1].unique().tolist() == [0, 2]


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    logits = torch.tensor([0.7, 0.3]).log()
    torch.testing.assert_close(shares(logits.bfloat16(), sampler()), logits.exp(), atol=0.01, rtol=0)


@torch.inference_mode()
def plainly(
    model: WindreachForCausalLM, ids: Tensor, tokens: int, how: Sampler = GREEDY, cache: RingCache | None = None
) -> Tensor:
    """Tokens by plain forward passes."""
    cache, drawn = cache or RingCache(model.config), [ids]
    for _ in range(tokens):
        drawn.append(how(model(drawn[-1], past_key_values=cache).logits[:, -1])[:, None])
    return torch.cat(drawn[1:], 1)


def in_blocks(
    model: WindreachForCausalLM, ids: Tensor, tokens: int, how: Sampler = GREEDY, block: int = 7,
    cache: RingCache | None = None,
) -> Tensor:  # fmt: skip
    return torch.cat(list(token_blocks(model, ids, how, cache or RingCache(model.config), block, tokens)), 1)


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("stack", STACKS)
def test_blocks_hold_the_tokens_of_plain_steps(stack: str, block: int) -> None:
    model, ids = with_sinks(tiny_model(STACKS[stack])), token_ids(2, W + 2)
    assert torch.equal(in_blocks(model, ids, 4 * W, block=block), plainly(model, ids, 4 * W))
    drawn = in_blocks(model, ids, 4 * W, sampler(0.8, 0.9), block)
    assert torch.equal(drawn, plainly(model, ids, 4 * W, sampler(0.8, 0.9)))


def test_blocks_end_after_the_tokens_that_were_asked_for_and_the_cache_holds_all_but_the_last() -> None:
    model, cache = tiny_model(STACKS["mixed"]), RingCache(tiny_config(STACKS["mixed"]))
    blocks = list(token_blocks(model, token_ids(2, 3), GREEDY, cache, block=4, max_tokens=10))
    assert [x.shape for x in blocks] == [(2, 1), (2, 4), (2, 4), (2, 1)]
    assert cache.get_seq_length() == 3 + 10 - 1


def test_full_layers_make_room_at_once_for_the_tokens_that_will_come() -> None:
    model, cache = tiny_model(STACKS["full"]), RingCache(tiny_config(STACKS["full"]))
    blocks = token_blocks(model, token_ids(1, 3), GREEDY, cache, block=4, max_tokens=600)
    next(blocks)
    held = cache.bytes
    list(blocks)
    assert cache.bytes == held == cache.layers[0].key_values[0, 0].nbytes * 768 * 2


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for a device: copies between them, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.ndim}
        by_mask = func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
        if len(devices) > 1 or by_mask or func.name() in waits:
            self.found.append(func.name())
        return out


@pytest.mark.parametrize("how", [GREEDY, Sampler(0.8, 0.9), Sampler(0.8)], ids=["greedy", "top-p", "temperature"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_single_token_reads_nothing_from_the_device(
    stack: str, how: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values, so that to read one or to make a shape of one is an error as well."""
    monkeypatch.setattr(decoder, "product_dtype", lambda x: x.dtype)  # the meta device knows no autocast
    model = tiny_model(STACKS[stack]).to("meta")
    cache, token = RingCache(model.config), torch.zeros(2, 1, dtype=torch.long, device="meta")
    mask = torch.ones(2, 1, dtype=torch.long, device="meta")
    with torch.no_grad(), Reads() as reads:
        for _ in range(3):
            logits = model(token, past_key_values=cache, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            token = how(logits)[:, None]
            assert token.device.type == "meta"
    assert reads.found == []


def storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: runs the recorded operations again, on the same memory. Python does not run again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return  # a GPU computes nothing while it records, and the tape did
        for func, args, kwargs, out in self.calls:
            before = storages((args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if not storages(old) <= before:  # not a view, and not written where it was
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The recordings made during the test, of a model that believes to be on a GPU."""
    made: list[Tape] = []

    def new() -> Tape:
        made.append(Tape())
        return made[-1]

    @contextlib.contextmanager
    def record(tape: Tape, stream: None, capture_error_mode: str) -> Iterator[None]:
        with tape:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(ring, "_stream", lambda device: None)
    monkeypatch.setattr(decoder, "can_record", lambda x: True)
    return made


@pytest.mark.parametrize("stack", STACKS)
def test_a_recorded_step_writes_the_tokens_of_plain_steps_however_often_the_ring_turns(
    stack: str, tapes: list[Tape]
) -> None:
    model, ids = with_sinks(tiny_model(STACKS[stack])), token_ids(2, W + 2)
    expected = plainly(model, ids, 8 * W)
    assert torch.equal(in_blocks(model, ids, 8 * W), expected)
    assert [tape.replays for tape in tapes] == [8 * W - 2]  # without the prompt and the token that warmed up


def test_a_recorded_step_keeps_packed_and_padded_rows_apart(tapes: list[Tape]) -> None:
    model, ids = with_sinks(tiny_model(STACKS["everything"])), token_ids(3, 40)
    documents = torch.tensor([[0] * 40, [0] * 11 + [1] * 9 + [0] * 20, [-1] * 7 + [3] * 33])
    with torch.no_grad():
        expected = model(ids, documents=documents).logits
        model.record_decoding()
        cache = RingCache(model.config)
        parts = [model(t, documents=d, past_key_values=cache) for t, d in zip(ids.split(1, 1), documents.split(1, 1))]
    got = torch.cat([part.logits for part in parts], 1)
    torch.testing.assert_close(got[documents >= 0], expected[documents >= 0], atol=1e-5, rtol=1e-4)
    assert tapes[0].replays == 39


def test_turns_and_cropped_tokens_leave_a_recording_valid(tapes: list[Tape]) -> None:
    model = tiny_model(STACKS["global"])
    expected = [plainly(model, ids, 6, cache=cache) for cache in [RingCache(model.config)] for ids in turns(cache)]
    got = [in_blocks(model, ids, 6, cache=cache) for cache in [RingCache(model.config)] for ids in turns(cache)]
    assert all(map(torch.equal, got, expected))
    assert len(tapes) == 1


def turns(cache: RingCache) -> Iterator[Tensor]:
    yield token_ids(2, 1)
    yield token_ids(2, W + 3, seed=1)
    with torch.inference_mode():
        cache.crop(-1)
    yield token_ids(2, 2, seed=2)


def test_a_cache_that_grows_or_is_rearranged_is_recorded_anew(tapes: list[Tape]) -> None:
    model, ids = tiny_model(STACKS["mixed"]), token_ids(2, 250)
    expected = plainly(model, ids, 20)
    model.record_decoding()
    cache = RingCache(model.config)
    with torch.inference_mode():
        got = [model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)]
        for i in range(19):
            if i == 13:
                cache.reorder_cache(torch.tensor([1, 0]))
                got[-1] = got[-1].flip(0)
            got.append(model(got[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(got[:13], 1), expected[:, :13])
    assert torch.equal(torch.cat(got[14:], 1).flip(0), expected[:, 14:])
    assert len(tapes) == 3
    cache.reset()
    assert torch.equal(in_blocks(model, ids[:1], 5, cache=cache), expected[:1, :5])  # another number of rows


def test_generate_replays_the_recorded_step(tapes: list[Tape]) -> None:
    model, ids = tiny_model(), token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    expected = model.generate(ids, **how)
    model.record_decoding()
    assert torch.equal(model.generate(ids, **how), expected)
    assert tapes[0].replays == 18


def test_a_hook_prevents_a_recording_because_it_must_see_every_token(tapes: list[Tape]) -> None:
    model, calls = tiny_model(), []
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: calls.append(1))
    in_blocks(model, token_ids(1, 3), 9)
    assert (len(calls), tapes) == (9, [])


def test_a_model_on_a_cpu_or_under_autocast_is_not_recorded() -> None:
    model = tiny_model()
    assert not decoder.can_record(torch.zeros(1))
    cache = RingCache(model.config)
    in_blocks(model, token_ids(1, 3), 9, cache=cache)
    assert cache.recording.recorded is None


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention of a single token, and what is compiled, are those of a GPU."""
    monkeypatch.setattr(reference, "kernel_is_slow", lambda q: True)
    monkeypatch.setattr(decoder, "on_gpu", lambda x: True)


@pytest.mark.parametrize("stack", STACKS)
def test_single_tokens_without_the_kernel_are_those_with_it(stack: str, as_on_gpu: None) -> None:
    model, ids = with_sinks(tiny_model(STACKS[stack])), token_ids(2, 20)
    with torch.no_grad():
        cache, expected = RingCache(model.config), model(ids).logits
        got = torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_regions_of_like_layers_are_compiled_once(as_on_gpu: None) -> None:
    stack = [*STACKS["sliding"], {"window": W, "sink": True}]
    model, ids = with_sinks(tiny_model([*stack, *stack, *STACKS["sliding"], {"window": W}])), token_ids(2, W)
    expected = plainly(model, ids, 4 * W)
    torch._dynamo.utils.counters.clear()
    model.compile_decoding()
    assert torch.equal(in_blocks(model, ids, 4 * W), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_module_that_was_changed_is_compiled_anew(device: str, request: pytest.FixtureRequest) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    if device == "gpu":
        request.getfixturevalue("as_on_gpu")
    model, ids = tiny_model(), token_ids(1, 3)
    model.compile_decoding()
    before = in_blocks(model, ids, 9)
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.layers[0].self_attn.q_proj = Doubled(*weight.shape[::-1], bias=False)
    compiled, model.model._structure = in_blocks(model, ids, 9), ""
    model.model._run_region = decoder._run_region
    assert torch.equal(compiled, plainly(model, ids, 9))
    assert not torch.equal(compiled, before)


@pytest.fixture
def gpu_model() -> WindreachForCausalLM:
    return with_sinks(tiny_model([*STACKS["everything"], {"window": 7}], qk_norm=True)).cuda()


@pytest.mark.cuda
class TestOnGpu:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_recorded_step_writes_the_tokens_of_plain_steps(
        self, gpu_model: WindreachForCausalLM, rows: int, compiled: bool
    ) -> None:
        ids = token_ids(rows, W + 2).cuda()
        expected = plainly(gpu_model, ids, 300).cpu()
        if compiled:
            gpu_model.compile_decoding()
        cache = RingCache(gpu_model.config)
        assert torch.equal(in_blocks(gpu_model, ids, 300, block=16, cache=cache), expected)
        assert cache.recording.recorded is not None

    def test_a_full_layer_may_grow_under_a_recording(self, gpu_model: WindreachForCausalLM) -> None:
        ids = token_ids(2, 250).cuda()
        expected = plainly(gpu_model, ids, 20).cpu()
        blocks = token_blocks(gpu_model, ids, GREEDY, RingCache(gpu_model.config), block=19)
        assert torch.equal(torch.cat([next(blocks), next(blocks)], 1), expected)

    @pytest.mark.parametrize("top_p", [0.9, 1.0])
    def test_the_seed_decides_the_sample_recorded_or_not(self, gpu_model: WindreachForCausalLM, top_p: float) -> None:
        ids = token_ids(2, W).cuda()
        expected = plainly(gpu_model, ids, 60, sampler(0.8, top_p, device="cuda")).cpu()
        assert torch.equal(in_blocks(gpu_model, ids, 60, sampler(0.8, top_p, device="cuda")), expected)
        assert not torch.equal(in_blocks(gpu_model, ids, 60, sampler(0.8, top_p, 1, device="cuda")), expected)

    @pytest.mark.parametrize("compiled", [False, True])
    @torch.inference_mode()
    def test_the_host_never_waits_between_two_blocks(self, gpu_model: WindreachForCausalLM, compiled: bool) -> None:
        gpu_model.compile_decoding() if compiled else gpu_model.record_decoding()
        cache, how = RingCache(gpu_model.config), sampler(0.8, 0.9, device="cuda")
        newest = how(gpu_model(token_ids(2, W).cuda(), past_key_values=cache).logits[:, -1])[:, None]
        try:
            for i in range(40):
                torch.cuda.set_sync_debug_mode("error" if i >= 2 else "default")  # the first two warm up and record
                newest = how(gpu_model(newest, past_key_values=cache).logits[:, -1])[:, None]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert cache.recording.recorded is not None


def test_a_copied_recording_is_empty() -> None:
    warm = Recording()
    warm.is_warm = True
    assert not copy.deepcopy(warm).is_warm
