"""The whole model: what reaches a logit, what transformers computes, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MistralForCausalLM

from model.config import WindreachConfig
from model.decoder import InitOptions, WindreachForCausalLM, build_model
from model.errors import UserError
from model.hub import save_hf
from model.windows import reach, reachable
from tests.model.tiny import VOCAB, tiny_config, tiny_model, token_ids

W, T = 5, 37
STACKS = {
    "sliding": [{"window": W}] * 3,
    "dilated": [{"kind": "dilated", "window": 3, "dilation": 2}, {"window": 4}],
    "chunked": [{"kind": "chunked", "window": W}, {"window": 3}, {"kind": "chunked", "window": 4}],
    "sinks": [{"window": W, "sink": True}, {"window": 2, "rope": False}],
    "wide": [{"window": 20}] * 2,
}


def changed(ids: Tensor, index: int) -> Tensor:
    other = ids.clone()
    other[:, index] = other[:, index] % (VOCAB - 1) + 1
    return other


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_cliff_token_beyond_reach_leaves_the_logits_as_they_are_to_the_bit(stack: str, backend: str) -> None:
    model = tiny_model(STACKS[stack], attention_backend=backend)
    far = reach(model.config.specs)
    assert far is not None
    ids = token_ids(1, far + 60)
    last = model(ids).logits[:, -1]
    for distance in (far + 1, far + 2, far + 59):
        assert torch.equal(model(changed(ids, -1 - distance)).logits[:, -1], last)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_logits_depend_on_exactly_the_reachable_distances(stack: str, backend: str) -> None:
    model = tiny_model(STACKS[stack], attention_backend=backend).double()
    ids = token_ids(1, 61)
    last = model(ids).logits[:, -1]
    moved = [not torch.equal(model(changed(ids, -1 - d)).logits[:, -1], last) for d in range(61)]
    assert moved == reachable(model.config.specs, 61).tolist()


@settings(max_examples=25)
@given(st.sampled_from(sorted(STACKS)), st.integers(45, 70), st.integers(1, 44))
@torch.no_grad()
def test_no_logit_depends_on_a_later_token(stack: str, total: int, index: int) -> None:
    model, ids = tiny_model(STACKS[stack]), token_ids(1, total)
    assert torch.equal(model(ids).logits[:, :index], model(changed(ids, index)).logits[:, :index])


@settings(max_examples=15)
@given(st.sampled_from(sorted(STACKS)), st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 9))
def test_packed_documents_are_what_they_are_alone_forward_and_backward(
    stack: str, lengths: list[int], padding: int
) -> None:
    model, ids = tiny_model(STACKS[stack]), token_ids(1, sum(lengths) + 45 + padding)
    lengths = [*lengths, 45]
    numbers = [n % 2 for n in range(len(lengths))] + [-1]  # an id that comes back is another document
    documents = torch.repeat_interleave(torch.tensor(numbers), torch.tensor([*lengths, padding]))[None]
    logits = model(ids, documents=documents).logits[:, : sum(lengths)]
    alone = torch.cat([model(part).logits for part in ids[:, : sum(lengths)].split(lengths, 1)], 1)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
    weights = list(model.parameters())
    for ours, theirs in zip(gradients(logits, weights), gradients(alone, weights)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def gradients(logits: Tensor, weights: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logits.square().mean(), weights)


@torch.no_grad()
def test_positions_that_start_again_are_other_documents() -> None:
    model, ids = tiny_model(), token_ids(1, T)
    position_ids = torch.cat((torch.arange(20), torch.arange(T - 20)))[None]
    alone = torch.cat([model(part).logits for part in ids.split([20, T - 20], 1)], 1)
    torch.testing.assert_close(model(ids, position_ids=position_ids).logits, alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(ids, position_ids=torch.arange(T)[None]).logits, model(ids).logits)


@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padding_changes_no_real_row_and_gives_no_nan(side: str) -> None:
    model, ids, mask = tiny_model(), token_ids(2, T), torch.ones(2, T, dtype=torch.long)
    where = {"left": slice(0, 3 * W), "right": slice(T - 3 * W, T), "hole": slice(20, 20 + W)}[side]
    mask[1, where] = 0
    out = model(ids, attention_mask=mask).logits
    other = model(ids.masked_fill(mask == 0, 7), attention_mask=mask).logits
    real = mask[1].bool() if side != "hole" else torch.arange(T) < 20
    alone = model(ids[1, real][None]).logits[0]
    torch.testing.assert_close(out[1, real], alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(out[mask.bool()], other[mask.bool()])
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@settings(max_examples=20)
@given(st.sampled_from(sorted(STACKS)), st.integers(1, 60))
@torch.no_grad()
def test_backends_agree_through_the_stack(stack: str, total: int) -> None:
    ids = token_ids(2, total)
    logits = [tiny_model(STACKS[stack], attention_backend=b)(ids).logits for b in ("reference", "blocked")]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_training_and_evaluation_compute_the_same() -> None:
    model, ids = tiny_model(), token_ids(2, T)
    torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_stays_near_float32() -> None:
    model, ids = tiny_model(), token_ids(2, T)
    expected = model(ids).logits
    rounded = model.bfloat16()(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def mistral_twin(model: WindreachForCausalLM, folder: object) -> MistralForCausalLM:
    save_hf(model, str(folder))
    return MistralForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@pytest.fixture(params=["sliding", "full", "tied", "mqa"])
def pair(request: pytest.FixtureRequest, tmp_path: object) -> tuple[WindreachForCausalLM, MistralForCausalLM]:
    """Our model and what transformers loads of it."""
    fields = {
        "sliding": {},
        "full": {"layers": [{"kind": "full"}] * 3},
        "tied": {"tie_word_embeddings": True},
        "mqa": {"num_key_value_heads": 1, "head_dim": 12, "sliding_window": 7},
    }[request.param]
    model = tiny_model(**fields)
    return model, mistral_twin(model, tmp_path)


@torch.no_grad()
def test_logits_and_loss_are_those_of_mistral(pair: tuple) -> None:
    ours, theirs = pair
    ids = token_ids(2, T)
    mine, its = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(mine.logits, its.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.loss, its.loss, atol=1e-4, rtol=0)


def generate(model: nn.Module, ids: Tensor, **how: object) -> list[list[int]]:
    how = {"max_new_tokens": 3 * W, "do_sample": False, "pad_token_id": 0, **how}
    return model.generate(ids, **how).tolist()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no_cache"])
def test_generates_what_mistral_generates(pair: tuple, how: dict) -> None:
    ours, theirs = pair
    ids = token_ids(2, 3 * W + 2)
    assert generate(ours, ids, **how) == generate(theirs, ids, **how)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_left_padded_batch_generates_what_its_rows_generate_alone_and_what_mistral_does(pair: tuple, how: dict) -> None:
    ours, theirs = pair
    ids, mask = token_ids(3, 3 * W + 2), torch.ones(3, 3 * W + 2, dtype=torch.long)
    mask[1, :3], mask[2, : 2 * W + 1] = 0, 0
    ids = ids.masked_fill(mask == 0, 0)
    together = generate(ours, ids, attention_mask=mask, **how)
    for row in range(3):
        real = ids[row, mask[row].bool()][None]
        assert together[row][ids.shape[1] :] == generate(ours, real, **how)[0][real.shape[1] :]
    assert together == generate(theirs, ids, attention_mask=mask, **how)


def test_several_samples_of_one_prompt_are_drawn_through_the_ring() -> None:
    model, ids = tiny_model(), token_ids(1, 3 * W)
    torch.manual_seed(0)
    drawn = generate(model, ids, do_sample=True, num_return_sequences=4)
    torch.manual_seed(0)
    assert drawn == generate(model, ids, do_sample=True, num_return_sequences=4, use_cache=False)
    assert len({tuple(row) for row in drawn}) == 4


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones() -> None:
    model, ids = tiny_model(), token_ids(2, T)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


@torch.no_grad()
def test_hidden_states_are_those_of_mistral(pair: tuple) -> None:
    ours, ids = pair[0], token_ids(2, T)
    mine, its = (m(ids, output_hidden_states=True, logits_to_keep=3) for m in pair)
    assert len(mine.hidden_states) == len(its.hidden_states)
    for actual, expected in zip(mine.hidden_states, its.hidden_states, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.logits, its.logits, atol=1e-4, rtol=0)
    assert ours(ids).hidden_states is None


@torch.no_grad()
def test_return_dict_false_gives_a_tuple() -> None:
    model, ids = tiny_model(), token_ids(1, T)
    (logits,) = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits)


@torch.no_grad()
def test_what_forward_does_not_know_is_refused() -> None:
    model, ids = tiny_model(), token_ids(1, T)
    with pytest.raises(TypeError, match="lables"):
        model(ids, lables=ids)
    with pytest.raises(UserError, match="output_attentions: no attention backend makes the weights"):
        model(ids, output_attentions=True)
    with pytest.raises(UserError, match=r"attention_mask has 4 dimensions; give \(batch, tokens\)"):
        model(ids, attention_mask=torch.zeros(1, 1, T, T))


def test_generation_from_embeddings_is_that_from_their_tokens(pair: tuple) -> None:
    ours, _ = pair
    ids = token_ids(2, 3 * W + 2)
    embeddings = ours.model.embed_tokens(ids)
    from_tokens = [row[ids.shape[1] :] for row in generate(ours, ids)]
    assert ours.generate(inputs_embeds=embeddings, max_new_tokens=3 * W, do_sample=False).tolist() == from_tokens


@torch.no_grad()
def test_ignored_labels_do_not_count() -> None:
    model, ids = tiny_model(), token_ids(1, T)
    labels = ids.clone()
    labels[:, T // 2 :] = -100
    assert model(ids, labels=labels).loss == pytest.approx(
        model(ids[:, : T // 2], labels=ids[:, : T // 2]).loss.item(), abs=1e-5
    )


def test_rope_can_be_off_or_have_its_own_base_in_a_layer() -> None:
    ids = token_ids(1, T)
    plain = tiny_model([{"window": W}] * 2)(ids).logits
    same = tiny_model([{"window": W, "rope_theta": plain_base()}] * 2)(ids).logits
    other = tiny_model([{"window": W}, {"window": W, "rope_theta": 50.0}])(ids).logits
    off = tiny_model([{"window": W}, {"window": W, "rope": False}])(ids).logits
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other)
    assert not torch.allclose(plain, off)


def plain_base() -> float:
    return tiny_config().rope_base


@torch.no_grad()
def test_sink_takes_mass_and_gives_nothing() -> None:
    model, ids = tiny_model([{"window": W, "sink": True}] * 2), token_ids(1, T)
    bare = tiny_model([{"window": W}] * 2)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "sink" not in k})
    for layer in model.model.layers:
        layer.self_attn.sink_logits.fill_(-1e4)
    torch.testing.assert_close(model(ids).logits, bare(ids).logits, atol=1e-5, rtol=1e-4)
    for layer in (*model.model.layers, *bare.model.layers):
        if layer.self_attn.sink_logits is None:
            layer.self_attn.o_proj.weight.zero_()
        else:
            layer.self_attn.sink_logits.fill_(1e4)
    torch.testing.assert_close(model(ids).logits, bare(ids).logits, atol=1e-5, rtol=1e-4)


def weights_of(model: WindreachForCausalLM) -> dict[str, Tensor]:
    return model.state_dict()


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = weights_of(build_model(tiny_config(), seed=3))
    torch.manual_seed(2)
    second = weights_of(build_model(tiny_config(), seed=3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], weights_of(build_model(tiny_config(), seed=4))["lm_head.weight"])


def test_initial_spread_is_that_of_the_options() -> None:
    config = tiny_config(hidden_size=128, intermediate_size=256)
    weights = weights_of(build_model(config, InitOptions(embedding_std=2.0)))
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(2.0, rel=0.05)
    assert weights["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert weights["model.layers.1.mlp.down_proj.weight"].std() == pytest.approx(256**-0.5 / 6**0.5, rel=0.05)
    flat = weights_of(build_model(config, InitOptions(std=0.02, scale_residual_by_depth=False)))
    assert flat["model.layers.1.mlp.down_proj.weight"].std() == pytest.approx(0.02, rel=0.05)


def test_layers_can_start_as_copies_of_the_first() -> None:
    layers = build_model(tiny_config(), InitOptions(copy_first_layer=True)).model.layers
    first = layers[0].state_dict()
    assert all(torch.equal(w, first[name]) for layer in layers for name, w in layer.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_key_value_heads": 3},
            "model.num_attention_heads is 4, not a multiple of model.num_key_value_heads = 3; change one of them",
        ),
        ({"head_dim": 7}, "model.head_dim is 7; rotary positions need an even number"),
        (
            {"layers": [{"window": 4}] * 2, "num_hidden_layers": 3},
            "model.layers describes 2 layers, but model.num_hidden_layers is 3; change one of them",
        ),
        (
            {"layers": [{"window": 4}, {"window": 0}]},
            "model.layers[1]: a sliding layer needs window >= 1, but window is 0",
        ),
        ({"hidden_act": "gelu"}, "model.hidden_act is 'gelu'; the decoder knows only 'silu'"),
        ({"attention_dropout": 0.1}, "model.attention_dropout is 0.1; the decoder knows only 0.0"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "model.rope_parameters.rope_type is 'dynamic'; "
            "the decoder knows only 'default', 'linear', 'llama3', 'yarn'",
        ),
    ],
)
def test_configuration_that_cannot_be_built_or_would_be_ignored_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(**fields)
    assert str(caught.value) == message


def test_unknown_field_of_a_layer_is_refused_with_its_place() -> None:
    with pytest.raises(UserError, match=r"^model\.layers\[1\]: .*'windw'"):
        tiny_config([{"window": 4}, {"windw": 4}])


def test_layers_default_to_the_sliding_window_of_the_configuration() -> None:
    assert {(s.kind, s.window) for s in WindreachConfig().specs} == {("sliding", 4096)}
    assert {(s.kind, s.window) for s in WindreachConfig(sliding_window=None).specs} == {("full", None)}


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns about its own code
@pytest.mark.parametrize("layers", [[{"window": W}] * 2, [{"window": 130}, {"kind": "full"}]], ids=["blocks", "tiles"])
def test_compiled_layers_compute_the_same_and_keep_the_names_of_their_weights(
    layers: list,
) -> None:
    """Compiled by Inductor, as in training: packed and whole rows."""
    model, ids = tiny_model(layers).train(), token_ids(2, 150)
    documents = torch.arange(150)[None].expand(2, -1) // 60
    names, weights = list(model.state_dict()), list(model.parameters())
    inputs = ({"input_ids": ids}, {"input_ids": ids, "documents": documents})
    expected = [(model(**x).logits, gradients(model(**x).logits, weights)) for x in inputs]
    model.compile_layers()
    for x, (logits, grads) in zip(inputs, expected, strict=True):
        compiled = model(**x).logits
        torch.testing.assert_close(compiled, logits, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(gradients(compiled, weights), grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_a_reconfigured_model_is_the_model_that_the_config_describes() -> None:
    """In a longer row too, with and without a cache."""
    model, ids = tiny_model([{"window": W}] * 3), token_ids(2, T)
    model(ids)  # what a call keeps must not survive
    layers = [{"kind": "full"}, {"window": 3}, {"window": 9, "rope_theta": 77.0}]
    config = tiny_config(layers, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    other = WindreachForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(ids).logits, other(ids).logits)
    model.reconfigure(config)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert model.config is model.model.config is config
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))
