"""Tokenizers: lossless, deterministic, the same in Hugging Face, and clear when they can't be had."""

import importlib.util
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.tasks.vocabulary import RESERVED, recall_vocabulary
from data.token_store import open_tokens, token_folders
from data.tokenizer import SentencePieceTokenizer, load_tokenizer, prepare_tokenizer, to_hugging_face, train_tokenizer
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
SENTENCES = [f"The ship number {i % 10} came slowly over the grey water, while birds cried above." for i in range(200)]
SENTENCES.append("x < y / z > k")


@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(TEXTS)
def test_decoding_gives_the_text_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXTS)
def test_hugging_face_gives_the_same_ids_and_text(tokenizer, hugging_face, text):
    ids = tokenizer.encode(text)
    assert hugging_face.encode(text) == [tokenizer.bos_id, *ids]  # a text begins with <s>, as in training
    assert hugging_face.decode(ids) == text


@given(TEXTS)
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
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.encode(LANGUAGE, add_special_tokens=False) == tokenizer.encode(LANGUAGE)


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


def sentencepiece_model(**options):
    """A sentencepiece model of the sentences below."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 400, "character_coverage": 1.0} | options,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "char"}, "not a sentencepiece model of the type BPE or unigram; name"),
        ({"model_type": "bpe", "eos_id": -1}, "has no token for the end of a document; name it as eos_token"),
    ],
)
def test_a_model_that_would_not_do_is_refused(options, reason, tmp_path):
    (tmp_path / "x.model").write_bytes(sentencepiece_model(**options))
    with pytest.raises(UserError, match=rf"data\.tokenizer\.model_file '.*x\.model'.*{reason}"):
        load_tokenizer(tmp_path / "x.model")


LOSSLESS = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, LOSSLESS, LOSSLESS | {"add_dummy_prefix": False}], ids=str)
def test_a_given_sentencepiece_model_has_the_same_ids_in_hugging_face(kind, options, tmp_path):
    (tmp_path / "x.model").write_bytes(sentencepiece_model(model_type=kind, **options))
    tokenizer = load_tokenizer(tmp_path / "x.model")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sha256 == tokenizer.sha256
    hugging_face = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (*SENTENCES, LANGUAGE, "  two  blanks ", "", " ", "<0x41>"):
        ids = tokenizer.encode(text)
        assert hugging_face.encode(text) == [tokenizer.bos_id, *ids]
        if options:
            assert tokenizer.decode(ids) == hugging_face.decode(ids) == text
            prefix = options.get("add_dummy_prefix", True) and bool(text)
            assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + prefix


def test_unigram_ids_are_those_of_sentencepiece_and_a_written_marker_stays_text():
    tokenizer = SentencePieceTokenizer(sentencepiece_model(model_type="unigram", **LOSSLESS))
    in_a_worker = pickle.loads(pickle.dumps(tokenizer))
    for text in (*SENTENCES, LANGUAGE, "<s>a</s> <0x41> <unk>"):
        ours, theirs = tokenizer.encode(text), tokenizer.processor.encode(text)
        assert in_a_worker.encode(text) == ours
        assert tokenizer.decode(ours) == text
        assert len(ours) == len(theirs)
        scores = [sum(map(tokenizer.processor.get_score, ids)) for ids in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1])  # two splits may score the same


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_own_model_loads_and_is_the_same_in_hugging_face(version):
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("the optional package mistral-common, which carries Mistral's tokenizers, is not installed")
    tokenizer = load_tokenizer(Path(spec.origin).parent / "data" / version)
    assert tokenizer.vocab_size >= 32000
    text = LANGUAGE + " ordinary text, twice ordinary.\nAnd code: def f(x):\n    return x"
    assert to_hugging_face(tokenizer.model).encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def byte_level():
    """As GPT-2's: text becomes bytes, and one marker begins and ends documents."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def byte_fallback():
    """As Llama's: blanks are ▁, unknown characters become bytes, and <s> is added by the tokenizer itself."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # for training: no token goes over a blank
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace():
    """Unigram with ▁ before each word."""
    text = "▁" + " ".join(SENTENCES).replace(" ", " ▁")
    scores = dict.fromkeys(("<unk>", "<s>", "</s>"), 0.0) | dict.fromkeys(sorted(set(text) - {" "}), -10.0)
    scores |= dict.fromkeys(sorted(set(text.split())), -12.0)
    backend = Backend(models.Unigram(list(scores.items()), unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(params=[byte_level, byte_fallback, metaspace], ids=lambda build: build.__name__)
def tokenizer_json(request, tmp_path):
    request.param().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def texts_for(file):
    """What the tokenizer in `file` can encode without loss."""
    return [*SENTENCES[:20], *([] if "Unigram" in file.read_text() else [LANGUAGE, "\x00\n", "🙂"])]


def test_a_tokenizer_json_has_the_ids_of_transformers_and_is_saved_with_its_hash(tokenizer_json, tmp_path):
    ours, theirs = load_tokenizer(tokenizer_json), PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json))
    ours.save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
    exported = AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert ours.sha256 == again.sha256 == load_tokenizer(tmp_path).sha256
    assert (exported.bos_token_id, exported.eos_token_id) == (ours.bos_id, ours.eos_id) == (again.bos_id, again.eos_id)
    for text in texts_for(tokenizer_json):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) == again.encode(text)
        assert ids == exported.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text


def test_bytes_of_the_tokens_of_a_tokenizer_json(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    sizes = tokenizer.token_bytes()
    assert sizes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    prefix = 0 if "ByteLevel" in tokenizer_json.read_text() else 1  # ▁ before the first word is no byte of the text
    for text in texts_for(tokenizer_json):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode()) + prefix


def train_tokens(settings, tokenizer):
    """The stored tokens of the training text, in one shard."""
    return open_tokens(token_folders(settings, tokenizer)[""], tokenizer)["train"].shard(0).tokens


def test_markers_of_a_document_are_there_once(tokenizer_json, make_settings):
    tokenizer = load_tokenizer(tokenizer_json)
    tokens = train_tokens(make_settings(tokenizer={"model_file": str(tokenizer_json)}), tokenizer)
    first, *between, last = tokens.tolist()
    assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(between)


def test_recall_finds_words_in_a_tokenizer_json_or_reserved_tokens(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    vocab = recall_vocabulary(tokenizer, 2)
    words = {tokenizer.decode([tokenizer.eos_id, i]).split(">")[-1].strip() for i in (*vocab.needle, *vocab.values)}
    assert len(words) == 3 <= sum(word in SENTENCES[0] for word in words)
    tokenizer.hf.add_tokens([AddedToken(name, normalized=False) for name in RESERVED])
    assert recall_vocabulary(tokenizer, 32).values == tuple(map(tokenizer.get_vocab().__getitem__, RESERVED[2:]))


def test_markers_that_a_config_names_count_and_change_the_hash(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    guessed = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    named = load_tokenizer(tmp_path)
    assert named.eos_id == named.get_vocab()["!"] != guessed.eos_id
    assert named.sha256 != guessed.sha256


def test_tokens_that_only_a_config_adds_are_saved(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|im_end|>", "added_tokens_decoder": {"900": {"content": "<more>", "special": false}}}'
    )
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")
    saved, text = load_tokenizer(tmp_path / "saved"), "a <more> of it"
    assert (saved.sha256, saved.eos_id, saved.vocab_size) == (tokenizer.sha256, tokenizer.eos_id, tokenizer.vocab_size)
    assert saved.encode(text) == tokenizer.encode(text) == AutoTokenizer.from_pretrained(tmp_path).encode(text)


def test_a_tokenizer_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    file = tmp_path / "models--someone--ours/snapshots/abc/tokenizer.json"
    file.parent.mkdir(parents=True)
    byte_level().save(str(file))
    (tmp_path / "models--someone--ours/refs").mkdir()
    (tmp_path / "models--someone--ours/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert load_tokenizer("someone/ours").sha256 == load_tokenizer(file).sha256
    with pytest.raises(
        UserError, match=r"model_file 'someone/other': No such file.*that `hf download NAME` has fetched"
    ):
        load_tokenizer("someone/other")


def test_a_tokenizer_json_that_would_not_do_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("hello")
    with pytest.raises(UserError, match=r"not a tokenizer\.json; name a sentencepiece"):
        load_tokenizer(file)
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.save(str(file))
    with pytest.raises(UserError, match="has no token for the end of a document; name it as eos_token"):
        load_tokenizer(file)
    backend.add_special_tokens(["</s>"])
    backend.save(str(file))
    with pytest.raises(UserError, match="can't tell how many bytes its tokens have"):
        load_tokenizer(file).token_bytes()


def test_ids_beyond_65535_are_stored(make_settings, tmp_path):
    backend = byte_level()
    backend.add_tokens([f"<unused{i}>" for i in range(1 << 16)])
    backend.add_tokens(["ship"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    tokens = train_tokens(make_settings(tokenizer={"model_file": str(tmp_path)}), tokenizer)
    assert tokens.dtype == np.uint32
    assert tokenizer.get_vocab()["ship"] > 1 << 16
    text = tokenizer.decode(tokens[1:-1])
    assert text == (tmp_path / "train.txt").read_text()
    assert tokenizer.token_bytes()[tokens].sum() == len(text)
