"""Claims about `python -m eval.needs`: what it writes, and the sentence for each mistake."""

import json
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from eval.models import Examined, specs_of
from eval.needs import __main__ as needs
from model.errors import UserError, cli


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit code and both streams of the command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["needs", *map(str, arguments)])
        return cli(needs.main), *capsys.readouterr()

    return run


def test_files_patterns_tables_and_configs_become_texts_of_one_result(run, untrained_run, tmp_path):
    lines = (untrained_run.parent / "heldout.txt").read_text().splitlines()
    for i in range(12):
        (tmp_path / f"part{i}.txt").write_text("\n".join(lines[i * 20 : i * 20 + 20]))
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"body": "\n".join(lines[i::9])}) for i in range(9)))
    texts = untrained_run / "settings.yaml", f"parts={tmp_path}/part*.txt", f"chats={tmp_path}/chats.jsonl"
    options = "--contexts", "4,16", "--tokens", 320, "--text-column", "body", "--out", tmp_path
    code, out, _ = run(*texts, "--model", untrained_run, *options)
    assert code == 0
    result = json.loads((tmp_path / "needs.json").read_text())
    assert [(t["text"], t["documents"], t["unit"]) for t in result["texts"][1:]] == [
        ("parts", 12, "documents"), ("chats", 9, "excerpts"),
    ]  # fmt: skip
    assert all(text["tokens"] >= 320 for text in result["texts"])
    assert result["together"]["tokens"] == sum(text["tokens"] for text in result["texts"])
    assert result["together"]["units"] == sum(text["units"] for text in result["texts"])
    assert (tmp_path / "needs.png").stat().st_size > 10_000
    assert "parts: 3" in out
    assert "all texts" in out


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("missing.txt", [], "TEXT 'missing.txt': data.heldout_files: no such file: 'missing.txt'"),
        ("eval", [], "or name a file, or a pattern such as 'docs/**/*.md'"),
        ("README.md", ["--contexts", "16"], "--contexts 16: give at least two, such as 16,64"),
        ("README.md", ["--contexts", "4,64"], "reads 22 tokens (its training length or its reach), and a pass needs a"),
        ("LICENSE", ["--contexts", "4,16", "--tokens", "9999"], "excerpts, and an interval needs at least 10"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(run, untrained_run, tmp_path, text, options, sentence):
    if text == "LICENSE":
        text = tmp_path / "short.txt"
        text.write_text("the sea was calm")
    code, _, errors = run(text, "--model", untrained_run, "--out", tmp_path, *options)
    assert code == 2
    assert sentence in errors


def test_contexts_beyond_the_training_length_of_a_model_with_full_attention_are_refused():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, max_position_embeddings=320)
    model = LlamaForCausalLM(config)
    examined = Examined("peer", model, tokenizer=None, specs=specs_of(config), folder=None, run_dir=None)
    assert needs.contexts_of(examined, None, 8192) == (16, 64, 256)
    with pytest.raises(UserError, match=r"--contexts 512: peer reads 320 tokens .*; give contexts up to 256"):
        needs.contexts_of(examined, (16, 512), 8192)
