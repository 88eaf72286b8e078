"""Write tiny random models with one window in all layers: OUT/hf for transformers, OUT/NAME.gguf for llama.cpp.

    python results/conformance/served/make_models.py OUT      # needs `pip install gguf`

All have 4 layers and W = 8, so R = 28, and large weights, so that influence does not fade below float32.
olmo2.gguf has the architecture of OLMo 3, whose window llama.cpp knows. olmo2-w9.gguf is the same with W = 9.
llama.gguf has the architecture that Mistral models get in llama.cpp.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from eval.conformance.served import WORDS

LAYERS, WINDOW, HIDDEN, HEADS, FEED_FORWARD, VOCABULARY, CONTEXT = 4, 8, 64, 4, 128, 2048, 4096


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE that knows our words, filled up to VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, f" {WORDS}"] * 2, trainer)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(VOCABULARY - tokenizer.get_vocab_size())])
    return tokenizer


def write_hf(folder: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, sliding_window=WINDOW, max_position_embeddings=CONTEXT,
        initializer_range=0.2, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


def write_gguf(path: Path, arch: str, window: int, tokenizer: Tokenizer) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern([True] * LAYERS)
    writer.add_vocab_size(VOCABULARY)
    add_tokenizer(writer, tokenizer)
    for name, tensor in random_tensors(arch).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: object, tokenizer: Tokenizer) -> None:
    import json

    from gguf import GGUFWriter, TokenType

    assert isinstance(writer, GGUFWriter)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (VOCABULARY - 1))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def random_tensors(arch: str) -> dict[str, np.ndarray]:
    """float32 weights (outputs, inputs) by their names in a GGUF file."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 0.2, (rows, columns)).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    norms = {"olmo2": ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")}.get(
        arch, ("attn_norm", "ffn_norm")
    )
    tensors = {"token_embd.weight": matrix(VOCABULARY, HIDDEN), "output_norm.weight": ones}
    tensors["output.weight"] = matrix(VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        tensors |= {f"blk.{i}.{name}.weight": ones for name in norms}
        tensors |= {f"blk.{i}.attn_{name}.weight": matrix(HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        tensors |= {f"blk.{i}.ffn_{name}.weight": matrix(FEED_FORWARD, HIDDEN) for name in ("gate", "up")}
        tensors[f"blk.{i}.ffn_down.weight"] = matrix(HIDDEN, FEED_FORWARD)
    return tensors


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    write_hf(out / "hf", tokenizer)
    write_gguf(out / "olmo2.gguf", "olmo2", WINDOW, tokenizer)
    write_gguf(out / "olmo2-w9.gguf", "olmo2", WINDOW + 1, tokenizer)
    write_gguf(out / "llama.gguf", "llama", WINDOW, tokenizer)


if __name__ == "__main__":
    main()
