"""Models of `transformers` under our attention: the same logits as under theirs."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from model.errors import UserError
from model.hf_attention import NAME

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": 5, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=3)).eval()


def hybrid() -> Gemma3ForCausalLM:
    """Two sliding layers, then a full one; a query scale of its own."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, num_hidden_layers=3, layer_types=kinds, query_pre_attn_scalar=20)
    return Gemma3ForCausalLM(config).eval()


def ours(model: torch.nn.Module) -> torch.nn.Module:
    other = type(model)._from_config(model.config, attn_implementation=NAME).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("make", [mistral, hybrid])
@pytest.mark.parametrize("case", ["plain", "left-padded", "packed"])
def test_logits_are_those_of_transformers(make, case: str) -> None:
    theirs = make()
    ids = torch.randint(3, 60, (2, 41), generator=torch.Generator().manual_seed(1))
    arguments = {"input_ids": ids, "use_cache": False}
    real = torch.ones_like(ids, dtype=torch.bool)
    if case == "left-padded":
        real[1, :13] = False
        arguments["attention_mask"] = real.long()
    if case == "packed":
        arguments["position_ids"] = torch.cat((torch.arange(17), torch.arange(24)))[None].expand(2, -1)
    with torch.no_grad():
        expected, actual = (m(**arguments).logits for m in (theirs, ours(theirs)))
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [mistral, hybrid])
def test_generation_is_that_of_transformers(make) -> None:
    theirs = make()
    ids = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    a, b = (m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (theirs, ours(theirs)))
    assert a.tolist() == b.tolist()


def test_gradients_are_those_of_transformers() -> None:
    theirs = mistral()
    mine = ours(theirs)
    ids = torch.randint(3, 60, (2, 41), generator=torch.Generator().manual_seed(1))
    for model in (theirs, mine):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_loading_by_name(tmp_path) -> None:
    mistral().save_pretrained(tmp_path)
    loaded = MistralForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert loaded.config._attn_implementation == NAME


def test_what_it_can_not_do_is_refused() -> None:
    model = ours(mistral())
    ids = torch.randint(3, 60, (1, 12))
    with pytest.raises(UserError, match="2-d attention_mask"):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 12, 12), use_cache=False)
    with pytest.raises(UserError, match="dynamic cache"):
        model.generate(ids[:, :3], max_new_tokens=2, do_sample=False, cache_implementation="static")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="no dropout"):
        model.train()(input_ids=ids, use_cache=False)
