"""Conversations as lists of messages, each with a `role` and a `content`, in the style of OpenAI and Hugging Face."""

import json
from typing import Any

Message = dict[str, Any]
ANSWERER = "assistant"  # the role whose messages are trained


class BadRow(Exception):
    """A row of a source without a readable document."""


def conversation_of(value: Any, columns: tuple[str, ...]) -> list[Message]:
    """The messages in a row. `value` is a list of messages, or a prompt and its answer if there are two `columns`.

    Raises `BadRow` if they are no conversation with an answer.
    """
    if len(columns) == 2:
        for column, text in zip(columns, value, strict=True):
            if not isinstance(text, str):
                raise BadRow(f"column {column!r} holds {_kind(text)}, not text")
        value = [{"role": role, "content": text} for role, text in zip(("user", ANSWERER), value, strict=True)]
    if not isinstance(value, list):
        raise BadRow(f"column {columns[0]!r} holds {_kind(value)}, not a list of messages")
    if not value:
        raise BadRow(f"column {columns[0]!r} holds no message")
    messages = [_checked(message, number) for number, message in enumerate(value, 1)]
    if not any(message["role"] == ANSWERER for message in messages):
        raise BadRow(f"no answer: no message has the role {ANSWERER!r}")
    return messages


def _checked(message: Any, number: int) -> Message:
    """A message without its empty keys, which tables give to every row."""
    if not isinstance(message, dict):
        raise BadRow(f"message {number} is {_kind(message)}, not a role and a content")
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in message:
            raise BadRow(f"message {number} has no {key!r}, only {', '.join(map(repr, message)) or 'nothing'}")
        if not isinstance(message[key], str):
            raise BadRow(f"message {number}: {key} is {_kind(message[key])}, not text")
    if message["role"] == ANSWERER and not message["content"].strip():
        raise BadRow(f"message {number} is an empty answer")
    return message


def content_of(messages: list[Message]) -> bytes:
    """Bytes by which a conversation is known. Raises `BadRow` for text that is no UTF-8."""
    try:
        return json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"half a character ({error.reason})") from error


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
