"""Whatever lies in a model folder, loading it gives a model or a sentence, in little time and memory.

MUTATED_FOLDERS=1000 sets the number of folders tried; 40 otherwise.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data.tokenizer import train_tokenizer
from eval import loss
from eval.models import Examined, load_model
from eval.report.runs import read_run
from model.decoder import WindreachForCausalLM
from model.errors import UserError, cli, printable, read_small_file
from model.hub import load_config, save_hf, weight_files
from tests.bounded import bounded
from tests.model.tiny import tiny_model

W = 5
STACKS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen3": {"qk_norm": True},
    "ministral": {"layers": [{"window": W}, {"kind": "full"}]},
    "windreach": {"layers": [{"window": W, "sink": True}, {"window": 3}]},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each type that we write."""
    folder = tmp_path_factory.mktemp("originals")
    tokenizer = train_tokenizer([" ".join(f"ship {i} came over the grey water" for i in range(400))], 330)
    for kind, fields in STACKS.items():
        save_hf(tiny_model(vocab_size=330, **fields), folder / kind, tokenizer=tokenizer)
    return folder


@pytest.fixture
def copied(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(originals / kind, tmp_path / "copy"))


def change(folder: Path, name: str = "config.json", **fields: Any) -> Path:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))
    return folder


# ---------------------------------------------------------------------------------------------------- sizes and values


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("num_hidden_layers", v) for v in (0, -1, 10**5, 10**9, None, "2", 1.5)],
        *[("hidden_size", v) for v in (0, 10**9, None, "x")],
        *[(name, v) for name in ("num_key_value_heads", "num_attention_heads") for v in (0, -4, 3, "2")],
        ("intermediate_size", 10**12), ("vocab_size", -1), ("vocab_size", 10**12), ("head_dim", 0), ("head_dim", -8),
        ("rope_parameters", "x"), ("rope_parameters", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        ("rms_norm_eps", "small"), ("tie_word_embeddings", "yes"),
        ("hidden_act", "gelu"), ("attention_dropout", 0.5),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_its_weights_is_refused_before_memory_is_taken(
    copied: Callable[[str], Path], kind: str, field: str, value: Any
) -> None:
    folder = change(copied(kind), **{field: value})
    with pytest.raises(UserError, match=r"config\.json"):
        WindreachForCausalLM.from_pretrained(folder)


def test_a_config_of_another_family_is_bounded_by_its_weights(copied: Callable[[str], Path]) -> None:
    folder = change(copied("mistral"), model_type="phi3", hidden_size=2**20, intermediate_size=2**22)
    with pytest.raises(UserError, match=r"config\.json describes [\d,]+ parameters, the files hold [\d,]+$"):
        load_model(str(folder), "cpu")
    change(folder, num_hidden_layers=10**6)
    with pytest.raises(UserError, match="num_hidden_layers is 1000000; give a whole number from 1 to 1,024"):
        load_model(str(folder), "cpu")


def test_a_header_that_claims_gigabytes_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("mistral")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 6 << 30))
        file.truncate(7 << 30)  # takes no room on the disk
    with pytest.raises(UserError, match="header too large"):
        WindreachForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(copied: Callable[[str], Path], value: float) -> None:
    folder = copied("mistral")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight holds a number that is not finite"):
        load_model(str(folder), "cpu")


def test_weights_that_overflow_are_refused_by_evaluations(
    untrained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(untrained_run, tmp_path / "run"))
    weights = load_file(run / "hf/model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, run / "hf/model.safetensors")
    monkeypatch.setattr("sys.argv", ["eval.loss", str(run)])
    assert cli(loss.main) == 2
    assert "the logits are not finite; its weights are too large or damaged" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- names and devices


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", ".."])
def test_an_index_that_leads_out_of_its_folder_is_refused(copied: Callable[[str], Path], name: str) -> None:
    folder = copied("mistral")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match=rf"holds no {name}; give the folder of a checkpoint"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model_folder_is_refused_and_not_waited_for(copied: Callable[[str], Path], name: str) -> None:
    folder = copied("mistral")
    (folder / "tokenizer.model").unlink()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="is no regular file; copy the model again"):
        load_model(str(folder), "cpu")


def test_devices_and_files_that_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/dev/zero: is a device or a pipe; give a regular file$"):
        read_small_file("/dev/zero", 10)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_small_file(tmp_path / "file", 10) == b"0123456789"
    with pytest.raises(UserError, match="is larger than 9 bytes, the most that is read"):
        read_small_file(tmp_path / "file", 9)


