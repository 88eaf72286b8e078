"""Encodes conversations by the chat template of a tokenizer, and finds the answers among the tokens.

`transformers` renders the template in its sandbox. A template may come from anybody, so time and memory are bounded.

An answer is what the template marks by `{% generation %}`. In a template without such marks it is what a message of the
role `assistant` adds to the prompt for it, up to and including the end token. That prompt must be a true prefix.
"""

import copy
import re
import resource
import signal
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.chat.messages import ANSWERER, BadRow, Message
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

MOST_SECONDS, MOST_MEMORY = 10.0, 1 << 30  # of one conversation
TODAY = datetime(2025, 1, 1)  # for templates that write the date: the same text must always give the same tokens
VERSION = 1  # raise it when the same conversation and template would give other tokens or answers


class Answer(NamedTuple):
    """Positions of tokens in a conversation."""

    start: int
    end: int
    instruction: int  # start of the last user message before the answer; -1 if there is none
    system: int  # start of the system prompt; -1 if there is none


class TooLong(Exception):
    """A template has taken more than `MOST_SECONDS`."""


class ChatTemplate:
    """Encodes conversations. Raises UserError for a tokenizer without a template, and for one that can't be parsed."""

    def __init__(self, tokenizer: "Tokenizer"):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template, which the conversations need; set data.chat_template to a file "
                "such as chat_template.jinja, or data.tokenizer.model_file to a folder that holds one"
            )
        self.tokenizer, self.source = tokenizer, tokenizer.chat_template
        hf = tokenizer.hugging_face()
        added = (token.content for token in hf.added_tokens_decoder.values() if token.special)
        self.variables, self.special = dict(hf.special_tokens_map), tuple({*hf.all_special_tokens, *added})
        self.backend = copy.deepcopy(hf.backend_tokenizer)
        self.backend.post_processor = None  # it may take blanks out of the offsets of a token
        try:
            with bounded():  # constant expressions are computed now
                compiled = _compile_jinja_template(self.source)
        except BadRow as reason:
            raise UserError(f"{reason}; name another in data.chat_template") from reason
        compiled.environment.globals["strftime_now"] = lambda form: TODAY.strftime(form)
        self.marks_answers = re.search(r"{%[-+]?\s*generation\b", self.source) is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.tokenizer,)  # in a worker process

    def encode(self, messages: list[Message]) -> tuple[list[int], list[Answer]]:
        """The token ids of a conversation and its answers. Raises `BadRow` with the reason why there are none."""
        for number, message in enumerate(messages, 1):
            for token in self.special:
                if any(token in text for text in message.values() if isinstance(text, str)):
                    raise BadRow(f"message {number} holds {token!r}, which is a special token of the tokenizer")
        text, spans = self._rendered(messages)
        encoding = self.backend.encode(text, add_special_tokens=False)
        starts, ends = [start for start, _ in encoding.offsets], [end for _, end in encoding.offsets]
        places = _places(text, messages)
        answers = []
        for span in spans:
            first, last = (bisect_left(starts, border) for border in span)
            if any(token and ends[token - 1] > border for token, border in zip((first, last), span)):
                raise BadRow(f"one token holds both the border and the text of the answer {text[slice(*span)][:20]!r}")
            users = [place for place, role in places if role == "user" and place < span[0]]
            systems = [place for place, role in places if role in ("system", "developer")]
            marks = (bisect_right(starts, some[0]) - 1 if some else -1 for some in (users[-1:], systems[:1]))
            answers.append(Answer(first, last, *marks))
        return encoding.ids, [answer for answer in answers if answer.start < answer.end]

    def _rendered(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and its answers, [start, end) in characters."""
        with bounded():
            text, spans = self._render(messages)
            if not self.marks_answers:
                numbers = [i for i, message in enumerate(messages) if message["role"] == ANSWERER]
                spans = [self._added(text, messages, number) for number in numbers]
        if not spans:
            raise BadRow("no answer: the template marks none by {% generation %}")
        return text, spans

    def _added(self, text: str, messages: list[Message], number: int) -> tuple[int, int]:
        """What message `number` adds to the prompt for it, without blanks after its end token."""
        prompt, _ = self._render(messages[:number], add_generation_prompt=True)
        so_far, _ = self._render(messages[: number + 1])
        for part, name in ((prompt, "the prompt for"), (so_far, "the text up to")):
            if not text.startswith(part) or not so_far.startswith(part):
                raise BadRow(
                    f"the template writes {name} message {number + 1} differently when the conversation goes on, so "
                    "its answer can't be told from the rest"
                )
        end = so_far.rstrip()
        return len(prompt), len(end if end.endswith(self.special) and len(end) > len(prompt) else so_far)

    def _render(
        self, messages: list[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), spans = render_jinja_template(
            [messages], chat_template=self.source, return_assistant_tokens_mask=self.marks_answers,
            add_generation_prompt=add_generation_prompt, **self.variables,
        )  # fmt: skip
        return text, spans[0] if spans else []


def _places(text: str, messages: Sequence[Message]) -> list[tuple[int, str]]:
    """Where the content of each message begins in the text, in characters, and its role."""
    places, cursor = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, cursor)
        start = cursor if start < 0 else start  # the template has changed it
        places.append((start, message["role"]))
        cursor = start + len(content) if text.startswith(content, start) else start
    return places


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the time and the memory of what is done inside, and say each failure as a `BadRow`."""
    from jinja2 import TemplateSyntaxError

    try:
        with _memory(), _time():
            yield
    except BadRow:
        raise
    except TooLong as error:
        raise BadRow(f"the chat template takes more than {MOST_SECONDS:g} seconds") from error
    except MemoryError as error:
        raise BadRow(f"the chat template takes more than {MOST_MEMORY >> 20:,} MiB") from error
    except Exception as error:  # a template may raise any, e.g. by 1 / 0
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadRow(f"the chat template fails: {line}{reason}") from error


@contextmanager
def _memory() -> Iterator[None]:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")  # on Linux
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MOST_MEMORY
        limits = [most, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
        soft = min(limits)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    if threading.current_thread() is not threading.main_thread():  # only that one has signals
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
