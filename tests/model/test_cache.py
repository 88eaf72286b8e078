"""The ring serves what a full forward computes, in constant memory, however the tokens arrive."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from model import decoder
from model.attention import plan, reference
from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.flops import cache_bytes
from model.windows import reach
from scripts.benchmarks.timing import peak_bytes
from tests.model.attention.oracle import forget_plans
from tests.model.tiny import VOCAB, tiny_config, tiny_model, token_ids

W, T = 5, 37
STACKS = {
    "sliding": [{"window": W}] * 3,
    "mixed": [{"window": W}, {"kind": "full"}, {"window": 2}],
    "chunked": [{"kind": "chunked", "window": W}, {"window": W}],
    "dilated": [{"kind": "dilated", "window": W, "dilation": 3}] * 2,
    "sinks": [{"window": W, "sink": True}] * 2,
    "one": [{"window": 1}, {"window": W}, {"window": 3, "rope": False}],
    "full": [{"kind": "full"}] * 2,
    "hybrid": [*[{"window": W}] * 3, {"kind": "full", "rope": False}],
    "global": [{"window": W, "global_tokens": 2}, {"window": W, "global_tokens": 7}],
    "everything": [
        {"kind": "chunked", "window": W, "global_tokens": 3, "sink": True}, {"kind": "full", "sink": True},
        {"kind": "dilated", "window": 3, "dilation": 2, "global_tokens": 2}, {"window": W, "rope_theta": 100.0},
    ],
}  # fmt: skip


def with_sinks(model: WindreachForCausalLM) -> WindreachForCausalLM:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sink_logits"):
                weight.copy_(torch.linspace(-1, 2, weight.numel()))
    return model


def with_norms(model: WindreachForCausalLM) -> WindreachForCausalLM:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.linspace(0.5, 2, weight.numel()))
    return model


@torch.no_grad()
def through_ring(model: WindreachForCausalLM, chunks: list[Tensor], cache: RingCache | None = None, **mask) -> Tensor:
    """Logits of chunks fed one after the other; `documents` or `attention_mask` is cut as the ids are."""
    cache = cache or RingCache(model.config)
    out, start = [], 0
    for chunk in chunks:
        end = start + chunk.shape[1]
        now = {name: m[:, :end] if name == "attention_mask" else m[:, start:end] for name, m in mask.items()}
        out.append(model(chunk, past_key_values=cache, **now).logits)
        start = end
    return torch.cat(out, 1)


@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W + 3, T])
@pytest.mark.parametrize("stack", STACKS)
def test_ring_equals_full_forward_for_any_chunking(stack: str, chunk: int) -> None:
    model, ids = with_sinks(tiny_model(STACKS[stack])), token_ids(2, T)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(through_ring(model, list(ids.split(chunk, 1))), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", [W - 1, W, W + 1, 2 * W, 2 * W + 3])
def test_ring_holds_across_the_border_when_tokens_follow_a_prompt_one_by_one(prompt: int) -> None:
    model, ids = tiny_model(), token_ids(2, T)
    with torch.no_grad():
        expected = model(ids).logits
    chunks = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    torch.testing.assert_close(through_ring(model, chunks), expected, atol=1e-5, rtol=1e-4)


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = token_ids(3, T), torch.ones(3, T, dtype=torch.long)
    mask[1, :4], mask[2, : 2 * W + 3] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W + 3, T])
@pytest.mark.parametrize("stack", STACKS)
def test_left_padded_row_is_what_it_is_alone_for_any_chunking(stack: str, chunk: int) -> None:
    model = with_sinks(tiny_model(STACKS[stack]))
    ids, mask = left_padded()
    together = through_ring(model, list(ids.split(chunk, 1)), attention_mask=mask)
    assert together.isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        with torch.no_grad():
            alone = model(ids[row, real][None]).logits[0]
        torch.testing.assert_close(together[row, real], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W + 3, T])
@pytest.mark.parametrize("stack", ["sliding", "mixed", "chunked", "global", "everything"])
def test_packed_documents_stay_apart_in_the_ring_also_when_a_border_falls_between_chunks(
    stack: str, chunk: int
) -> None:
    model, ids = with_sinks(tiny_model(STACKS[stack])), token_ids(1, T)
    lengths = [chunk, 1, T - chunk - 1] if chunk < T - 1 else [11, 1, 25]
    documents = torch.repeat_interleave(torch.tensor([0, 1, 0]), torch.tensor(lengths))[None]
    together = through_ring(model, list(ids.split(chunk, 1)), documents=documents)
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stack", ["sliding", "chunked", "dilated", "one", "global"])
def test_bytes_do_not_grow_and_are_those_that_were_foretold(stack: str) -> None:
    model = tiny_model(STACKS[stack])
    cache, held = RingCache(model.config), set()
    for chunk in token_ids(2, 40 * W).split(2 * W + 3, 1):
        model(chunk, past_key_values=cache)
        held.add(cache.bytes)
    assert held == {cache_bytes(model.config, dtype_bytes=4, batch=2)}


def test_full_layers_grow_in_blocks_to_the_bytes_that_were_foretold() -> None:
    model, cache = tiny_model(STACKS["mixed"]), RingCache(tiny_config(STACKS["mixed"]))
    for n in (250, 6, 1, 255, 1):
        through_ring(model, [token_ids(2, n)], cache)
        assert cache.bytes == cache_bytes(model.config, dtype_bytes=4, batch=2, length=cache.get_seq_length())


def test_reordered_rows_go_on_as_the_rows_they_were_copied_from() -> None:
    model = tiny_model(STACKS["mixed"])
    ids, mask = left_padded()
    beams, more = torch.tensor([2, 2, 0]), token_ids(3, 2 * W + 1, seed=1)
    cache = RingCache(model.config)
    through_ring(model, [ids], cache, attention_mask=mask)
    cache.reorder_cache(beams)
    went_on = through_ring(model, list(more.split(1, 1)), cache)
    longer = torch.cat((mask[beams], torch.ones_like(more)), 1)
    with torch.no_grad():
        expected = model(torch.cat((ids[beams], more), 1), attention_mask=longer).logits[:, T:]
    torch.testing.assert_close(went_on, expected, atol=1e-5, rtol=1e-4)


def test_reset_cache_starts_anew() -> None:
    model, ids = tiny_model(), token_ids(2, T)
    cache = RingCache(model.config)
    first = through_ring(model, [ids], cache)
    cache.reset()
    assert cache.get_seq_length() == cache.bytes == 0
    assert torch.equal(through_ring(model, [ids], cache), first)


def test_cache_counts_all_tokens_seen_and_not_those_that_it_holds() -> None:
    model, cache = tiny_model(), RingCache(tiny_config())
    through_ring(model, list(token_ids(1, T).split(7, 1)), cache)
    assert cache.get_seq_length() == T


def refusal(cache: RingCache, model: WindreachForCausalLM, rows: int) -> str:
    with pytest.raises(UserError) as caught:
        model(token_ids(rows, 3), past_key_values=cache)
    return str(caught.value)


def test_what_a_ring_cannot_do_is_refused() -> None:
    model = tiny_model()
    cache = RingCache(model.config)
    through_ring(model, [token_ids(2, T)], cache)
    assert refusal(cache, model, rows=3) == "the cache holds 2 rows, but the input has 3"
    assert refusal(cache, tiny_model(seed=1), rows=2) == (
        "the cache was filled by another model; use a new one, or reset() it"
    )
    assert refusal(cache, tiny_model([{"window": W + 1}] * 3), rows=2) == (
        "the cache was made for other layers; make it from this model's config: RingCache(config)"
    )
    with pytest.raises(
        UserError, match=r"^RingCache serves Windreach models only; other models bring their own cache$"
    ):
        cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(UserError, match=r"^a ring cache keeps its number of rows; repeat the rows of the input"):
            change()


@pytest.mark.parametrize("more", [1, W + 2])
@pytest.mark.parametrize(
    ("stack", "length", "cut"),
    [
        ("full", T, 20),
        ("hybrid", W, W - 2),
        ("mixed", T, 1),
        ("chunked", T, 1),
        ("dilated", W, 2),
        ("everything", W, 3),
    ],
)
def test_cropped_cache_goes_on_as_if_the_tokens_had_not_come(stack: str, length: int, cut: int, more: int) -> None:
    model, ids = with_sinks(tiny_model(STACKS[stack])), token_ids(2, length + T)
    cache = RingCache(model.config)
    through_ring(model, list(ids[:, :length].split(1, 1)), cache)
    cache.crop(-cut)
    assert cache.get_seq_length() == length - cut
    other = token_ids(2, T, seed=1)
    with torch.no_grad():
        expected = model(torch.cat((ids[:, : length - cut], other), 1)).logits[:, length - cut :]
    torch.testing.assert_close(through_ring(model, list(other.split(more, 1)), cache), expected, atol=1e-5, rtol=1e-4)


def test_cropping_that_can_not_be_honoured_is_refused() -> None:
    model = tiny_model()
    cache = RingCache(model.config)
    through_ring(model, [token_ids(2, T)], cache)
    gone = r"^a ring cache can't be cropped by 2 tokens: keys that a shorter sequence needs are overwritten$"
    with pytest.raises(UserError, match=gone):
        cache.crop(-2)
    cache.crop(-1)
    with pytest.raises(UserError, match=gone.replace("by 2 tokens", "by 1 tokens")):
        cache.crop(-1)
    with pytest.raises(UserError, match=rf"^crop\(1\): give minus the tokens to remove, of which there are {T - 1}$"):
        cache.crop(1)
    cache.crop(-(T - 1))
    assert cache.get_seq_length() == cache.bytes == 0


def test_a_document_can_not_be_cropped_away_and_the_one_before_taken_up_again() -> None:
    model = tiny_model(STACKS["full"])
    cache = RingCache(model.config)
    documents = torch.tensor([[0] * 9 + [1] * 4, [0] * 13])
    through_ring(model, [token_ids(2, 13)], cache, documents=documents)
    cache.crop(-3)
    with pytest.raises(UserError, match=r"^the cache can't be cropped by 1 tokens: a row's document began after them$"):
        cache.crop(-1)


@pytest.mark.parametrize("stack", STACKS)
def test_turns_through_one_cache_generate_what_one_prompt_does(stack: str) -> None:
    model, cache = with_sinks(tiny_model(STACKS[stack])), RingCache(tiny_config(STACKS[stack]))
    (text, mask), how = left_padded(), {"do_sample": False, "max_new_tokens": 7}
    for seed in (1, 2, 3):
        anew = model.generate(text, attention_mask=mask, use_cache=False, **how)
        text = model.generate(text, attention_mask=mask, past_key_values=cache, **how)
        assert torch.equal(text, anew)
        text = torch.cat((text, token_ids(3, 2 * W, seed=seed)), 1)
        mask = torch.cat((mask, torch.ones(3, text.shape[1] - mask.shape[1], dtype=torch.long)), 1)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("stack", ["sliding", "chunked", "dilated", "hybrid", "global", "everything"])
def test_beams_and_samples_are_those_without_a_cache(stack: str, how: dict) -> None:
    model, (ids, mask) = with_sinks(tiny_model(STACKS[stack])), left_padded()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        how = {"do_sample": False, "max_new_tokens": 12, **how}
        drawn.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **how))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W + 3, T])
@pytest.mark.parametrize("stack", STACKS)
def test_greedy_tokens_are_those_without_a_cache_however_generate_cuts_the_prompt(stack: str, chunk: int) -> None:
    model, (ids, mask) = with_sinks(tiny_model(STACKS[stack])), left_padded()
    how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": W + 2}
    anew = model.generate(ids, use_cache=False, **how)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **how), anew)


def test_another_cache_asked_of_generate_by_name_is_refused() -> None:
    told = (
        r"^cache_implementation is 'static', a cache of transformers that the model can't take; leave it out, and it "
    )
    with pytest.raises(UserError, match=told):
        tiny_model().generate(token_ids(1, T), cache_implementation="static", max_new_tokens=1)


def test_what_goes_back_over_tokens_is_refused_by_generate() -> None:
    """Assisted decoding crops what was guessed wrong, which a ring has already forgotten."""
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        tiny_model().generate(token_ids(1, T), prompt_lookup_num_tokens=3, max_new_tokens=5, do_sample=False)


@torch.inference_mode()
def test_a_token_is_written_where_it_belongs_and_nothing_held_is_moved() -> None:
    model, ids = with_sinks(tiny_model([*STACKS["global"], *STACKS["chunked"]])), token_ids(2, 4 * W)
    cache = RingCache(model.config)
    through_ring(model, [ids[:, : W + 1]], cache)

    def addresses() -> list[int]:
        places = [x for slots in cache.slots.values() for x in (slots.positions, slots.documents)]
        return [x.data_ptr() for x in (*places, *(layer.key_values for layer in cache.layers))]

    before, held = addresses(), [layer.key_values.clone() for layer in cache.layers]
    for token in ids[:, W + 1 :].split(1, 1):
        model(token, past_key_values=cache)
        assert addresses() == before
        for layer, past in zip(cache.layers, held, strict=True):
            assert (layer.key_values != past).any(-1).any(-1).sum(1).tolist() == [1, 1]  # one slot of each row
        held = [layer.key_values.clone() for layer in cache.layers]


@torch.inference_mode()
def test_the_compiled_step_is_one_graph_of_unchanging_shapes_however_often_the_ring_turns() -> None:
    model, ids = (
        with_norms(tiny_model([{"window": W, "global_tokens": 1}, {"kind": "chunked", "window": 3}])),
        token_ids(2, T),
    )
    torch._dynamo.utils.counters.clear()
    model.compile_decoding()
    cache = RingCache(model.config)
    through_ring(model, list(ids[:, :2].split(1, 1)), cache)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        through_ring(model, list(ids[:, 2:].split(1, 1)), cache)
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_hook_sees_every_single_token(compiled: bool) -> None:
    model, ids, calls = tiny_model(STACKS["everything"]), token_ids(2, T), []
    expected = through_ring(model, list(ids.split(1, 1)))
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: calls.append(1))
    if compiled:
        model.compile_decoding()
    got = through_ring(model, list(ids.split(1, 1)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == T


def test_compiled_step_computes_the_same_also_while_a_full_layer_grows() -> None:
    layers = [{"window": W, "global_tokens": 2, "sink": True}, {"kind": "full"}]
    model, ids = with_norms(with_sinks(tiny_model(layers, qk_norm=True))), token_ids(2, 12)
    cache, twin = RingCache(model.config), RingCache(model.config)
    for one in (cache, twin):
        through_ring(model, [token_ids(2, 250)], one)
    expected = through_ring(model, list(ids.split(1, 1)), twin)
    model.compile_decoding()
    torch.testing.assert_close(through_ring(model, list(ids.split(1, 1)), cache), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_inside_a_layer_is_not_passed_by() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, ids = tiny_model(), token_ids(2, T)
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.layers[0].self_attn.q_proj = Doubled(*weight.shape[::-1], bias=False)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(through_ring(model, list(ids.split(1, 1))), expected, atol=1e-5, rtol=1e-4)


def test_a_copied_cache_goes_its_own_way() -> None:
    model, ids = tiny_model(STACKS["everything"]), token_ids(2, T + 9)
    cache = RingCache(model.config)
    through_ring(model, list(ids[:, :T].split(1, 1)), cache)
    twin = copy.deepcopy(cache)
    through_ring(model, list(token_ids(2, 9, seed=1).split(1, 1)), twin)
    with torch.no_grad():
        expected = model(ids).logits[:, T:]
    torch.testing.assert_close(through_ring(model, list(ids[:, T:].split(1, 1)), cache), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stack", ["sliding", "full", "hybrid", "everything"])
def test_a_long_chunk_passes_in_slices(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 2 * W + 3)
    monkeypatch.setattr(reference, "QUERIES_PER_MASK", 3)
    monkeypatch.setattr(plan, "MIN_TILE_WINDOW", 4)
    forget_plans()
    model, (ids, mask) = with_sinks(tiny_model(STACKS[stack])), left_padded()
    with torch.no_grad():
        whole = model.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        slices = model.model(
            ids, attention_mask=mask, output_hidden_states=True, past_key_values=RingCache(model.config)
        ).hidden_states
        alone = model(ids[:1]).logits
    torch.testing.assert_close(through_ring(model, [ids[:1]]), alone, atol=1e-5, rtol=1e-4)
    real = mask.bool()
    for there, here in zip(whole, slices, strict=True):
        torch.testing.assert_close(here[real], there[real], atol=1e-5, rtol=1e-4)


def test_memory_of_a_prefill_is_that_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 64)
    model = tiny_model()
    peaks = []
    for length in (512, 4096):
        ids = token_ids(1, length)
        with torch.inference_mode():
            peaks.append(
                peak_bytes(lambda ids=ids: model(ids, past_key_values=RingCache(model.config), logits_to_keep=1))
            )
    residual_stream = (4096 - 512) * model.config.hidden_size * 4
    assert peaks[1] - peaks[0] < residual_stream  # positions and document ids, a few integers a token


@pytest.mark.parametrize("keep", [1, W, 2 * W + 4, 5 * W, T, T + 1])
def test_logits_of_the_last_positions_alone_are_those_of_the_whole(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 2 * W + 3)
    model, ids = tiny_model(), token_ids(2, T)
    with torch.no_grad():
        whole = model(ids).logits
        last = model(ids, past_key_values=RingCache(model.config), logits_to_keep=keep).logits
    torch.testing.assert_close(last, whole[:, -keep:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stack", ["sliding", "dilated", "chunked", "sinks"])
@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W + 3])
def test_cliff_token_beyond_reach_leaves_the_logits_through_the_ring_as_they_are_to_the_bit(
    stack: str, chunk: int
) -> None:
    model = with_sinks(tiny_model(STACKS[stack]))
    far = reach(model.config.specs)
    ids = token_ids(1, far + 12)
    same = []
    for distance in (far + 1, far + 11, 3):
        other = ids.clone()
        other[:, -1 - distance] = other[:, -1 - distance] % (VOCAB - 1) + 1
        last = [through_ring(model, list(x.split(chunk, 1)))[:, -1] for x in (ids, other)]
        same.append(torch.equal(*last))
    assert same == [True, True, False]


@settings(max_examples=40)
@given(st.data(), st.sampled_from(sorted(STACKS)))
def test_any_chunking_of_any_packed_and_padded_rows_equals_the_oracle(data: st.DataObject, stack: str) -> None:
    oracle, model = (with_sinks(tiny_model(STACKS[stack], attention_backend=b)) for b in ("reference", "blocked"))
    cuts = sorted(data.draw(st.lists(st.integers(1, T - 1), unique=True, max_size=9)))
    rows = [data.draw(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=4, max_size=4)) for _ in range(2)]
    documents = torch.tensor(rows).repeat_interleave(torch.tensor([9, 4, 17, 7]), 1)
    ids, ends = token_ids(2, T), [0, *cuts, T]
    chunks = [ids[:, a:b] for a, b in pairwise(ends)]
    with torch.no_grad():
        expected = oracle(ids, documents=documents).logits
    got = through_ring(model, chunks, documents=documents)
    torch.testing.assert_close(got[documents >= 0], expected[documents >= 0], atol=1e-5, rtol=1e-4)
    assert got.isfinite().all()


@torch.no_grad()
def test_bfloat16_goes_through_the_ring() -> None:
    model, ids = with_sinks(tiny_model(STACKS["everything"])).bfloat16(), token_ids(2, T)
    cache = RingCache(model.config)
    one_by_one = through_ring(model, list(ids.split(1, 1)), cache)
    assert cache.layers[0].keys.dtype == one_by_one.dtype == torch.bfloat16
    expected = model.float()(ids).logits
    assert (one_by_one.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_nothing_to_read_and_an_empty_input_are_refused() -> None:
    with pytest.raises(UserError, match=r"^there is no input; give input_ids or inputs_embeds$"):
        tiny_model()(past_key_values=RingCache(tiny_config()))
    with pytest.raises(UserError, match=r"^the input is empty; give at least one token a row$"):
        tiny_model()(token_ids(2, 0), past_key_values=RingCache(tiny_config()))


def test_another_kind_of_cache_is_refused() -> None:
    with pytest.raises(UserError, match=r"^past_key_values is a DynamicCache; pass a model\.cache\.RingCache or none$"):
        tiny_model()(token_ids(1, T), past_key_values=DynamicCache())
