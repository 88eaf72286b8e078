"""The tokens of the recall tasks, for our tokenizers and for others."""

import numpy as np
import pytest

from data.tasks.vocabulary import NEEDLE, QUERY, VALUES, RecallVocabulary, recall_vocabulary
from model.errors import UserError


class Foreign:
    """A tokenizer without reserved tokens: words, one id each."""

    def __init__(self, pieces):
        self.vocab = {piece: i for i, piece in enumerate(pieces)}

    def encode(self, text):
        return [0] * len(text)

    def decode(self, ids):
        return " ".join(map(str, ids))

    def get_vocab(self):
        return self.vocab


WORDS = ["<unk>", "<s>", "[INST]", "<0x0A>", "e", "Ġthe", *(f"Ġword{c}" for c in "abcdefgh"), "Ġ7777", "Ġ"]


def test_our_tokenizer_uses_its_reserved_tokens(tokenizer, vocab):
    pieces = tokenizer.get_vocab()
    assert vocab.needle == (pieces[NEEDLE],)
    assert vocab.query == (pieces[QUERY],)
    assert vocab.values == tuple(pieces[v] for v in VALUES)


def test_noise_is_ordinary_pieces_only(tokenizer, vocab):
    special = {tokenizer.bos_id, tokenizer.eos_id, 0, *vocab.reserved, *tokenizer.encode("\n\x00")}
    assert len(vocab.plain) > 50
    assert special.isdisjoint(vocab.plain.tolist())


def test_another_tokenizer_lends_its_rarest_words():
    made = recall_vocabulary(Foreign(WORDS), 4)
    assert (*made.needle, *made.query, *made.values) == (13, 12, 11, 10, 9, 8)
    assert made.plain.tolist() == [4, 5, 6, 7, 14, 15]


def test_more_values_than_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"recall\.values is 33, but the tokenizer offers 32 one-token values"):
        recall_vocabulary(tokenizer, 33)
    why = r"6 one-token values, for it has 8 tokens such as ▁ship or Ġship and no <v00>; lower it, or use another"
    with pytest.raises(UserError, match=rf"recall\.values is 20, but the tokenizer offers {why} tokenizer"):
        recall_vocabulary(Foreign(WORDS), 20)


def test_keys_are_the_rarest_words_left_and_change_no_other_token(tokenizer, vocab):
    few, more = (recall_vocabulary(tokenizer, 32, n) for n in (3, 6))
    assert (few.needle, few.query, few.values) == (vocab.needle, vocab.query, vocab.values)
    assert more.keys[:3] == few.keys
    assert set(vocab.plain) - set(few.plain) == set(few.keys) <= set(few.reserved)
    foreign = recall_vocabulary(Foreign(WORDS), 2, 3)
    assert (*foreign.needle, *foreign.query, *foreign.values, *foreign.keys) == (13, 12, 11, 10, 9, 8, 7)


def test_more_keys_than_words_is_refused():
    with pytest.raises(UserError, match=r"recall\.keys is 5, but the tokenizer offers 4 one-token words; lower it"):
        recall_vocabulary(Foreign(WORDS), 2, 5)


@pytest.mark.parametrize(
    "parts", [((1,), (1,), (2, 3)), ((1,), (2,), (2, 3)), ((1,), (2,), (3, 3)), ((1,), (2,), (3, 9))]
)
def test_markers_values_and_noise_are_disjoint(parts):
    with pytest.raises(AssertionError):
        RecallVocabulary(*parts, np.array([9]))
