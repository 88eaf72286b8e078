"""Conversations in the token store: what is scored in a row, with both packings, beside text, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import encoding, token_writer
from data.batches import recall_batch
from data.chat.lint import far_answers, sentences
from data.mixture import Mixture, Shares, open_sources, prepare_sources
from data.tasks.question import UNSCORED
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import Shard, TokenStore, open_tokens, token_folders
from data.token_writer import read_index
from data.tokenizer import Tokenizer, prepare_tokenizer
from model.errors import UserError
from tests.data.conftest import WORDS
from training.settings.schema import Settings

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
Make = Callable[..., Settings]


def made_up(n: int, turns: int = 2) -> list[list[dict[str, str]]]:
    draw = np.random.default_rng(n)
    said = iter(" ".join([str(i), *draw.choice(WORDS, draw.integers(2, 20))]) for i in range(2 * turns * n))
    return [
        [{"role": role, "content": next(said)} for _ in range(turns) for role in ("user", "assistant")]
        for _ in range(n)
    ]


@pytest.fixture
def chat(make_settings: Make, tokenizer: Tokenizer, tmp_path: Path) -> Make:
    """Settings of a source of conversations; `rows` are those of its file, `data` replaces settings."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    tokenizer.save(tmp_path / "tokenizer")

    def make(rows: list[Any] | None = None, **data: Any) -> Settings:
        rows = [{"messages": messages} for messages in made_up(60)] if rows is None else rows
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"train_files": [str(tmp_path / "rows.jsonl")], "heldout_files": [], "heldout_share": 0.2}
        chat: dict[str, Any] = {"messages_column": "messages", "chat_template": str(tmp_path / "chat.jinja")}
        chat["tokenizer"] = {"model_file": str(tmp_path / "tokenizer")}
        return make_settings(**files | chat | data)

    return make


def prepare(settings: Settings) -> tuple[Path, Tokenizer]:
    tokenizer = prepare_tokenizer(settings)
    (folder,) = token_folders(settings, tokenizer, 1).values()
    return folder, tokenizer


