"""Several projections in one parameter: files, state dicts and adapters see them one by one."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from model.decoder import WindreachForCausalLM
from model.hub import save_hf
from model.projections import FUSED, Projection, fused_names, row_sizes
from tests.model.tiny import tiny_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
T = 23


def test_files_and_state_dicts_have_the_names_of_mistral_and_memory_has_one_matrix() -> None:
    model = tiny_model()
    names = {name.removeprefix("model.layers.0.") for name in model.state_dict() if "layers.0." in name}
    assert {f"self_attn.{p}.weight" for p in EVERY[:4]} | {f"mlp.{p}.weight" for p in EVERY[4:]} < names
    parameters = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.self_attn.qkv_weight" in parameters
    assert not [name for name in parameters if name.endswith(("q_proj.weight", "up_proj.weight"))]


def test_a_state_dict_of_single_projections_is_loaded_and_one_that_lacks_a_projection_names_it() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    state = {name: weight.clone() for name, weight in other.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model(token_ids(1, T)).logits, other(token_ids(1, T)).logits)
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"model\.layers\.1\.self_attn\.k_proj\.weight"'):
        model.load_state_dict(state)


def test_names_of_files_become_names_of_parameters_for_weights_and_for_moments() -> None:
    model = tiny_model()
    assert set(fused_names(model.state_dict())) == {name for name, _ in model.named_parameters()}
    moments = {f"text/exp_avg/{name}": weight for name, weight in model.state_dict().items()}
    moments |= {name.replace("exp_avg", "step"): torch.tensor(7.0) for name in moments}
    fused = fused_names(moments)
    assert torch.equal(
        fused["text/exp_avg/model.layers.0.mlp.gate_up_weight"], model.model.layers[0].mlp.gate_up_weight
    )
    assert fused["text/step/model.layers.0.self_attn.qkv_weight"] == 7.0


def test_row_sizes_name_every_fused_parameter() -> None:
    model = tiny_model()
    sizes = row_sizes(model)
    assert set(sizes) == {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in FUSED}
    assert sizes["model.layers.0.self_attn.qkv_weight"] == (32, 16, 16)


def test_assigning_to_the_data_of_a_projection_changes_the_matrix() -> None:
    model = tiny_model()
    projection = model.model.layers[0].self_attn.k_proj
    assert isinstance(projection, Projection)
    projection.weight.data = torch.ones(16, 32)
    assert (model.model.layers[0].self_attn.qkv_weight[32:48] == 1).all()
    assert not (model.model.layers[0].self_attn.qkv_weight[:32] == 1).any()


def with_lora(model: WindreachForCausalLM, targets: tuple[str, ...] | str) -> nn.Module:
    """Adapters that are not zero, so that they change the logits."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("targets", [EVERY, ("q_proj", "v_proj"), ("up_proj",), "all-linear"], ids=str)
def test_every_adapter_gets_a_gradient_and_training_equals_evaluation(targets: tuple[str, ...] | str) -> None:
    plain, ids = tiny_model(), token_ids(2, T)
    model = with_lora(copy.deepcopy(plain), targets)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    wrapped = len(EVERY) if targets == EVERY or targets == "all-linear" else len(targets)
    assert len(adapters) == 3 * 2 * wrapped  # layers, A and B
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    assert not any(p.grad is not None for name, p in model.named_parameters() if "lora_" not in name)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)


@pytest.mark.parametrize("safe", [False, True])
def test_merged_adapters_are_in_the_matrix_and_in_the_export(safe: bool, tmp_path: Path) -> None:
    model, ids = with_lora(tiny_model(), EVERY), token_ids(2, T)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        merged = model.merge_and_unload(safe_merge=safe)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert type(merged.model.layers[0].self_attn.q_proj) is Projection
        save_hf(merged, tmp_path)
        torch.testing.assert_close(
            WindreachForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("put", [lambda m: m.register_forward_hook, lambda m: m.register_forward_pre_hook])
def test_a_hook_on_a_projection_sees_its_call(put: Callable[[nn.Module], Callable[..., object]]) -> None:
    model, ids, calls = tiny_model(), token_ids(1, T), []
    expected = model(ids).logits
    put(model.model.layers[1].self_attn.v_proj)(lambda *_: calls.append(1))
    torch.testing.assert_close(model(ids).logits, expected)
    assert calls == [1]


def test_adapters_act_on_single_tokens_behind_a_cache() -> None:
    model, ids = with_lora(tiny_model(), EVERY).eval(), token_ids(2, T)
    with torch.no_grad():
        expected = model(ids).logits
        out = model(ids[:, :9], use_cache=True)
        logits: list[Tensor] = [out.logits]
        for token in ids[:, 9:].split(1, 1):
            logits.append(model(token, past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-4)


def test_biases_are_joined_too_and_an_adapter_on_one_projection_keeps_its_own(tmp_path: Path) -> None:
    model, ids = tiny_model(qkv_bias=True), token_ids(2, T)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.qkv_bias)
    expected = model(ids).logits
    assert {"q_proj.bias", "v_proj.weight"} < {name.partition("self_attn.")[2] for name in model.state_dict()}
    assert set(fused_names(model.state_dict())) == {name for name, _ in model.named_parameters()}
    save_hf(model, tmp_path)
    assert torch.equal(WindreachForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    expected.sum().backward()
    gradient = model.model.layers[0].self_attn.qkv_bias.grad
    assert gradient is not None
    assert gradient.split((32, 16, 16))[2].abs().max() > 0
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj"], init_lora_weights=True))
    torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=0)
