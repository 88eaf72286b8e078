"""Writes conversations about the novels, to try fine-tuning with: every answer stands in the book, or in the question.

    python -m data.chat.novels FOLDER

FOLDER gets train.jsonl and heldout.jsonl, of different books. The same rows are written each time.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from data.chat.messages import ANSWERER, Message
from data.novels import novels
from model.errors import UserError, cli

ROWS = {"train": 1500, "heldout": 150}
WORDS = 60  # of a passage
ONE_WORD = "Answer with one word."


def conversations(split: str) -> Iterator[list[Message]]:
    """The conversations of a split: to continue a passage, to fill in a word, and to find a word."""
    draw = random.Random(split)
    paragraphs = [line.split() for _, text in novels(split) for line in text.split("\n")]
    passages = [words for words in paragraphs if len(words) > WORDS]
    for number in range(ROWS[split]):
        words = draw.choice(passages)
        start = draw.randrange(len(words) - WORDS)
        yield (_continue, _fill_in, _find)[number % 3](words[start : start + WORDS], draw)


def _continue(words: list[str], draw: random.Random) -> list[Message]:
    cut = draw.randint(WORDS // 2, WORDS - 15)
    return _messages(None, f"Continue this passage.\n\n{' '.join(words[:cut])}", " ".join(words[cut:]))


def _fill_in(words: list[str], draw: random.Random) -> list[Message]:
    at = draw.choice([i for i, word in enumerate(words) if word.isalpha()] or [0])
    gap = " ".join([*words[:at], "____", *words[at + 1 :]])
    return _messages(ONE_WORD, f"Which word is missing?\n\n{gap}", words[at])


def _find(words: list[str], draw: random.Random) -> list[Message]:
    """The answer stands in the question."""
    once = [i for i in range(WORDS - 1) if words.count(words[i]) == 1]
    at = draw.choice(once or [0])
    return _messages(ONE_WORD, f"Which word comes after “{words[at]}”?\n\n{' '.join(words)}", words[at + 1])


def _messages(system: str | None, question: str, answer: str) -> list[Message]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}, {"role": ANSWERER, "content": answer}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in ROWS:
            lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations(split)]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be written: {error.strerror}; give another folder") from error
    print(f"Written: {folder}/train.jsonl, heldout.jsonl ({ROWS['train']:,} and {ROWS['heldout']:,} conversations)")


if __name__ == "__main__":
    sys.exit(cli(main))
