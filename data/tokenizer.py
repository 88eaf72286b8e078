"""Tokenizers: one trained on the training text, a given sentencepiece `.model`, or a Hugging Face `tokenizer.json`.

A trained tokenizer is a sentencepiece BPE model. Its first tokens are <unk>, <s>, </s> and the tokens of the recall
tasks. It is lossless: `decode(encode(text)) == text`, spaces and line ends included. Nothing is normalised, and unknown
characters become bytes. The one exception is U+2581, which sentencepiece writes for a space: it becomes a space.

No tokenizer adds <s> or </s> to what it encodes. `data.token_store` adds them to each document.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from data.folders import written_whole
from data.pretrained import checkpoint_folder, is_converted
from data.settings import DataSettings, RunSettings
from data.sources import source_fingerprint, texts
from data.tasks.vocabulary import RESERVED
from model.errors import UserError, read_small_file

if TYPE_CHECKING:
    import tokenizers

FILE, JSON_FILE, TEMPLATE_FILE = "tokenizer.model", "tokenizer.json", "chat_template.jinja"
VERSION = 1  # raise it when the same text would give another tokenizer
MOST_BYTES, MOST_TEMPLATE_BYTES = 256 << 20, 1 << 20  # of a tokenizer's file, and of a chat template
TRAINING_CHARACTERS = 50_000_000  # more text gives no better tokens

_Piece = ModelProto.SentencePiece  # has the types of tokens
_BLANK = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")
_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")  # in a tokenizer.json that nothing beside it explains
_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Tokenizer(Protocol):
    """What training, evaluation and export need of a tokenizer. `encode` adds no special tokens."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    sha256: str  # of the files that decide the ids
    lines_apart: bool  # whether a text has the ids of its lines, one after another
    chat_template: str | None  # Jinja; conversations need it

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...
    def token_bytes(self) -> NDArray[np.int64]: ...
    def hugging_face(self) -> Any: ...  # a PreTrainedTokenizerFast
    def save(self, folder: str | Path) -> None: ...


