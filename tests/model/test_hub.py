"""Checkpoints travel between this repository and transformers, and what can't travel is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MinistralConfig, MinistralForCausalLM, MistralConfig, MistralForCausalLM

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.hub import load_config, save_hf
from tests.model.tiny import VOCAB, tiny_config, tiny_model, token_ids

W, T = 5, 37
MIXED = [{"window": W}, {"kind": "full"}]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@torch.no_grad()
def test_ours_to_transformers_and_back_computes_the_same(tmp_path: Path, tied: bool) -> None:
    ours, ids = tiny_model(tie_word_embeddings=tied), token_ids(2, T)
    save_hf(ours, tmp_path / "ours")
    theirs = MistralForCausalLM.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    back = WindreachForCausalLM.from_pretrained(tmp_path / "theirs")
    expected = ours(ids).logits
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(back(ids).logits, expected)
    assert back.config.specs == ours.config.specs
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied


@torch.no_grad()
def test_model_of_transformers_computes_the_same_here(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": W, "tie_word_embeddings": tied}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    theirs = MistralForCausalLM(MistralConfig(**sizes, **heads, **rope, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert tied or len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = token_ids(2, T)
    torch.testing.assert_close(
        WindreachForCausalLM.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_ministral_keeps_its_full_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MinistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=W, layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )  # fmt: skip
    theirs, ids = MinistralForCausalLM(config).eval(), token_ids(2, T)
    theirs.save_pretrained(tmp_path)
    ours = WindreachForCausalLM.from_pretrained(tmp_path)
    assert [s.kind for s in ours.config.specs] == ["sliding", "full"]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_rope_theta_of_an_old_configuration_is_honoured(tmp_path: Path) -> None:
    fields = MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).to_dict()
    fields.pop("rope_parameters")
    for theta in (1e6, 1e4):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_theta": theta}))
        assert load_config(tmp_path).rope_base == theta


def written_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "layers",
    [
        [{"window": W}, {"window": W + 1}],
        [{"kind": "chunked", "window": W}] * 2,
        [{"kind": "dilated", "window": W, "dilation": 2}] * 2,
        [{"window": W, "global_tokens": 1}] * 2,
        [{"window": W, "sink": True}] * 2,
        [{"window": W, "rope_theta": 5.0}] * 2,
    ],
)
@torch.no_grad()
def test_stack_that_no_other_type_can_express_is_saved_as_ours(tmp_path: Path, layers: list[dict]) -> None:
    model, ids = tiny_model(layers), token_ids(2, T)
    save_hf(model, tmp_path)
    written = written_config(tmp_path)
    assert written["model_type"] == "windreach"
    assert written["architectures"] == ["WindreachForCausalLM"]
    assert "layer_types" not in written
    with pytest.raises(ValueError, match="windreach"):
        AutoConfig.from_pretrained(tmp_path)
    back = WindreachForCausalLM.from_pretrained(tmp_path)
    assert back.config.specs == model.config.specs
    assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("layers", "sliding_window", "written_window"),
    [([{"window": W}] * 2, None, W), ([{"window": W}] * 2, 9, W), ([{"kind": "full"}] * 2, 9, None)],
)
def test_equal_plain_layers_are_mistral_whatever_the_top_field_said(
    tmp_path: Path, layers: list[dict], sliding_window: int | None, written_window: int | None
) -> None:
    save_hf(tiny_model(layers, sliding_window=sliding_window), tmp_path)
    written = written_config(tmp_path)
    assert (written["model_type"], written["sliding_window"]) == ("mistral", written_window)
    assert not {"layers", "layer_types", "attention_backend"} & set(written)


def test_tied_matrix_is_written_once(tmp_path: Path, tied: bool) -> None:
    save_hf(tiny_model(tie_word_embeddings=tied), tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


def test_names_of_a_compiled_model_are_plain(tmp_path: Path) -> None:
    model = tiny_model()
    names = set(load_file(saved(tmp_path / "plain", model) / "model.safetensors"))
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert set(load_file(saved(tmp_path / "compiled", model) / "model.safetensors")) == names


def saved(folder: Path, model: object = None) -> Path:
    save_hf(model or tiny_model(), folder)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_one_asked_for_and_the_one_written(tmp_path: Path, dtype: torch.dtype) -> None:
    model = WindreachForCausalLM.from_pretrained(saved(tmp_path / "first"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert written_config(saved(tmp_path / "second", model))["dtype"] == str(dtype).removeprefix("torch.")


def test_the_librarys_way_to_load_is_ours(tmp_path: Path) -> None:
    model, ids = tiny_model(), token_ids(1, 20)
    model.save_pretrained(tmp_path)
    assert torch.equal(WindreachForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_backend_is_the_one_asked_for(tmp_path: Path) -> None:
    assert (
        WindreachForCausalLM.from_pretrained(saved(tmp_path), backend="reference").config.attention_backend
        == "reference"
    )


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_cut_short_weights_are_refused_with_a_remedy(tmp_path: Path, left: int) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=r"model\.safetensors can't be read .* cut short, take an older checkpoint$"):
        WindreachForCausalLM.from_pretrained(tmp_path)


def test_cut_short_configuration_is_refused_with_a_remedy(tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(UserError, match=r"config\.json is not JSON .* cut short, take an older one$"):
        WindreachForCausalLM.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing; give the folder of a checkpoint$"):
        WindreachForCausalLM.from_pretrained(tmp_path)
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors; give the folder of a checkpoint$"):
        WindreachForCausalLM.from_pretrained(tmp_path)


def test_file_in_the_format_of_mistral_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    expected = tiny_model(seed=3)
    save_file({"tok_embeddings.weight": torch.zeros(2)}, saved(tmp_path, expected) / "consolidated.safetensors")
    got = WindreachForCausalLM.from_pretrained(tmp_path).state_dict()
    assert got.keys() == expected.state_dict().keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.state_dict().items())


def test_an_old_copy_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(2)}, saved(tmp_path) / "model_old.safetensors")
    assert WindreachForCausalLM.from_pretrained(tmp_path).model.norm.weight.eq(1).all()


def test_weights_in_several_files_are_those_that_the_index_names(tmp_path: Path) -> None:
    weights = load_file(saved(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    placed = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(placed.values()):
        save_file({name: weights[name] for name in placed if placed[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    got = WindreachForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(got["model.norm.weight"], weights["model.norm.weight"])
    for wrong in ("../model.safetensors", "model-00003-of-00002.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": wrong}}))
        with pytest.raises(UserError, match=f"holds no {wrong}; give the folder of a checkpoint"):
            WindreachForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_lack_a_matrix_are_refused(tmp_path: Path, name: str, tied: bool) -> None:
    file = saved(tmp_path, tiny_model(tie_word_embeddings=tied)) / "model.safetensors"
    weights = load_file(file)
    weights.pop(name)
    save_file(weights, file)
    with pytest.raises(UserError, match=rf"weights and config\.json don't belong together: [\s\S]*{name}"):
        WindreachForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tiny_config(intermediate_size=64).save_pretrained(saved(tmp_path))
    with pytest.raises(UserError, match="don't belong together"):
        WindreachForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", None, 3])
def test_other_architectures_are_refused(tmp_path: Path, kind: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        UserError, match=rf"model_type is {kind!r}; this loader knows .*, qwen3, smollm3 and windreach$"
    ):
        WindreachForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_scaled_positions_are_written_for_old_readers_and_for_new_ones(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    rope = {"rope_parameters": scaling | {"rope_theta": 50.0}, "max_position_embeddings": 64}
    ours, ids = tiny_model(MIXED, **rope), token_ids(2, T)
    save_hf(ours, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["rope_scaling"], fields["rope_theta"]) == (scaling, 50.0)
    theirs = MinistralForCausalLM.from_pretrained(tmp_path).eval()
    expected = ours(ids).logits
    for read in (WindreachForCausalLM.from_pretrained(tmp_path), theirs):
        torch.testing.assert_close(read(ids).logits, expected, atol=1e-4, rtol=0)
    fields.pop("rope_parameters")  # as transformers 4 sees it
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert torch.equal(WindreachForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_rope_that_depends_on_the_length_is_refused_and_not_ignored(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "rope_parameters": rope}))
    with pytest.raises(UserError, match=r"rope_type is 'dynamic'; the decoder knows only 'default'"):
        load_config(tmp_path)
