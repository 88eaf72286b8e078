"""Chat templates: which tokens are answers, against strings written by hand, and what a template may not do."""

import pickle
import re
import resource
import signal
import time
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data.chat import template
from data.chat.messages import BadRow
from data.chat.template import ChatTemplate
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from model.errors import UserError

PLAIN = (
    "{% for message in messages %}{{ message.role + ':\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'a:\n' }}"
    "{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}{{ '\n' }}"
    "{% else %}{{ message.role + ':\n' + message.content + '\n' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SEA = [
    {"role": "system", "content": "The sea was calm."},
    {"role": "user", "content": "The ship came slowly."},
    {"role": "assistant", "content": "Birds cried above."},
    {"role": "user", "content": "The long water."},
    {"role": "assistant", "content": "Grey."},
]


def with_template(tokenizer: Tokenizer, written: str) -> Tokenizer:
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return SentencePieceTokenizer(tokenizer.model, written)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer.json with the marks of ChatML. As in GPT-2's, the offsets of its tokens leave out blanks."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_end|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the sea was calm and the ship came slowly"] * 20, trainer)
    folder = tmp_path_factory.mktemp("byte-level")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(folder)


def shown(chat: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    """The text, with each answer between « and »."""
    ids, answers = chat.encode(messages)
    decode, text, end = chat.tokenizer.decode, "", 0
    for answer in answers:
        text += f"{decode(ids[end : answer.start])}«{decode(ids[answer.start : answer.end])}»"
        end = answer.end
    return text + decode(ids[end:])


def test_the_answers_are_what_the_template_adds_to_the_prompt_with_the_end_token(tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(with_template(tokenizer, PLAIN))
    ids, answers = chat.encode(SEA)
    assert [chat.tokenizer.decode(ids[a.start : a.end]) for a in answers] == ["Birds cried above.", "Grey."]
    assert [ids[a.end - 1] for a in answers] == [tokenizer.eos_id] * 2
    assert shown(chat, SEA) == (
        "system:\nThe sea was calm.\nuser:\nThe ship came slowly.\nassistant:\n«Birds cried above.»\nuser:\n"
        "The long water.\nassistant:\n«Grey.»\n"
    )


def test_marks_of_the_template_say_what_an_answer_is(tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(with_template(tokenizer, MARKED))
    assert shown(chat, SEA[1:3]) == "user:\nThe ship came slowly.\na:\n«Birds cried above.»\n"
    ids, (answer,) = chat.encode(SEA[1:3])
    assert ids[answer.end - 1] == tokenizer.eos_id


@pytest.mark.parametrize("content", ["calm", " the sea ", "é\n\n🙂 the ", "the\n"])
def test_blanks_at_the_ends_of_an_answer_belong_to_it(content: str, byte_level: Tokenizer) -> None:
    chat = ChatTemplate(byte_level)
    expected = f"<|im_start|>user\nsea?<|im_end|>\n<|im_start|>assistant\n«{content}<|im_end|>»\n"
    assert shown(chat, [{"role": "user", "content": "sea?"}, {"role": "assistant", "content": content}]) == expected


def test_ids_are_those_of_transformers(byte_level: Tokenizer) -> None:
    expected = byte_level.hugging_face().apply_chat_template(SEA)["input_ids"]
    assert ChatTemplate(byte_level).encode(SEA)[0] == expected


def test_an_answer_knows_where_its_instruction_and_the_system_prompt_begin(byte_level: Tokenizer) -> None:
    ids, answers = ChatTemplate(byte_level).encode(SEA)
    for answer, instruction in zip(answers, ("The ship", "The long"), strict=True):
        for start, begins in ((answer.instruction, instruction), (answer.system, "The sea")):
            assert byte_level.decode(ids[start:]).startswith(begins)
            assert byte_level.decode(ids[:start]).endswith("\n")
    _, (alone,) = ChatTemplate(byte_level).encode([{"role": "assistant", "content": "Grey."}])
    assert (alone.instruction, alone.system) == (-1, -1)


def test_the_template_goes_to_worker_processes_and_is_saved_with_the_tokenizer(
    tokenizer: Tokenizer, byte_level: Tokenizer, tmp_path: Any
) -> None:
    for number, one in enumerate((with_template(tokenizer, PLAIN), byte_level)):
        expected = ChatTemplate(one).encode(SEA)
        one.save(tmp_path / str(number))
        for again in (
            pickle.loads(pickle.dumps(ChatTemplate(one))),
            ChatTemplate(load_tokenizer(tmp_path / str(number))),
        ):
            assert again.encode(SEA) == expected


def test_the_date_in_a_template_is_always_the_same(tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(with_template(tokenizer, "{{ strftime_now('%d %B %Y') + '\n' }}" + PLAIN))
    assert pickle.loads(pickle.dumps(chat)).encode(SEA) == chat.encode(SEA)
    assert shown(chat, SEA).startswith("01 January 2025\nsystem:")


RULES = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
REFUSED = [
    (RULES + PLAIN, SEA, "the chat template fails: begin with the user"),
    (
        PLAIN.replace("{{ eos_token }}", "{{ eos_token }}{{ '!' if loop.last }}"),
        SEA,
        "the template writes the text up to message 3 differently when the conversation goes on, so its answer",
    ),
    (
        PLAIN.replace("'assistant:\n'", "'assistant:\nHm, '"),
        SEA,
        "the template writes the prompt for message 3 differently when the conversation goes on",
    ),
    (
        PLAIN.replace(":\n", ": "),
        [SEA[1], {"role": "assistant", "content": "slowly over"}],
        "one token holds both the border and the text of the answer 'slowly over</s>'",
    ),
    (MARKED, [SEA[1], {"role": "tool", "content": "a"}], r"no answer: the template marks none by {% generation %}"),
    (PLAIN, [SEA[1], {"role": "assistant", "content": "a</s>"}], "message 2 holds '</s>', which is a special token"),
    (PLAIN + "{{ 1 / 0 }}", SEA, "the chat template fails: division by zero"),
    (PLAIN + "{{ ''.__class__.__mro__ }}", SEA, "the chat template fails: access to attribute '__class__'"),
]


@pytest.mark.parametrize(("written", "messages", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_a_conversation_that_the_template_can_not_encode_is_refused_with_the_reason(
    written: str, messages: list[dict[str, Any]], reason: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(BadRow, match=re.escape(reason)):
        ChatTemplate(with_template(tokenizer, written)).encode(messages)


def test_a_template_without_end_is_stopped(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(template, "MOST_SECONDS", 0.2)
    began, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(BadRow, match=r"the chat template takes more than 0\.2 seconds"):
        ChatTemplate(with_template(tokenizer, endless)).encode(SEA)
    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) == before


@pytest.mark.parametrize("factor", ["", " * messages | length"], ids=["when it is compiled", "when it is rendered"])
def test_a_template_that_takes_much_memory_is_stopped(
    factor: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(template, "MOST_MEMORY", 64 << 20)
    with pytest.raises((BadRow, UserError), match=r"^the chat template takes more than 64 MiB"):
        ChatTemplate(with_template(tokenizer, f"{{{{ 'a' * 200000000{factor} }}}}")).encode(SEA)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_tokenizer_without_a_template_and_a_damaged_template_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"no chat template, which the conversations need; set data\.chat_template to a"
    ):
        ChatTemplate(tokenizer)
    with pytest.raises(UserError, match=r"the chat template fails: line 2: .*; name another in data\.chat_template"):
        ChatTemplate(with_template(tokenizer, "\n{% for %}"))
