"""The ring serves what a full forward computes, in constant memory, however the tokens arrive."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.flops import cache_bytes
from tests.model.tiny import tiny_config, tiny_model, token_ids

W, T = 5, 37
STACKS = {
    "sliding": [{"window": W}] * 3,
    "mixed": [{"window": W}, {"kind": "full"}, {"window": 2}],
    "chunked": [{"kind": "chunked", "window": W}, {"window": W}],
    "dilated": [{"kind": "dilated", "window": W, "dilation": 3}] * 2,
    "sinks": [{"window": W, "sink": True}] * 2,
    "one": [{"window": 1}, {"window": W}, {"window": 3, "rope": False}],
    "full": [{"kind": "full"}] * 2,
}


def with_sinks(model: WindreachForCausalLM) -> WindreachForCausalLM:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sink_logits"):
                weight.copy_(torch.linspace(-1, 2, weight.numel()))
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
@pytest.mark.parametrize("stack", ["sliding", "mixed", "chunked"])
def test_packed_documents_stay_apart_in_the_ring_also_when_a_border_falls_between_chunks(
    stack: str, chunk: int
) -> None:
    model, ids = tiny_model(STACKS[stack]), token_ids(1, T)
    lengths = [chunk, 1, T - chunk - 1] if chunk < T - 1 else [11, 1, 25]
    documents = torch.repeat_interleave(torch.tensor([0, 1, 0]), torch.tensor(lengths))[None]
    together = through_ring(model, list(ids.split(chunk, 1)), documents=documents)
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stack", ["sliding", "chunked", "dilated", "one"])
def test_bytes_do_not_grow_and_are_those_that_were_foretold(stack: str) -> None:
    model = tiny_model(STACKS[stack])
    cache, held = RingCache(model.config), set()
    for chunk in token_ids(2, 40 * W).split(2 * W + 3, 1):
        model(chunk, past_key_values=cache)
        held.add(cache.bytes)
    assert held == {cache_bytes(model.config, dtype_bytes=4, batch=2)}


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
    assert refusal(cache, tiny_model(num_key_value_heads=1), rows=2) == (
        "the cache was filled by another model (its heads have other shapes); use a new one"
    )
    with pytest.raises(UserError, match=r"^a ring cache can't be cropped: the tokens .* are overwritten$"):
        cache.crop(-1)
    with pytest.raises(
        UserError, match=r"^RingCache serves Windreach models only; other models bring their own cache$"
    ):
        cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)


def test_global_tokens_are_refused_by_the_ring_and_served_without_it() -> None:
    model = tiny_model([{"window": W, "global_tokens": 2}] * 2)
    message = "the ring cache does not hold global tokens yet; generate with use_cache=False"
    assert refusal(RingCache(model.config), model, rows=1) == message
    assert model.generate(token_ids(1, T), max_new_tokens=3, do_sample=False, use_cache=False).shape == (1, T + 3)


def test_another_kind_of_cache_is_refused() -> None:
    with pytest.raises(UserError, match=r"^past_key_values is a DynamicCache; pass a model\.cache\.RingCache or none$"):
        tiny_model()(token_ids(1, T), past_key_values=DynamicCache())
