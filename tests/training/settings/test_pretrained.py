"""What a config takes over from a pretrained model, and what it may not contradict. Nothing here needs weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.errors import UserError
from training.settings.config_file import load_settings
from training.settings.schema import Settings

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "rope_theta": 5e5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    return write_model(tmp_path / "pretrained")


def write_model(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | fields))
    return folder


def write(pretrained: Path | str, folder: Path | None = None, **model: Any) -> Path:
    """A config in `folder` that starts from `pretrained`, with further settings of the model."""
    folder = folder or Path(pretrained).parent
    tree = {
        "name": "tuned", "model": {"init": {"from_pretrained": str(pretrained)}} | model,
        "data": {"seq_len": 256}, "training": {"max_steps": 200, "tokens_per_step": 512},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree | {"run_dir": str(folder / "run")}))
    return folder / "run.yaml"


def read(*arguments: Any, **model: Any) -> Settings:
    return load_settings(write(*arguments, **model))


def refusal(*arguments: Any, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments, **model)
    return str(caught.value)


def test_sizes_positions_layers_and_tokenizer_are_those_of_the_model(pretrained: Path) -> None:
    settings = read(pretrained)
    m = settings.model
    sizes = (m.hidden_size, m.intermediate_size, m.num_hidden_layers, m.num_attention_heads, m.num_key_value_heads)
    assert sizes == (64, 96, 8, 4, 2)
    assert (m.head_dim, m.vocab_size, m.rms_norm_eps, m.tie_word_embeddings) == (16, 300, 1e-6, True)
    assert (m.rope_theta, m.rope_scaling, m.max_position_embeddings) == (5e5, None, 2048)
    assert [layer.kind for layer in m.layers] == ["full"]
    assert settings.data.tokenizer.model_file == str(pretrained)


def test_a_chat_model_is_read_with_the_tokenizer_that_knows_its_chats(pretrained: Path) -> None:
    for file in ("tokenizer.model", "tokenizer.json"):
        (pretrained / file).touch()
    assert read(pretrained).data.tokenizer.model_file == str(pretrained)
    (pretrained / "chat_template.jinja").touch()
    assert read(pretrained).data.tokenizer.model_file == str(pretrained / "tokenizer.json")


def test_settings_of_a_run_say_all_and_need_the_model_no_more(pretrained: Path) -> None:
    settings = read(pretrained, sliding_window=32, layers=[{"kind": "sliding"}, {"kind": "full"}])
    saved = pretrained.parent / "settings.yaml"
    saved.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    shutil.rmtree(pretrained)
    assert load_settings(saved) == settings


def test_a_run_that_has_begun_is_read_without_its_model(pretrained: Path) -> None:
    config = write(pretrained, sliding_window=32, layers=[{"kind": "sliding"}, {"kind": "full"}])
    settings = load_settings(config)
    shutil.rmtree(pretrained)
    with pytest.raises(UserError, match="there is no such folder"):
        load_settings(config)
    (pretrained.parent / "run").mkdir()
    (pretrained.parent / "run/settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(config) == settings


@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [("hidden_size", 128, 64), ("num_hidden_layers", 6, 8), ("vocab_size", 299, 300), ("head_dim", 8, 16),
     ("rms_norm_eps", 1e-5, 1e-6), ("tie_word_embeddings", False, True), ("qk_norm", True, False)],
)  # fmt: skip
def test_a_size_that_contradicts_the_weights_is_refused(pretrained: Path, name: str, value: Any, theirs: Any) -> None:
    said = refusal(pretrained, **{name: value})
    assert f"model.{name} = {value!r}" in said
    assert f"the pretrained model has {theirs!r}; remove it" in said


def test_a_size_that_agrees_is_no_contradiction(pretrained: Path) -> None:
    assert read(pretrained, hidden_size=64).model.hidden_size == 64


def test_both_ways_to_start_are_refused_together(pretrained: Path) -> None:
    init = {"from_pretrained": str(pretrained), "grow_from": "runs/small"}
    said = refusal(pretrained, init=init)
    assert "model.init.grow_from is given too; remove one of them" in said


def test_ways_to_draw_weights_have_no_effect_and_are_refused(pretrained: Path) -> None:
    said = refusal(pretrained, init={"from_pretrained": str(pretrained), "embedding_std": 0.1})
    assert "model.init.embedding_std = 0.1" in said
    assert "the weights are those of the pretrained model, so it has no effect; remove it" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such/folder", "there is no such folder, and the local cache of the hub has no such model; give a folder"),
        ("none.gguf", "there is no such file; give a .gguf file"),
        ("{}/empty", "empty/config.json is missing; give the folder of a checkpoint"),
        ("{}/broken", "broken/config.json is not JSON"),
        ("{}/gpt2", "model_type is 'gpt2'; this loader knows"),
        ("{}/biases", "attention_bias is true; the decoder has biases of q, k and v alone"),
        ("{}/deep", "num_hidden_layers is 1000000000; give a whole number from 1 to 1,024"),
        ("{}/odd", "its config.json is damaged (TypeError"),
    ],
)
def test_a_model_that_can_not_be_used_is_refused_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (write_model(tmp_path / "broken") / "config.json").write_text("{")
    write_model(tmp_path / "gpt2", model_type="gpt2")
    write_model(tmp_path / "biases", attention_bias=True)
    write_model(tmp_path / "deep", num_hidden_layers=10**9)
    write_model(tmp_path / "odd", hidden_size="large")
    said = refusal(name.format(tmp_path), folder=tmp_path)
    assert "model.init.from_pretrained = " in said
    assert reason in said


def test_the_folder_of_a_run_is_refused_with_the_folder_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run/hf")
    assert f"this is the folder of a run; give its model, {tmp_path}/run/hf" in refusal(
        f"{tmp_path}/run", folder=tmp_path
    )


# -- layers ------------------------------------------------------------------------------------------------------------


def layers_of(settings: Settings) -> list[dict[str, Any]]:
    return [layer.model_dump(exclude_defaults=True) for layer in settings.model.layers]


def test_windows_are_put_on_layers_and_what_the_weights_need_stays(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pretrained", model_type="smollm3", no_rope_layers=[1, 1, 1, 0] * 2)
    settings = read(folder, sliding_window=32, layers=[{"kind": "sliding"}])
    assert layers_of(settings) == [{}, {}, {}, {"rope": False}]
    assert {layer.kind for layer in settings.model.layers} == {"sliding"}


def test_a_layer_may_say_that_it_differs_from_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pretrained", model_type="smollm3", no_rope_layers=[1, 0] * 4)
    settings = read(folder, layers=[{"kind": "full", "rope": True}])
    assert layers_of(settings) == [{"kind": "full"}]


def test_windows_of_the_model_are_those_of_the_run_unless_it_gives_another(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pretrained", model_type="mistral", sliding_window=100)
    for given, window in (({}, 100), ({"sliding_window": 50}, 50)):
        settings = read(folder, **given)
        assert settings.model.sliding_window == window
        assert layers_of(settings) == [{}]


def test_a_window_that_no_layer_would_take_is_refused(pretrained: Path) -> None:
    said = refusal(pretrained, sliding_window=32)
    assert "model.sliding_window = 32" in said
    assert "no layer of the pretrained model takes it; add model.layers, such as [{kind: sliding}]" in said


def test_a_sliding_layer_needs_a_window(pretrained: Path) -> None:
    assert "model.sliding_window" in refusal(pretrained, layers=[{"kind": "sliding"}])
    assert read(pretrained, layers=[{"kind": "sliding", "window": 40}]).model.sliding_window == 40


def test_a_pattern_with_more_layers_than_the_model_is_refused(pretrained: Path) -> None:
    pattern = [{"kind": "full", "rope_theta": float(i)} for i in range(1, 10)]
    assert "the pattern has 9 layers, the model 8" in refusal(pretrained, layers=pattern)


# -- positions ---------------------------------------------------------------------------------------------------------


def test_scaling_starts_from_the_context_of_the_model_and_sets_the_longest_row(pretrained: Path) -> None:
    m = read(pretrained, rope_scaling={"rope_type": "yarn", "factor": 4}).model
    assert m.rope_scaling is not None
    assert (m.rope_scaling.original_max_position_embeddings, m.max_position_embeddings) == (2048, 8192)


def test_scaling_of_the_model_is_kept(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    m = read(write_model(tmp_path / "pretrained", rope_scaling=scaling)).model
    assert m.rope_scaling is not None
    assert m.rope_scaling.model_dump(exclude_none=True) == scaling
    assert m.max_position_embeddings == 2048


def test_llama3_without_its_limits_is_refused(pretrained: Path) -> None:
    said = refusal(pretrained, rope_scaling={"rope_type": "llama3", "factor": 4})
    assert "llama3 needs high_freq_factor above low_freq_factor; give both" in said


def test_the_built_in_model_is_planned_without_being_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = read("smollm2", folder=tmp_path)
    assert (settings.model.num_hidden_layers, settings.data.tokenizer.model_file) == (30, "smollm2")
    assert not (tmp_path / ".cache").exists()


def test_a_contradiction_is_found_without_torch(pretrained: Path) -> None:
    config = write(pretrained, hidden_size=3)
    run = [sys.executable, "-X", "importtime", "train.py", str(config)]
    root = Path(__file__).parents[3]
    result = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "the pretrained model has 64; remove it" in result.stderr
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not modules & {"torch", "transformers"}