def answers_of(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    """The scored stretches of a store, in order."""
    tokens, scored = store.read(0, store.n_tokens)[0], store.scored(0, store.n_tokens)
    borders = np.flatnonzero(np.diff(scored.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(tokens[start:end].tolist()) for start, end in borders]


def test_only_the_answers_are_scored_and_no_conversation_is_lost(chat: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_writer, "SHARD", 1000)
    monkeypatch.setattr(encoding, "BATCH", 700)
    folder, tokenizer = prepare(chat())
    stores = open_tokens(folder, tokenizer)
    assert len(stores["train"].shards) > 3
    found = [answer for store in stores.values() for answer in answers_of(store, tokenizer)]
    assert sorted(found) == sorted(m["content"] for c in made_up(60) for m in c if m["role"] == "assistant")
    assert stores["heldout"].n_documents > 3
    whole = stores["train"].scored(0, stores["train"].n_tokens + 5)
    assert whole[-5:].all()
    for start, n in ((3, 50), (200, 333), (0, 1), (stores["train"].n_tokens - 4, 4)):
        np.testing.assert_array_equal(stores["train"].scored(start, n), whole[start : start + n])


def test_rows_of_whole_conversations_score_their_answers_and_keep_them_apart(chat: Make) -> None:
    settings = chat(packing="best_fit", seq_len=128)
    tokenizer = prepare_tokenizer(settings)
    (source,) = open_sources(prepare_sources(settings, tokenizer, 1), tokenizer, settings.data).values()
    by_prompt = {c[0]["content"]: [m["content"] for m in c if m["role"] == "assistant"] for c in made_up(60)}
    found = 0
    for number in range(len(source.rows)):
        row = source.rows.read(number)
        for document in range(row.documents.max() + (row.tokens[-1] > 0)):  # the last one is padding
            here = row.documents == document
            text, labels = tokenizer.decode(row.tokens[here].tolist()), row.labels[here]
            prompt = text.removeprefix("user:\n").partition("\n")[0]
            scored = tokenizer.decode(labels[labels != UNSCORED].tolist())
            assert scored == "".join(by_prompt[prompt])
            assert np.count_nonzero(labels == tokenizer.eos_id) == 2
            found += 1
    assert found == source.train.n_documents


def test_rows_without_gaps_score_every_token_of_an_answer_once(chat: Make) -> None:
    settings = chat(seq_len=32)
    tokenizer = prepare_tokenizer(settings)
    (source,) = open_sources(prepare_sources(settings, tokenizer, 1), tokenizer, settings.data).values()
    labels = np.concatenate([source.rows.read(number).labels for number in range(len(source.rows))])
    expected = "".join(answers_of(source.train, tokenizer))
    found = tokenizer.decode(labels[labels != UNSCORED].tolist())
    assert expected.startswith(found)
    assert len(expected) - len(found) < 32 * 8  # the last tokens fill no row


def test_a_mixture_scores_all_of_the_text_and_the_answers_of_the_conversations(chat: Make, tmp_path: Path) -> None:
    alone = chat().data.model_dump()
    shared = {name: alone[name] for name in ("chat_template", "tokenizer", "cache_dir")} | {"seq_len": 64}
    files = {name: alone[name] for name in ("source", "train_files", "heldout_files", "heldout_share")}
    text = {"source": "files", "train_files": [str(tmp_path / "train.txt")], "name": "text", "weight": 1.0}
    text["heldout_files"] = [str(tmp_path / "heldout.txt")]
    talk = files | {"name": "talk", "messages_column": "messages", "weight": 1.0}
    settings = Settings.model_validate(chat().model_dump() | {"data": {"sources": [text, talk]} | shared})
    tokenizer = prepare_tokenizer(settings)
    sources = open_sources(prepare_sources(settings, tokenizer, 1), tokenizer, settings.data)
    mixture = Mixture({name: of.rows for name, of in sources.items()}, Shares([1.0, 1.0], 8, 4, seed=0))
    rows, numbers = mixture.read(1, range(8))
    assert sorted(numbers.tolist()) == [0] * 4 + [1] * 4
    shares = {
        n: np.mean([(row.labels != UNSCORED).mean() for row, of in zip(rows, numbers) if of == n]) for n in (0, 1)
    }
    assert shares[0] > 0.98
    assert 0.2 < shares[1] < 0.8


def test_a_store_of_text_is_the_same_as_before_there_were_conversations(make_settings: Make) -> None:
    """Its fingerprint and its files decide whether the cache of an old run is valid."""
    settings = make_settings()
    folder, _ = prepare(settings)
    entry = (read_index(folder) or {})["shards"][0]["train"]
    assert entry.keys() == {"tokens", "documents", "bytes", "sha256"}
    assert entry["sha256"].keys() == {".bin", ".starts"}
    assert not list(folder.glob("*.answers"))


def test_another_template_is_another_text_and_another_store(chat: Make, tmp_path: Path) -> None:
    first, _ = prepare(chat())
    (tmp_path / "chat.jinja").write_text(TEMPLATE.replace(":\n", " says:\n"))
    second, _ = prepare(chat())
    assert first != second
    hashes = [(read_index(folder) or {})["source_sha256"] for folder in (first, second)]
    assert not set(hashes[0].values()) & set(hashes[1].values())


def test_damaged_answers_are_found_by_their_hash_and_short_ones_by_their_size(chat: Make) -> None:
    folder, tokenizer = prepare(chat())
    (file,) = folder.glob("train-*.answers")
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"\1" + content[9:])
    with pytest.raises(UserError, match=r"train-00000\.answers' is damaged"):
        open_tokens(folder, tokenizer)["train"].verify([0])
    file.write_bytes(content[:-8])
    assert read_index(folder) is None


def test_prompts_and_answers_in_two_columns_are_conversations_of_two_messages(chat: Make, tmp_path: Path) -> None:
    pairs: list[dict[str, Any]] = [{"q": f"{i} the sea", "a": {"text": f"calm {i}"}} for i in range(20)]
    columns = {"messages_column": None, "prompt_column": "q", "answer_column": "a.text"}
    folder, tokenizer = prepare(chat(pairs, **columns))
    stores = open_tokens(folder, tokenizer).values()
    assert sorted(a for s in stores for a in answers_of(s, tokenizer)) == sorted(p["a"]["text"] for p in pairs)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "rows.parquet")
    other, _ = prepare(chat(pairs, train_files=[str(tmp_path / "rows.parquet")], **columns))
    assert [f.read_bytes() for f in sorted(other.glob("*.bin"))] == [
        f.read_bytes() for f in sorted(folder.glob("*.bin"))
    ]


def test_messages_of_a_parquet_file_are_those_of_jsonl(chat: Make, tmp_path: Path) -> None:
    folder, _ = prepare(chat())
    rows = [{"messages": messages} for messages in made_up(60)]
    rows[0]["messages"][0]["name"] = "x"  # a key that parquet then has in every row
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    other, _ = prepare(
        chat(rows[:1], train_files=[str(tmp_path / "rows.parquet")], heldout_files=[str(tmp_path / "rows.jsonl")])
    )
    stores = [open_tokens(f, prepare_tokenizer(chat()))["train"] for f in (folder, other)]
    assert stores[1].n_documents == 60 > stores[0].n_documents


