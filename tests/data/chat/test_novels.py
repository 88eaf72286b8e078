"""The conversations about the novels: the same each time, and every answer can be known."""

import json
import sys
from pathlib import Path

import pytest

from data.chat import novels
from data.chat.messages import conversation_of
from model.errors import UserError


def test_every_answer_stands_in_the_book_and_of_a_word_to_find_in_the_question(tmp_path: Path) -> None:
    try:
        book = " ".join(" ".join(text for _, text in novels.novels("heldout")).split())
    except UserError as error:
        pytest.skip(f"no package index here: {error}")
    told = [conversation_of(messages, ("messages",)) for messages in novels.conversations("heldout")]
    assert told == list(novels.conversations("heldout"))
    assert len(told) == 150
    for continued, filled, found in zip(told[0::3], told[1::3], told[2::3], strict=True):
        passage, rest = (message["content"].removeprefix("Continue this passage.\n\n") for message in continued)
        assert f"{passage} {rest}" in book
        assert filled[-1]["content"].isalpha()
        assert filled[-2]["content"].partition("\n\n")[2].replace("____", filled[-1]["content"], 1) in book
        asked, _, passage = found[-2]["content"].partition("\n\n")
        word = asked.removeprefix("Which word comes after “").removesuffix("”?")
        assert f" {word} {found[-1]['content']} " in f" {passage} "
        assert passage in book


def test_a_folder_that_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["novels", str(tmp_path / "file" / "x")])
    with pytest.raises(UserError, match=r"can't be written: Not a directory; give another folder"):
        novels.main()
    monkeypatch.setattr(novels, "conversations", lambda split: [[{"role": "user", "content": split}]])
    monkeypatch.setattr(sys, "argv", ["novels", str(tmp_path / "new")])
    novels.main()
    assert json.loads((tmp_path / "new" / "heldout.jsonl").read_text())["messages"][0]["content"] == "heldout"
