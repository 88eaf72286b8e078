"""A sentencepiece tokenizer: trained on the training text, or given (Mistral's own `.model` files included).

A trained tokenizer is lossless: `decode(encode(text)) == text`, blanks and line ends included. Nothing is normalised,
and unknown characters become bytes. The one exception is U+2581, sentencepiece's mark for a blank, which becomes one.
It is a BPE model, because `tokenizers` can repeat its merges exactly. (Unigram scores are summed in another precision
there.) Its first tokens are <unk>, <s>, </s> and the tokens of the recall tasks.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from data.folders import written_whole
from data.settings import RunSettings
from data.sources import documents, source_fingerprint
from data.tasks.vocabulary import RESERVED
from model.errors import UserError

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.model"
VERSION = 1  # raise it when the same text would give another tokenizer
TRAINING_CHARACTERS = 50_000_000  # more text gives no better tokens

_Piece = ModelProto.SentencePiece  # has the types of tokens
_BLANK = "▁"


class Tokenizer:
    """A sentencepiece model. `encode` adds no <s> or </s>."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self.processor.get_piece_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        self.unk_id: int = self.processor.unk_id()
        self.sha256 = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
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
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.model)
        bos, eos, unk = map(self.processor.id_to_piece, (self.bos_id, self.eos_id, self.unk_id))
        PreTrainedTokenizerFast(
            tokenizer_object=to_hugging_face(self.model), bos_token=bos, eos_token=eos, unk_token=unk,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)  # fmt: skip


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `.model` file or in a folder. Raises `UserError` if it can't be used."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    name = f"data.tokenizer.model_file {str(file)!r}"
    try:
        tokenizer = Tokenizer(file.read_bytes())
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a sentencepiece model"
        raise UserError(f"{name}: {reason}; name a sentencepiece .model file, or leave it out to train one") from error
    trainer = ModelProto.FromString(tokenizer.model).trainer_spec
    if trainer.model_type != trainer.BPE or min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        # Hugging Face can't repeat other models exactly; <s> and </s> mark the ends of documents.
        raise UserError(f"{name} is not a BPE model with <s> and </s>; name another, or leave it out to train one")
    return tokenizer


def prepare_tokenizer(settings: RunSettings) -> Tokenizer:
    """The given tokenizer, else one that is trained on the training text and kept in `data.cache_dir`."""
    data = settings.data
    if data.tokenizer.model_file is not None:
        return load_tokenizer(data.tokenizer.model_file)
    inputs = [VERSION, source_fingerprint(data, "train"), data.tokenizer.vocab_size, sentencepiece.__version__]
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    folder = Path(data.cache_dir) / f"tokenizer-{fingerprint[:16]}"
    if not (folder / FILE).is_file():
        texts = (document.text for document in documents(data, "train"))
        tokenizer = train_tokenizer(texts, data.tokenizer.vocab_size)
        with written_whole(folder) as aside:
            (aside / FILE).write_bytes(tokenizer.model)
    return load_tokenizer(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
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
    return Tokenizer(model.getvalue())


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
    """The `tokenizers` version of a BPE sentencepiece model, which gives the same ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    proto = ModelProto.FromString(model)
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    # Every split of a token into two others, best token first: sentencepiece merges by the score of the result.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    bpe = BPE(vocab, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    converted = Tokenizer(bpe)
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