USER, ANSWER = {"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "calm"}
BAD = [
    ({"text": "a"}, "no column 'messages', only 'text'"),
    ({"messages": []}, "column 'messages' holds no message"),
    ({"messages": None}, "column 'messages' holds nothing, not a list of messages"),
    ({"messages": "the sea"}, "column 'messages' holds str, not a list of messages"),
    ({"messages": ["the sea"]}, "message 1 is str, not a role and a content"),
    ({"messages": [{"from": "human", "value": "a"}]}, "message 1 has no 'role', only 'from', 'value'"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no 'content', only 'role'"),
    ({"messages": [USER, ANSWER | {"content": ["calm"]}]}, "message 2: content is list, not text"),
    ({"messages": [USER, ANSWER | {"content": " \n"}]}, "message 2 is an empty answer"),
    ({"messages": [USER]}, "no answer: no message has the role 'assistant'"),
    ({"messages": [USER, ANSWER | {"content": "\ud800"}]}, "half a character (surrogates not allowed)"),
    ({"messages": [USER, USER, ANSWER]}, "the chat template fails: roles must alternate"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=range(len(BAD)))
def test_a_row_that_is_no_conversation_is_refused_with_its_file_and_number(
    row: Any, reason: str, chat: Make, tmp_path: Path
) -> None:
    twice = "messages|length > 1 and messages[1].role == 'user'"
    rules = f"{{% if {twice} %}}{{{{ raise_exception('roles must alternate') }}}}{{% endif %}}"
    good = {"messages": [USER, ANSWER]}
    settings = chat([good, row])
    (tmp_path / "chat.jinja").write_text(rules + TEMPLATE)
    start = r"^data\.messages_column is 'messages'; row 2 of 'rows\.jsonl': "
    with pytest.raises(UserError, match=f"{start}{re.escape(reason)}; mend it, name another column, or set data"):
        prepare(settings)


def test_bad_conversations_are_skipped_up_to_a_number_and_counted(chat: Make) -> None:
    rows = [{"messages": messages} for messages in made_up(60)] + [row for row, _ in BAD[:-1]]
    folder, tokenizer = prepare(chat(rows, max_bad_rows=len(BAD) - 1))
    assert (read_index(folder) or {})["bad_rows"] == len(BAD) - 1
    assert sum(store.n_documents for store in open_tokens(folder, tokenizer).values()) == 60
    with pytest.raises(UserError, match=rf"row {60 + len(BAD)} of 'rows\.jsonl': message 1 has no 'role'"):
        prepare(chat([*rows, {"messages": [{}]}], max_bad_rows=len(BAD) - 1))


def test_a_source_of_conversations_needs_a_template(chat: Make) -> None:
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prepare(chat(chat_template=None))
    with pytest.raises(
        UserError, match=r"data\.chat_template 'no\.jinja' can't be read: No such file or directory; name"
    ):
        prepare(chat(chat_template="no.jinja"))


def test_recall_rows_with_conversations_as_filler_do_not_train_their_prompts(
    chat: Make, vocab: RecallVocabulary
) -> None:
    folder, tokenizer = prepare(chat())
    store = open_tokens(folder, tokenizer)["train"]
    batch = recall_batch(store, vocab, 0, 0, range(40), 64, {"needle": 16}, {"needle": 1.0})
    ids, labels = batch.input_ids.numpy(), batch.labels.numpy()
    assert (labels != UNSCORED).any()
    scored_bigrams = {pair for row, label in zip(ids, labels) for pair in zip(row, label) if pair[1] != UNSCORED}
    tokens, scored = store.read(0, store.n_tokens)[0], store.scored(0, store.n_tokens)
    assert scored_bigrams <= set(zip(tokens[:-1][scored[1:]], tokens[1:][scored[1:]]))


def test_the_linter_counts_by_hand() -> None:
    """W = 4: the first token of an answer is predicted at the position before it, which sees 3 tokens back."""
    answers = np.array([[5, 8, 1, -1], [20, 22, 15, 10], [40, 41, -1, 30], [50, 51, 46, 30]])
    shard = Shard(np.zeros(60, np.uint16), np.array([0]), answers)
    far = far_answers([shard], {"W": 4, "R": 9})
    assert (far.answers, far.without_instruction, far.with_system) == (4, 1, 3)
    assert far.instruction == {"W": pytest.approx(1 / 3), "R": 0.0}  # 3, 4 and 3 tokens back
    assert far.system == {"W": 1.0, "R": pytest.approx(1 / 3)}  # 9, 9 and 19
    assert sentences(far, {"W": 4, "R": 9})[0].startswith("33.3% of the answers begin where one window of 4 tokens")
    assert sentences(far, {"W": 4, "R": 9})[1].startswith(
        "The start of the system prompt is farther back than R for 33.3%"
    )
    near = far_answers([shard], {"W": 20})
    assert sentences(near, {"W": 20}) == ["Every answer begins within one window of the start of its instruction."]
