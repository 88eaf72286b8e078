"""Claims about models of other makers: windows are read from their configs, and every evaluation runs to its end."""

import contextlib
import io
import itertools
import json
import shutil
import sys

import pytest
import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from eval import loss, models, relay
from eval.models import load_model, specs_of
from eval.reach import __main__ as reach
from eval.recall import __main__ as recall
from model import windows
from model.errors import UserError, cli
from training.run.checkpoint import save_checkpoint

W = 5
SYLLABLES = ("ka", "lo", "mi", "ne", "su", "to", "ri")
WORDS = ["".join(part) for part in itertools.product(SYLLABLES, repeat=3)]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
SWITCH = {"sliding_window": W, "use_sliding_window": True}
KINDS = {  # model type: its own fields, and what its three layers see
    "mistral": ({"sliding_window": W}, "s s s"),
    "ministral": ({"sliding_window": W, "layer_types": ["sliding_attention", "full_attention"] * 2}, "s f s"),
    "phi3": ({"sliding_window": W}, "s s s"),
    "starcoder2": ({"sliding_window": W}, "s s s"),
    "qwen2": (SWITCH | {"max_window_layers": 1}, "f s s"),
    "qwen3": (SWITCH | {"max_window_layers": 0}, "s s s"),
    "gemma2": ({"sliding_window": W}, "s f s"),
    "gemma3_text": ({"sliding_window": W, "layer_types": ["sliding_attention"] * 3}, "s s s"),
    "gpt_oss": ({"sliding_window": W} | EXPERTS, "s f s"),
    "olmo3": ({"sliding_window": W}, "s s s"),
    "llama": ({}, "f f f"),
    "llama4_text": ({"attention_chunk_size": 8, "intermediate_size_mlp": 48} | EXPERTS, "c c c"),
    "mamba": ({"state_size": 8}, "f f f"),
    "gpt2": ({"n_positions": 128}, "f f f"),
}
TO_THE_END = ("ministral", "phi3", "qwen3", "gemma3_text", "gpt_oss", "llama4_text", "gpt2")


def config_of(kind, vocab_size=300):
    fields = KINDS[kind][0]
    layers = fields.get("layer_types")
    own = fields | ({"layer_types": layers[:3]} if layers else {})
    return AutoConfig.for_model(kind, **(SIZES | {"vocab_size": vocab_size} | own))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Sentences of 343 made-up words, so that a tokenizer has words to spare."""
    folder = tmp_path_factory.mktemp("text")
    words = [WORDS[(i * i * 17 + i * 5) % len(WORDS)] for i in range(12_000)]
    file = folder / "held-out.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="module")
def tokenizer(text_file):
    made = ByteLevelBPETokenizer()
    made.train([str(text_file)], vocab_size=800, min_frequency=1, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<end>")


def save_model(kind, tokenizer, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(kind, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    return cli(module.main)


def changes_seen(config, length=40):
    """(T,) bool: does the last position's output change when the token so far back does?"""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    row = torch.randint(3, 290, (length,))
    rows = row.repeat(length, 1)
    for d in range(length):
        rows[d, length - 1 - d] = row[length - 1 - d] % 290 + 1
    with torch.no_grad():
        before, after = (model(input_ids=x, use_cache=False, logits_to_keep=1).logits[:, -1] for x in (row[None], rows))
        alone = model(input_ids=row.repeat(length, 1), use_cache=False, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(before.expand_as(alone), alone, atol=1e-4)
    return (alone != after).any(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_read_from_the_config_and_are_those_of_the_librarys_own_code(kind):
    config = config_of(kind)
    specs = specs_of(config)
    assert " ".join(spec.kind[0] for spec in specs) == KINDS[kind][1]
    seen, reachable = changes_seen(config), windows.reachable(specs, 40)
    assert not (seen & ~reachable).any()
    farthest = int(seen.nonzero().max())
    assert farthest == int(reachable.nonzero().max())


def test_a_window_that_is_switched_off_is_no_window():
    config = AutoConfig.for_model("qwen2", **(SIZES | {"sliding_window": W, "use_sliding_window": False}))
    assert {spec.kind for spec in specs_of(config)} == {"full"}


def test_a_model_of_text_and_pictures_is_described_by_its_text_part():
    config = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 6, "sliding_window": 7})
    assert [spec.window for spec in specs_of(config)] == [7, 7, 7, 7, 7, None]