class SentencePieceTokenizer:
    """A sentencepiece model of the type BPE or unigram."""

    def __init__(self, model: bytes, chat_template: str | None = None):
        self.model, self.chat_template = model, chat_template
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self.processor.get_piece_size()
        ids = self.processor.bos_id(), self.processor.eos_id(), self.processor.unk_id()
        self.bos_id, self.eos_id, self.unk_id = (i if i >= 0 else None for i in ids)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.lines_apart = _keeps_lines_apart(ModelProto.FromString(model))
        # Two splits may score the same but for rounding, to float32 in sentencepiece and to float64 in `tokenizers`.
        # So only `tokenizers` gives the ids of the export.
        self._unigram = to_hugging_face(model) if _is_unigram(ModelProto.FromString(model)) else None
        if self._unigram is not None:
            self._unigram.encode_special_tokens = True  # as text: sentencepiece makes no marker of a written <s>

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (
            self.model,
            self.chat_template,
        )  # in a worker process: `tokenizers` forgets the line above

    def encode(self, text: str) -> list[int]:
        if self._unigram is not None:
            return list(self._unigram.encode(text, add_special_tokens=False).ids)
        return list(self.processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode([int(i) for i in ids]))

    def get_vocab(self) -> dict[str, int]:
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def token_bytes(self) -> NDArray[np.int64]:
        """(vocab,) UTF-8 bytes of text in each token: 0 for markers and the recall tokens."""
        sp, sizes = self.processor, np.zeros(self.vocab_size, dtype=np.int64)
        for i, piece in enumerate(map(sp.id_to_piece, range(self.vocab_size))):
            if not (sp.is_control(i) or sp.is_unknown(i) or piece in RESERVED):
                sizes[i] = 1 if sp.is_byte(i) else len(piece.replace(_BLANK, " ").encode())
        return sizes

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`, and files from which `AutoTokenizer` builds a tokenizer with the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.model)
        self.hugging_face().save_pretrained(folder)

    def hugging_face(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        ids = self.bos_id, self.eos_id, self.unk_id, self.processor.pad_id()
        bos, eos, unk, pad = (None if i in (None, -1) else self.processor.id_to_piece(i) for i in ids)
        return PreTrainedTokenizerFast(
            tokenizer_object=to_hugging_face(self.model), bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad,
            clean_up_tokenization_spaces=False, add_bos_token=bos is not None, chat_template=self.chat_template,
        )  # fmt: skip


class HubTokenizer:
    """A Hugging Face tokenizer. `content` is its tokenizer.json; it may be empty where only ids and text are needed."""

    lines_apart = False  # not known

    def __init__(self, tokenizer: Any, content: bytes = b""):
        self.hf, self.content = tokenizer, content
        self.get_vocab = tokenizer.get_vocab
        self.vocab_size: int = max(self.get_vocab().values()) + 1  # ids may leave gaps
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.unk_id: int | None = tokenizer.unk_token_id
        markers = json.dumps([tokenizer.bos_token, tokenizer.eos_token])  # tokenizer.json does not name them
        self.sha256 = hashlib.sha256(content + markers.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.hf.encode(text, add_special_tokens=False, verbose=False))

    @property
    def chat_template(self) -> str | None:
        template = self.hf.chat_template  # or several by name
        return template.get("default") if isinstance(template, dict) else template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.hf.chat_template = template

    def hugging_face(self) -> Any:
        return self.hf

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode([int(i) for i in ids], clean_up_tokenization_spaces=False))

    def token_bytes(self) -> NDArray[np.int64]:
        """(vocab,) UTF-8 bytes of text in each token: 0 for markers and the recall tokens. UserError if unknown."""
        decoder = json.dumps(json.loads(self.hf.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
        of_bytes, fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
        if not of_bytes and _BLANK not in decoder:
            raise UserError(
                "data.tokenizer.model_file: can't tell how many bytes its tokens have, because its decoder is neither "
                "byte-level nor sentencepiece's; name another tokenizer, or leave it out to train one"
            )
        added, sizes = self.hf.added_tokens_decoder, np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self.get_vocab().items():
            if i in added:
                sizes[i] = 0 if added[i].special or token in RESERVED else len(token.encode())
            elif i != self.unk_id:
                is_byte = fallback and _BYTE.match(token)
                sizes[i] = 1 if is_byte else len(token) if of_bytes else len(token.replace(_BLANK, " ").encode())
        return sizes

    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer` and `AutoTokenizer` build a tokenizer with the same ids."""
        self.hf.save_pretrained(folder)
        if self.content:  # unchanged, so that its hash is too
            (Path(folder) / JSON_FILE).write_bytes(self.content)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer in a file or a folder, or of that name on the hub. Raises `UserError` if it can't be used.

    Nothing is downloaded: of the hub, only the local cache is read.
    """
    file = _tokenizer_file(name)
    setting, or_train = f"data.tokenizer.model_file {str(file)!r}", "or leave it out to train one"
    try:
        tokenizer = _from_json(file) if file.name == JSON_FILE else _from_sentencepiece(file)
    except (OSError, RuntimeError, ValueError) as error:
        kind = "a tokenizer.json" if file.name == JSON_FILE else "a sentencepiece model of the type BPE or unigram"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"not {kind}"
        raise UserError(
            f"{setting}: {reason}; name a sentencepiece .model file, a tokenizer.json, a folder with one of them, or "
            f"a tokenizer of the hub that `hf download NAME` has fetched, {or_train}"
        ) from error
    if tokenizer.eos_id is None:
        raise UserError(
            f"{setting} has no token for the end of a document; name it as eos_token in the tokenizer_config.json "
            f"beside a tokenizer.json, name another tokenizer, {or_train}"
        )
    return tokenizer


def _tokenizer_file(name: str | Path) -> Path:
    """The file that `name` stands for: itself, a file in a folder, or a file in the local cache of the hub."""
    path = checkpoint_folder(str(name)) if is_converted(str(name)) else Path(name)
    if path.is_dir():
        return next((path / file for file in (FILE, JSON_FILE) if (path / file).exists()), path / FILE)
    if not path.exists() and len(path.parts) <= 2 and not path.is_absolute():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with suppress(HFValidationError):  # not a possible name on the hub
            cached = try_to_load_from_cache(str(name), JSON_FILE)  # or a mark that the repository has no such file
            return Path(cached) if isinstance(cached, str) else path
    return path


def _from_sentencepiece(file: Path) -> SentencePieceTokenizer:
    """A model, with the chat template beside it."""
    template = file.parent / TEMPLATE_FILE
    written = _template(template, "the chat template") if template.is_file() else None
    return SentencePieceTokenizer(read_small_file(file, MOST_BYTES), written)


def _template(path: str | Path, setting: str) -> str:
    """The text of a chat template."""
    try:
        return read_small_file(path, MOST_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"{setting} {str(path)!r} can't be read: {reason}; name a file such as {TEMPLATE_FILE}"
        ) from error


