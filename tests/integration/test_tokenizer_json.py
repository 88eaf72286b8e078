"""A run with a byte-level tokenizer.json: trained, killed, resumed, evaluated, continued, exported."""

import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from data.tokenizer import load_tokenizer
from eval.haystack import open_haystack
from eval.loss import bits_per_byte
from eval.models import load_model
from model.decoding import Sampler
from model.errors import UserError
from scripts.export import export
from scripts.generate import Conversation
from tests.integration.tiny_run import SENTENCE, kill_after_step, losses, run, settings, write_text
from training.settings.schema import Settings


def write_tokenizer(folder: Path) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, marker = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=marker, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    backend.train_from_iterator([(folder / "train.txt").read_text()], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_text(folder)
    values = settings(folder)
    values["data"]["tokenizer"] = {"model_file": str(write_tokenizer(folder))}
    config = folder / "tiny.yaml"
    config.write_text(Settings.model_validate(values).model_dump_json())  # JSON is YAML
    return config


def test_a_run_with_a_tokenizer_json_is_resumed_evaluated_continued_and_exported(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    run(write_config(whole))
    config = write_config(folder)
    assert kill_after_step(folder, config, 4, signal.SIGTERM) == 75
    run(config)
    assert losses(folder) == losses(whole)

    ours, examined = load_tokenizer(folder / "tokenizer.json"), load_model(str(folder / "run"), "cpu")
    assert examined.tokenizer.sha256 == examined.facts["tokenizer_sha256"] == ours.sha256
    assert 1 < bits_per_byte(examined, open_haystack(examined), 64, 21)["bits_per_byte"] < 10
    talk = Conversation(examined, Sampler(0.0, 1.0), [])
    talk.say("The sea")
    assert "".join(talk.answer(10))
    export(examined, tmp_path / "exported", "float32")
    text = SENTENCE + " 漢字 🙂\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").encode(text) == [ours.bos_id, *ours.encode(text)]
    assert AutoTokenizer.from_pretrained(folder / "run/hf").encode(text) == ours.encode(text)

    (folder / "run/tokenizer/tokenizer_config.json").write_text('{"eos_token": "!"}')
    (folder / "run/hf/tokenizer_config.json").write_text('{"eos_token": "!"}')
    with pytest.raises(UserError, match="put back the files of the run's own tokenizer/"):
        load_model(str(folder / "run"), "cpu")