@pytest.mark.parametrize("kind", TO_THE_END)
def test_recall_reach_loss_and_relay_map_run_to_the_end(kind, tokenizer, text_file, tmp_path, monkeypatch, capsys):
    folder = save_model(kind, tokenizer, tmp_path / kind)
    common = (folder, "--out", tmp_path, "--text", text_file, "--device", "cpu")
    assert call(monkeypatch, recall, *common, "--n", 4, "--tasks", "needle", "--distances", "1,5,20") == 0
    assert call(monkeypatch, reach, *common, "--texts", 2) == 0
    assert call(monkeypatch, loss, *common, "--max-tokens", 4000, "--rows", 4) == 0
    assert call(monkeypatch, relay, *common, "--n", 8, "--max-offset", 30) == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("recall", "reach", "loss", "relay")}
    expected = windows.reach(specs_of(config_of(kind)))
    assert {result["reach"] for result in found.values()} == {expected}
    assert found["reach"]["cliff_holds"] is not False
    assert 1 < found["loss"]["bits_per_byte"] < 10
    predicted = found["reach"]["predictions"]
    assert bool(predicted) == (expected is not None and "c" not in KINDS[kind][1])
    assert not predicted or predicted["mixture_mean"] < expected
    assert found["relay"]["identical_beyond_frontier"] is True  # of unbounded stacks the embedding alone


def test_damaged_weights_of_another_maker_are_refused(tokenizer, tmp_path):
    folder = save_model("llama", tokenizer, tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors can't be read .* cut short"):
        load_model(str(folder), "cpu")


EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""


@pytest.mark.parametrize("beside", ["model", "tokenizer"])
def test_code_beside_the_weights_never_runs_even_when_a_pipe_says_yes(beside, tokenizer, tmp_path, monkeypatch):
    folder = save_model("llama", tokenizer, tmp_path / "llama")
    name, added = {
        "model": ("config.json", {"model_type": "evil", "auto_map": {
            "AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}}),
        "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {
            "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}}),
    }[beside]  # fmt: skip
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | added))
    (folder / "evil.py").write_text(EVIL)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(UserError):  # a tokenizer that the library can read without the code is read
        load_model(str(folder), "cpu")
    assert not list(tmp_path.rglob("ran"))
    if beside == "model":
        with pytest.raises(UserError, match="custom code"):
            load_model(str(folder), "cpu")


def test_a_mistral_whose_rope_our_decoder_lacks_is_left_to_the_library(tokenizer, tmp_path):
    config = config_of("mistral", len(tokenizer))
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    examined = load_model(str(tmp_path), "cpu")
    assert not examined.ours
    assert examined.reach == 3 * (W - 1)


@pytest.fixture
def own_type(untrained_run, tmp_path):
    """A checkpoint that only our type can express, and its config."""
    folder = shutil.copytree(untrained_run / "hf", tmp_path / "hf")
    fields = json.loads((folder / "config.json").read_text())
    layers = [{"kind": "sliding", "window": 8}, {"kind": "full"}, {"kind": "dilated", "window": 4, "dilation": 2}]
    return folder, fields | {"model_type": "windreach", "layers": layers}


def test_a_checkpoint_of_our_own_type_is_loaded(own_type):
    folder, fields = own_type
    (folder / "config.json").write_text(json.dumps(fields))
    examined = load_model(str(folder), "cpu")
    assert examined.ours
    assert [spec.kind for spec in examined.specs] == ["sliding", "full", "dilated"]


def test_a_broken_config_of_our_own_type_is_refused(own_type):
    folder, fields = own_type
    fields["layers"][0]["kind"] = "slidng"
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"model\.layers\[0\]: layer kind 'slidng' is unknown"):
        load_model(str(folder), "cpu")
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_model(str(folder), "cpu")


@pytest.fixture
def two_checkpoints(untrained_run, tmp_path):
    for step in (1, 2):
        tensors = {"moment": torch.zeros(1)}
        save_checkpoint(
            tmp_path, step, {}, tensors, lambda hf: shutil.copytree(untrained_run / "hf", hf, dirs_exist_ok=True)
        )
    shutil.copy(untrained_run / "settings.yaml", tmp_path)
    return [tmp_path / f"checkpoints/step-{step:06d}" for step in (1, 2)]


def test_a_checkpoint_that_training_deletes_meanwhile_leads_to_the_next_one(two_checkpoints, tmp_path, monkeypatch):
    load = models.load_weights

    def load_late(folder, *rest):
        shutil.rmtree(two_checkpoints[1], ignore_errors=True)
        return load(folder, *rest)

    monkeypatch.setattr(models, "load_weights", load_late)
    assert load_model(str(tmp_path), "cpu").folder == two_checkpoints[0] / "hf"
    with pytest.raises(UserError, match="no such folder"):
        load_model(str(two_checkpoints[1]), "cpu")


@pytest.mark.parametrize("below", ["", "hf"])
def test_a_flipped_bit_in_a_checkpoint_is_refused(two_checkpoints, below):
    file = two_checkpoints[0] / "hf/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"hf/model\.safetensors has another size or sha256 than when it was written"):
        load_model(str(two_checkpoints[0] / below), "cpu")


def test_the_settings_of_a_run_lead_to_its_own_window(untrained_run):
    examined = load_model(str(untrained_run), "cpu")
    described = yaml.safe_load((untrained_run / "settings.yaml").read_text())
    assert examined.window == described["model"]["sliding_window"]