def _from_json(file: Path) -> HubTokenizer:
    """A tokenizer.json, with the markers that files beside it name, else those with the usual names."""
    from transformers import PreTrainedTokenizerFast

    content = read_small_file(file, MOST_BYTES)
    try:  # not AutoTokenizer, which builds some tokenizers anew from the vocabulary and ignores the rest of the file
        hf = PreTrainedTokenizerFast.from_pretrained(str(file.parent), local_files_only=True)
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ValueError(error) from error
    if hf.get_added_vocab().keys() - {token["content"] for token in json.loads(content)["added_tokens"]}:
        content = hf.backend_tokenizer.to_str().encode()  # with the tokens that only tokenizer_config.json adds
    special = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    hf.bos_token = hf.bos_token or next((token for token in _BOS if token in special), None)
    hf.eos_token = hf.eos_token or next((token for token in _EOS if token in special), None)
    return HubTokenizer(hf, content)


def prepare_tokenizer(settings: RunSettings) -> Tokenizer:
    """The given tokenizer, else one that is trained on the training text and kept in `data.cache_dir`."""
    data = settings.data
    tokenizer = load_tokenizer(data.tokenizer.model_file or _trained(data))
    if data.chat_template is not None:
        tokenizer.chat_template = _template(data.chat_template, "data.chat_template")
    return tokenizer


def _trained(data: DataSettings) -> Path:
    """The folder of the tokenizer of the training text. It is trained now if it is missing."""
    sources = [source_fingerprint(source, "train", data.cache_dir) for source in data.mixture]
    inputs = [VERSION, sources, data.tokenizer.vocab_size, sentencepiece.__version__]
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    folder = Path(data.cache_dir) / f"tokenizer-{fingerprint[:16]}"
    if not (folder / FILE).is_file():
        in_turns = zip_longest(*(texts(source, "train") for source in data.mixture))
        tokenizer = train_tokenizer(filter(None, chain.from_iterable(in_turns)), data.tokenizer.vocab_size)
        with written_whole(folder) as aside:
            (aside / FILE).write_bytes(tokenizer.model)
    return folder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """BPE on lines of text, deterministic. Raises `UserError` if the text does not allow `vocab_size` tokens."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            user_defined_symbols=list(RESERVED), byte_fallback=True, character_coverage=0.9999,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            max_sentence_length=1 << 20, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        # The last sentence is the reason; the text before it quotes the trainer's source code.
        reason = str(error).strip().splitlines()[-1].split("]")[-1].strip() or "too small or too large for this text"
        raise UserError(f"data.tokenizer.vocab_size is {vocab_size}: {reason}") from error
    return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, which are encoded as bytes and never part of a longer token."""
    left = TRAINING_CHARACTERS
    for text in texts:
        for line in filter(None, text.split("\n")):
            yield line
            left -= len(line)
        if left <= 0:
            return


def to_hugging_face(model: bytes) -> "tokenizers.Tokenizer":
    """The `tokenizers` version of a sentencepiece model, which gives the same ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

    proto = ModelProto.FromString(model)
    spec = proto.normalizer_spec
    converted = Tokenizer((_unigram if _is_unigram(proto) else _bpe)(proto))
    # What sentencepiece does to text before it looks for tokens, in its order.
    converted.normalizer = normalizers.Sequence([
        *([normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []),
        *([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if spec.remove_extra_whitespaces else []),
        *([normalizers.Prepend(_BLANK)] if spec.add_dummy_prefix else []),
        normalizers.Replace(" ", _BLANK),
    ])  # fmt: skip
    converted.decoder = decoders.Sequence([
        decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []),
    ])  # fmt: skip
    converted.add_tokens([
        AddedToken(piece.piece, normalized=False, special=piece.type == _Piece.CONTROL)
        for piece in proto.pieces if piece.type in (_Piece.CONTROL, _Piece.USER_DEFINED)
    ])  # fmt: skip
    return converted


def _bpe(proto: ModelProto) -> "tokenizers.models.Model":
    from tokenizers.models import BPE

    trainer = proto.trainer_spec
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    # Every split of a token into two others, best token first: sentencepiece merges by the score of the result.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    return BPE(vocab, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _unigram(proto: ModelProto) -> "tokenizers.models.Model":
    from tokenizers.models import Unigram

    # Text that looks like a marker or a byte must not become one, so these score far less than any letters.
    unlikely = min(piece.score for piece in proto.pieces) - 1000
    vocab = [(p.piece, p.score if p.type in (_Piece.NORMAL, _Piece.USER_DEFINED) else unlikely) for p in proto.pieces]
    return Unigram(vocab, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)


def _is_unigram(proto: ModelProto) -> bool:
    trainer = proto.trainer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise ValueError("a model of words or characters")
    return bool(trainer.model_type == trainer.UNIGRAM)


def _keeps_lines_apart(proto: ModelProto) -> bool:
    """Whether nothing that the model does to a line depends on the lines beside it."""
    spec = proto.normalizer_spec
    changes_text = spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces
    spans_lines = any("\n" in piece.piece for piece in proto.pieces)
    return bool(proto.trainer_spec.byte_fallback and not changes_text and not spans_lines)
