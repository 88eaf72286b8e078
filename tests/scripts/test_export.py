import io
import json
import resource
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedTokenizerFast, pipeline

from data.tokenizer import HubTokenizer, SentencePieceTokenizer, to_hugging_face, train_tokenizer
from eval.models import Examined
from model.config import WindreachConfig
from model.decoder import build_model
from model.decoding import Sampler
from model.errors import UserError, cli
from model.hub import save_hf
from scripts import export
from scripts.generate import Conversation
from tests.model.tiny import tiny_model

TEXT = " ".join(f"ship {i} came slowly over the grey water of the bay while birds cried" for i in range(400))


def trained(config: WindreachConfig) -> Examined:
    tokenizer = train_tokenizer([TEXT], config.vocab_size)
    model = build_model(config, seed=1).eval()
    return Examined(name="tiny", model=model, tokenizer=tokenizer, specs=config.specs, folder=None, run_dir=None)


def test_the_export_is_a_mistral_with_the_same_logits(tiny_config: WindreachConfig, tmp_path: Path) -> None:
    tiny_config.vocab_size = 330
    examined = trained(tiny_config)
    assert export.export(examined, tmp_path / "out", "float32") == "mistral"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, MistralForCausalLM)
    ids = torch.tensor([examined.tokenizer.encode(TEXT[:200])])
    assert ids.shape[1] > 3 * tiny_config.sliding_window
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, examined.model(ids).logits, atol=1e-4, rtol=0)


def test_a_pipeline_of_transformers_reads_and_writes_what_generate_does(
    tiny_config: WindreachConfig, tmp_path: Path
) -> None:
    tiny_config.vocab_size = 330
    examined = trained(tiny_config)
    export.export(examined, tmp_path / "out", "float32")
    talk = Conversation(examined, Sampler(), ())
    talk.say(TEXT[:100])
    prompt = talk.unread
    tokens = list(talk._tokens(12))
    made = pipeline("text-generation", str(tmp_path / "out"))(
        TEXT[:100], max_new_tokens=12, do_sample=False, return_tensors=True
    )
    assert made[0]["generated_token_ids"] == prompt + tokens


@pytest.mark.parametrize("layers", [None, [{"window": 5}, {"kind": "full"}], [{"window": 5}, {"window": 7}]])
def test_the_folder_is_complete(tiny_config: WindreachConfig, tmp_path: Path, layers: list | None) -> None:
    fields = tiny_config.to_dict() | {"vocab_size": 330, "layers": layers, "rope_parameters": {"rope_theta": 500.0}}
    examined = trained(WindreachConfig(**fields))
    kind = export.export(examined, tmp_path / "out", "bfloat16")
    examined.model.save_pretrained(tmp_path / "saved")
    written, saved, tokenizer, generation = (
        json.loads((tmp_path / name).read_text())
        for name in ("out/config.json", "saved/config.json", "out/tokenizer_config.json", "out/generation_config.json")
    )
    assert kind == written["model_type"] == saved["model_type"]
    assert kind == ("mistral" if layers is None else "ministral" if {"kind": "full"} in layers else "windreach")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert ids.items() <= written.items()
    assert ids.items() <= generation.items()
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500.0
    assert (tokenizer["pad_token"], tokenizer["model_max_length"]) == ("<unk>", written["max_position_embeddings"])
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_ids_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Of a sentencepiece model that begins with <pad>, as Gemma's does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("birds")), model_writer=model, model_type="bpe", vocab_size=330,
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    save_hf(tiny_model(vocab_size=330), tmp_path, tokenizer=SentencePieceTokenizer(model.getvalue()))
    written = json.loads((tmp_path / "config.json").read_text())
    assert [written[f"{name}_token_id"] for name in ("pad", "eos", "bos")] == [0, 1, 2]
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"])
def test_a_chat_template_is_kept_and_writes_the_markers_itself(
    tiny_config: WindreachConfig, tmp_path: Path, template: str | None
) -> None:
    tiny_config.vocab_size = 330
    examined = trained(tiny_config)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=to_hugging_face(examined.tokenizer.model), bos_token="<s>", eos_token="</s>",
        chat_template=template,
    )  # fmt: skip
    examined.tokenizer = HubTokenizer(hf)
    export.export(examined, tmp_path / "out", "float32")
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.chat_template == template
    assert (written("the bay").input_ids[0] == examined.tokenizer.bos_id) == (template is None)


def test_a_full_disk_is_told_and_leaves_nothing(
    tiny_config: WindreachConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.vocab_size = 330
    examined = trained(tiny_config)
    monkeypatch.setattr(export, "load_model", lambda *_, **__: examined)
    monkeypatch.setattr("sys.argv", ["export.py", "runs/x", "--out", str(tmp_path / "out")])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # then writing fails with EFBIG
    try:
        code = cli(export.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "File too large" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert cli(export.main) == 0


def test_an_adapter_says_where_windows_or_positions_are_not_those_of_its_model(
    tiny_config: WindreachConfig, tmp_path: Path
) -> None:
    tiny_config.vocab_size = 330
    examined = trained(tiny_config)
    export.export(examined, tmp_path / "model", "float32")
    assert export._changes(examined, str(tmp_path / "model")) == ""
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": tiny_config.rope_base}
    examined.model.reconfigure(WindreachConfig(**tiny_config.to_diff_dict() | {"rope_parameters": scaling}))
    assert "gave that model other positions;" in export._changes(examined, str(tmp_path / "model"))


def test_nothing_is_overwritten(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="is not empty; name a new folder, nothing is overwritten"):
        export.export(examined, tmp_path, "float32")


def test_gguf_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["export.py", "runs/x", "--format", "gguf", "--out", "out"])
    with pytest.raises(UserError, match="would see farther than the one that was trained; use --format hf"):
        export.main()
