"""A sentencepiece tokenizer: trained on the training text, or given (Mistral's own `.model` files included).

Trained ones are lossless: `decode(encode(text)) == text`, blanks and line ends too, because nothing is normalised and
unknown characters fall back to bytes. (One exception: U+2581, which sentencepiece keeps for blanks, comes back as one.)
BPE, because `tokenizers` can repeat its merges exactly; unigram scores are summed in another precision there.
Their first pieces are <unk>, <s>, </s> and the tokens of the recall tasks.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import decoders, normalizers
from transformers import PreTrainedTokenizerFast

from data.folders import written_whole
from data.sources import documents, source_fingerprint
from data.tasks.vocabulary import RESERVED
from model.errors import UserError

if TYPE_CHECKING:
    from training.settings.schema import Settings

FILE = "tokenizer.model"
VERSION = 1  # raise it when the same text would give another tokenizer
TRAINING_CHARACTERS = 50_000_000  # more text makes no better pieces

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type
_BLANK = "▁"


class Tokenizer:
    """A sentencepiece model. `encode` adds no markers."""

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
        """Piece to id."""
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def token_bytes(self) -> NDArray[np.int64]:
        """(vocab,) UTF-8 bytes of text that each token stands for: none for markers and the recall tokens."""
        return np.array([self._bytes(i) for i in range(self.vocab_size)], dtype=np.int64)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`, and the files from which `AutoTokenizer` makes one that encodes identically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.model)
        for stale in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / stale).unlink(missing_ok=True)
        piece = self.processor.id_to_piece
        PreTrainedTokenizerFast(
            tokenizer_object=to_hugging_face(self.model),
            bos_token=piece(self.bos_id),
            eos_token=piece(self.eos_id),
            unk_token=piece(self.processor.unk_id()),
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)

    def _bytes(self, i: int) -> int:
        piece = self.processor.id_to_piece(i)
        if self.processor.is_byte(i):
            return 1
        if self.processor.is_control(i) or self.processor.is_unknown(i) or piece in RESERVED:
            return 0
        return len(piece.replace(_BLANK, " ").encode())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `.model` file, or of a folder that holds `tokenizer.model`."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        tokenizer = Tokenizer(file.read_bytes())
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a sentencepiece model"
        raise UserError(
            f"data.tokenizer.model_file {str(file)!r}: {reason}; name a sentencepiece .model file, "
            "or leave it out to train one"
        ) from error
    if not _is_bpe(ModelProto.FromString(tokenizer.model)):
        raise UserError(
            f"data.tokenizer.model_file {str(file)!r} is no BPE model, and Hugging Face can't repeat others exactly; "
            "name a BPE one, or leave it out to train one"
        )
    if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise UserError(
            f"data.tokenizer.model_file {str(file)!r} has no <s> or </s>, which frame documents; name another"
        )
    return tokenizer


def prepare_tokenizer(settings: "Settings") -> Tokenizer:
    """The given tokenizer, else one trained on the training text and kept in `data.cache_dir`."""
    data = settings.data
    if data.tokenizer.model_file is not None:
        return load_tokenizer(data.tokenizer.model_file)
    made_of = [VERSION, source_fingerprint(data, "train"), data.tokenizer.vocab_size, sentencepiece.__version__]
    fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    folder = Path(data.cache_dir) / f"tokenizer-{fingerprint[:16]}"
    if not _is_sound(folder):
        texts = (document.text for document in documents(data, "train"))
        tokenizer = train_tokenizer(texts, data.tokenizer.vocab_size)
        with written_whole(folder) as aside:
            (aside / FILE).write_bytes(tokenizer.model)
            (aside / "sha256").write_text(tokenizer.sha256, encoding="ascii")
    return load_tokenizer(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE on paragraphs, deterministic. Raises `UserError` where the text does not allow `vocab_size` pieces."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_paragraphs(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=list(RESERVED),
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"data.tokenizer.vocab_size is {vocab_size}: {_reason(error)}") from error
    return Tokenizer(model.getvalue())


def to_hugging_face(model: bytes) -> tokenizers.Tokenizer:
    """A BPE sentencepiece model as a `tokenizers` one that gives the same ids."""
    proto = ModelProto.FromString(model)
    assert _is_bpe(proto), "load_tokenizer takes BPE models only"
    bpe = tokenizers.models.BPE(
        vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    made = tokenizers.Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    strip = [decoders.Strip(content=" ", left=1)] if proto.normalizer_spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.add_tokens([_added(piece) for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)])
    return made


def _is_bpe(proto: Any) -> bool:
    return bool(proto.trainer_spec.model_type == proto.trainer_spec.BPE)


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    """What sentencepiece does to text before it looks for pieces, in its order."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_BLANK))
    return [*steps, normalizers.Replace(" ", _BLANK)]


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: sentencepiece merges by the score of the result."""
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    ranked = sorted(score, key=score.__getitem__, reverse=True)
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]


def _added(piece: Any) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, which are bytes, never part of a piece."""
    left = TRAINING_CHARACTERS
    for text in texts:
        for line in text.split("\n"):
            if line:
                yield line
                left -= len(line)
        if left <= 0:
            return


def _is_sound(folder: Path) -> bool:
    try:
        expected = (folder / "sha256").read_text(encoding="ascii")
        return hashlib.sha256((folder / FILE).read_bytes()).hexdigest() == expected
    except (FileNotFoundError, NotADirectoryError):
        return False


def _reason(error: RuntimeError) -> str:
    """The trainer's last sentence; the rest is its source code."""
    return str(error).strip().splitlines()[-1].split("]")[-1].strip() or "too small or too large for this text"
