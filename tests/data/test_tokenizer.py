"""Tokenizers: lossless, deterministic, the same in Hugging Face, and clear when they can't be had."""

import importlib.util
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.tasks.vocabulary import RESERVED
from data.tokenizer import Tokenizer, load_tokenizer, prepare_tokenizer, to_hugging_face, train_tokenizer
from model.errors import UserError

# Blanks and line ends, reserved symbols, bytes that look like pieces, anything: but not the stand-in for a blank.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["the sea", " ", "  ", "\n", "\n\n", "\t", "\r\n", "é", "漢字", "🙂", "\x00", "<0x41>", *RESERVED]
        ),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20),
    )
).map("".join)
LANGUAGE = "The sea was calm,  and\n\n\ta ship – 漢字, naïve 🙂 – came.\r\n <v03> 1,234 "


@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(TEXTS)
@settings(deadline=None)
def test_decoding_gives_the_text_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXTS)
@settings(deadline=None)
def test_hugging_face_gives_the_same_ids_and_text(tokenizer, hugging_face, text):
    ids = tokenizer.encode(text)
    assert hugging_face.encode(text) == ids
    assert hugging_face.decode(ids) == text


@given(TEXTS)
@settings(deadline=None)
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(tokenizer, text):
    for symbol in RESERVED:
        text = text.replace(symbol, "")
    ids = tokenizer.encode(text)
    if not set(ids) & set(tokenizer.encode("".join(RESERVED))):
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_hugging_face_knows_the_special_tokens_and_the_size(tokenizer, hugging_face):
    assert (hugging_face.bos_token_id, hugging_face.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(hugging_face) == tokenizer.vocab_size == 400


def test_a_saved_tokenizer_works_beside_a_mistral_config(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
    assert AutoTokenizer.from_pretrained(tmp_path).encode(LANGUAGE) == tokenizer.encode(LANGUAGE)


def test_a_saved_tokenizer_is_loaded_from_its_folder_or_its_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256


def test_every_reserved_symbol_is_one_token(tokenizer):
    assert [len(tokenizer.encode(symbol)) for symbol in RESERVED] == [1] * 34


def test_training_is_deterministic():
    text = "\n".join(f"line {i * i} of a text" for i in range(300))
    assert train_tokenizer([text], 340).sha256 == train_tokenizer([text], 340).sha256


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_a_size_that_the_text_does_not_allow_is_refused(vocab_size):
    with pytest.raises(UserError, match=rf"data\.tokenizer\.vocab_size is {vocab_size}: \w+"):
        train_tokenizer(["a short text"], vocab_size)


def test_a_trained_tokenizer_is_kept(make_settings, tmp_path):
    run = make_settings()
    first = prepare_tokenizer(run)
    (file,) = tmp_path.glob("cache/tokenizer-*/tokenizer.model")
    stamp = file.stat().st_mtime_ns
    assert prepare_tokenizer(run).sha256 == first.sha256
    assert file.stat().st_mtime_ns == stamp


def test_a_given_model_is_taken_as_it_is(tokenizer, make_settings, tmp_path):
    tokenizer.save(tmp_path / "given")
    run = make_settings(tokenizer={"model_file": str(tmp_path / "given" / "tokenizer.model")})
    assert prepare_tokenizer(run).sha256 == tokenizer.sha256


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"hello", "not a sentencepiece model")])
def test_a_missing_or_broken_model_is_refused(content, reason, tmp_path):
    if content:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.tokenizer\.model_file '.*x\.model': {reason}.*; name a sentencepiece"):
        load_tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize("options", [{"model_type": "unigram"}, {"model_type": "bpe", "bos_id": -1}])
def test_a_model_that_would_not_do_is_refused(options, tmp_path):
    with (tmp_path / "x.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a text of some words"] * 20), model_writer=file, vocab_size=20, minloglevel=2,
            hard_vocab_limit=False, **options,
        )  # fmt: skip
    with pytest.raises(UserError, match="is not a BPE model with <s> and </s>; name another"):
        load_tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_own_model_loads_and_is_the_same_in_hugging_face(version):
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("the optional package mistral-common, which carries Mistral's tokenizers, is not installed")
    tokenizer: Tokenizer = load_tokenizer(Path(spec.origin).parent / "data" / version)
    assert tokenizer.vocab_size >= 32000
    text = LANGUAGE + " ordinary text, twice ordinary.\nAnd code: def f(x):\n    return x"
    assert to_hugging_face(tokenizer.model).encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
