"""Switches of the decoder that change what is trained or what it costs, not what a layer may see."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.hub import exported_type, load_config, save_hf
from tests.model.tiny import VOCAB, tiny_config, tiny_model, token_ids

W, T = 5, 37


def gradients(checkpointing: bool) -> list[torch.Tensor]:
    model = tiny_model(qk_norm=True).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    ids = token_ids(2, T)
    model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_recomputed_activations_give_the_same_gradients_to_the_bit() -> None:
    kept, recomputed = gradients(False), gradients(True)
    assert len(kept) == len(list(tiny_model(qk_norm=True).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_recomputation_keeps_a_layers_input_and_little_else() -> None:
    saved = {}
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            model.model(token_ids(2, T))
        saved[checkpointing] = sum(sizes)
    assert saved[True] < saved[False] / 4


def test_normalised_queries_and_keys_do_not_depend_on_the_size_of_their_projections() -> None:
    ids = token_ids(1, T)
    for qk_norm in (True, False):
        model = tiny_model(qk_norm=qk_norm).double()
        before = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 10
        assert torch.allclose(model(ids).logits, before, atol=1e-4) == qk_norm


@pytest.mark.parametrize("layers", [None, [{"kind": "full"}] * 2, [{"window": W}, {"kind": "full"}, {"window": W}]])
@torch.no_grad()
def test_with_qk_norm_a_stack_is_a_qwen3_checkpoint_and_back(tmp_path: Path, layers: list | None) -> None:
    ours, ids = tiny_model(layers, qk_norm=True), token_ids(2, T)
    for layer in ours.model.layers:  # scales of one would hide that they are dropped
        layer.self_attn.q_norm.weight.uniform_(0.5, 2.0)
        layer.self_attn.k_norm.weight.uniform_(0.5, 2.0)
    save_hf(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is Qwen3ForCausalLM
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    back = WindreachForCausalLM.from_pretrained(tmp_path / "theirs")
    assert back.config.specs == ours.config.specs
    assert torch.equal(back(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_what_qwen3_cannot_say_is_saved_under_our_own_type(tmp_path: Path) -> None:
    for layers in ([{"window": W}, {"window": W + 1}], [{"window": W, "sink": True}], [{"window": W, "rope": False}]):
        ours, ids = tiny_model(layers, qk_norm=True), token_ids(1, T)
        save_hf(ours, tmp_path)
        assert load_config(tmp_path).model_type == "windreach"
        assert torch.equal(WindreachForCausalLM.from_pretrained(tmp_path)(ids).logits, ours(ids).logits)


def test_without_qk_norm_nothing_is_qwen3_and_with_it_nothing_is_mistral() -> None:
    assert [exported_type(tiny_config(qk_norm=norm)) for norm in (False, True)] == ["mistral", "qwen3"]


def test_qwen3_with_biases_is_refused(tmp_path: Path) -> None:
    Qwen3Config(vocab_size=VOCAB, num_hidden_layers=2, attention_bias=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="attention_bias is true; the decoder has biases of q, k and v alone"):
        load_config(tmp_path)


@torch.no_grad()
def test_ring_holds_normalised_keys() -> None:
    model, ids = tiny_model(qk_norm=True), token_ids(1, T)
    cache = RingCache(model.config)
    parts = [model(ids[:, i : i + 7], past_key_values=cache).logits for i in range(0, T, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-5, rtol=0)