def test_a_name_can_not_command_a_terminal() -> None:
    assert printable("a\x1b]0;x\x07 \u202eb\r\n\tc") == "a\\x1b]0;x\\x07 \\u202eb\\r\n\tc"
    assert printable("café 日本 \U0001f469\u200d\U0001f52c") == "café 日本 \U0001f469\u200d\U0001f52c"


# -------------------------------------------------------------------------------------------------------- any damage

numbers = st.sampled_from([0, 1, -1, 2, 3, 7, 10**5, 10**9, 2**63, 0.5, -1.0, 1e30, float("nan")]) | st.integers(-9, 99)
words = st.sampled_from(["", "x", "mistral", "llama", "qwen2", "gpt2", "windreach", "float16", "\x1b[2J", "../.."])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


@settings(
    max_examples=int(os.environ.get("MUTATED_FOLDERS", 40)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # of the libraries, about what they read
def test_any_damage_to_a_model_folder_gives_a_model_or_a_user_error(originals: Path, data: st.DataObject) -> None:
    folder = originals / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals / data.draw(st.sampled_from(sorted(STACKS))), folder)
    if data.draw(st.booleans()):
        (folder / "tokenizer.model").unlink()
    for _ in range(data.draw(st.integers(1, 3))):
        file = folder / data.draw(st.sampled_from([*FILES[:1], *FILES, "model.safetensors", "tokenizer.model"]))
        content = file.read_bytes() if file.exists() else b""
        if file.name in FILES and data.draw(st.integers(0, 4)) and isinstance(tree := _json(content), dict):
            tree[data.draw(st.sampled_from(sorted(tree)))] = data.draw(values)
            file.write_text(json.dumps(tree))
            continue
        at = data.draw(st.integers(0, min(len(content), 3000)))  # in the header of safetensors, too
        file.write_bytes(content[:at] + data.draw(st.binary(max_size=3)) + content[at + data.draw(st.integers(0, 3)) :])
    with bounded(), suppress(UserError):
        assert isinstance(load_model(str(folder), "cpu"), Examined)


RESULT = {"model": "x", "settings": {}, "window": 8, "layers": 3, "reach": 21, "parameters": 9}
STATE = ("run.json", "settings.yaml", "recall.json", "metrics.jsonl")


@settings(
    max_examples=int(os.environ.get("MUTATED_FOLDERS", 40)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_any_damage_to_a_run_folder_gives_a_run_or_a_user_error(
    untrained_run: Path, tmp_path: Path, data: st.DataObject
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run, dirs_exist_ok=True)
    (run / "recall.json").write_text(json.dumps(RESULT))
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step": 2, "kind": "train"}\n')
    for name in data.draw(st.lists(st.sampled_from(STATE), min_size=1, unique=True)):
        content = (run / name).read_bytes()
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        snippet = st.sampled_from(
            [b"", b"*a", b"&a [", b"!!python/object:x ", b"[[", b'{"', b"\xff", b"1e999", b"\0", b"null"]
        )
        (run / name).write_bytes(content[:at] + data.draw(snippet | st.binary(max_size=4)) + content[end:])
    with bounded():
        with suppress(UserError):
            assert isinstance(load_model(str(run), "cpu").settings, dict)
        with suppress(UserError):
            assert all(isinstance(row, dict) for row in read_run(str(run)).metrics)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------------------- Llama


@torch.no_grad()
def test_a_llama_checkpoint_is_ours_and_computes_the_same(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    theirs, ids = LlamaForCausalLM(config).eval(), torch.arange(1, 60)[None]
    theirs.save_pretrained(tmp_path)
    ours = WindreachForCausalLM.from_pretrained(tmp_path)
    assert [spec.kind for spec in ours.config.specs] == ["full", "full"]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias is true; the decoder has biases of q, k and v alone"),
        ({"mlp_bias": True}, "mlp_bias is true; the decoder has biases of q, k and v alone"),
        ({"sliding_window": 5}, "sliding_window is 5, which a llama model ignores; remove it, or use mistral"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic'; the decoder knows only 'default'",
        ),
    ],
)
def test_a_llama_with_more_than_our_decoder_has_is_refused_before_its_weights_are_read(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | fields))  # there are no weights at all
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path), "cpu", ours_only=True)
