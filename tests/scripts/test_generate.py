import io
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizer import train_tokenizer
from eval.models import Examined
from model.cache import RingCache
from model.config import WindreachConfig
from model.decoder import build_model
from model.decoding import Sampler
from model.errors import UserError, cli
from model.hub import save_hf
from scripts import generate
from scripts.generate import Conversation, parse, stream, texts_of, until
from tests.scripts.conftest import ByteTokenizer

PROMPT = list(b"the sea was calm and a ship came slowly")  # 39 tokens, more than 3 W


def sampling(temperature: float, top_p: float = 1.0, seed: int = 0) -> Sampler:
    return Sampler(temperature, top_p, torch.Generator().manual_seed(seed))


def take(
    examined: Examined, n: int, how: Sampler, cache: RingCache | None = None, prompt: Sequence[int] = PROMPT,
    block: int = 1,
) -> list[int]:  # fmt: skip
    return list(stream(examined.model, list(prompt), how, cache or RingCache(examined.model.config), block, n))


def test_streaming_from_the_ring_equals_greedy_full_passes(examined: Examined) -> None:
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(examined.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert take(examined, 20, sampling(0.0)) == ids[len(PROMPT) :]


def test_the_size_of_a_block_changes_no_token(examined: Examined) -> None:
    one_by_one, in_blocks = (take(examined, 40, sampling(1.0, 0.9), block=block) for block in (1, 16))
    assert one_by_one == in_blocks


def test_cache_bytes_are_those_of_the_window_however_much_is_written(examined: Examined) -> None:
    sizes = []
    for n in (1, 60):
        cache = RingCache(examined.model.config)
        take(examined, n, sampling(0.0), cache)
        sizes.append(cache.bytes)
    assert sizes == [2 * 2 * 5 * 16 * 4] * 2  # layers, keys and values, W slots, head size, bytes of a float


def test_the_seed_decides_the_sample(examined: Examined) -> None:
    first, again, other = (take(examined, 30, sampling(1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def streamed(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> str:
    return "".join(texts_of(tokens, decode, ByteTokenizer.bos_id))


@given(st.text() | st.text(alphabet="a\ufffd\u00e9\U0001f600"))
@example("\ufffd" * 9)
def test_text_streamed_token_by_token_is_the_text(text: str) -> None:
    assert streamed(text.encode(), ByteTokenizer().decode) == text
    assert streamed(text.encode(), one_mark_a_byte) == text


def one_mark_a_byte(ids: Sequence[int]) -> str:
    """As byte-fallback tokenizers decode: each byte of an incomplete character is a U+FFFD, three in this text."""
    return "".join("\ufffd" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in bytes(ids).decode(errors="surrogateescape"))


@given(st.lists(st.integers(1, 255), max_size=60))
def test_bytes_that_are_no_text_are_streamed_as_they_are_decoded(tokens: list[int]) -> None:
    assert streamed(tokens, ByteTokenizer().decode) == bytes(tokens).decode(errors="replace")


def test_a_tokenizer_with_byte_tokens_streams_what_it_decodes() -> None:
    tokenizer = train_tokenizer([" ".join(f"ship {i} came over the grey water" for i in range(400))], 330)
    for text in ("ship 3 caf\u00e9 \U0001f600\U0001f600 x", "\ufffd" * 9, "at the end \U0001f600"):
        ids = tokenizer.encode(text)
        for n in range(len(ids) + 1):  # also up to the middle of a character
            assert "".join(texts_of(ids[:n], tokenizer.decode, tokenizer.bos_id)) == tokenizer.decode(ids[:n])


def test_the_decoded_tokens_stay_few_in_an_endless_run_of_bytes_that_are_no_text() -> None:
    most = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return ByteTokenizer().decode(ids)

    *shown, rest = texts_of(itertools.repeat(0x80, 1000), decode, ByteTokenizer.bos_id)
    assert (len("".join(shown)), len(rest), most) == (997, 3, 17)


@given(st.text(alphabet="abc"), st.integers(1, 4))
def test_a_stop_string_is_found_however_the_text_arrives(text: str, size: int) -> None:
    stops, read = ["ab", "cca"], 0

    def parts() -> Iterator[str]:
        nonlocal read
        for start in range(0, len(text), size):
            read = start + size
            yield text[start:read]

    shown = "".join(until(parts(), stops))
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert shown == text[: min(starts, default=len(text))]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert not ends or read < min(ends) + size  # nothing is read after a stop string


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    texts = until(iter(["xa", "cc", "y", "c"]), ["ab", "cca"])
    assert list(texts) == ["x", "a", "ccy", "", "c"]


def talk(examined: Examined, stops: tuple[str, ...] = (), block: int = 1) -> Conversation:
    return Conversation(examined, sampling(0.0), stops, block)


def test_an_answer_comes_in_pieces_and_the_summary_tells_speed_and_memory(examined: Examined) -> None:
    talking = talk(examined)
    talking.say("calm sea")
    assert len(list(talking.answer(20))) == 22  # and what was held back, by the decoder and for stop strings
    assert re.fullmatch(
        r"9 prompt tokens in \d+\.\d\d s, then 20 tokens at [\d,.]+ tokens/s; cache 1,280 bytes", talking.summary()
    )


def test_turns_go_on_from_all_that_was_written(examined: Examined) -> None:
    talking, ids = talk(examined), [0]
    for text in ("the sea", "was calm and", "a ship"):
        talking.say(text)
        "".join(talking.answer(7))
        ids += text.encode()
        with torch.inference_mode():
            for _ in range(7):
                ids.append(int(examined.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert talking.unread == ids[-1:]
    assert talking.cache.get_seq_length() == len(ids) - 1
    assert talking.summary().startswith(f"{len(ids) - 21 + 2} prompt tokens")  # two turns began with a token unread


@pytest.mark.parametrize("block", [1, 16])
def test_an_end_of_text_ends_an_answer_but_not_an_endless_one(examined: Examined, block: int) -> None:
    with torch.no_grad():
        examined.model.lm_head.weight.zero_()  # all logits are equal: greedy takes token 0
    examined.tokenizer.eos_id = 0
    talking = talk(examined, block=block)
    talking.say("x")
    list(talking.answer(9))
    assert talking.written == 1
    endless = talk(examined, block=block)
    endless.say("x")
    assert sum(1 for _ in itertools.islice(endless.answer(None), 50)) == 50


@pytest.mark.parametrize("block", [1, 16])
def test_a_stop_string_ends_the_answer_and_is_not_shown(examined: Examined, block: int) -> None:
    whole = talk(examined)
    whole.say("calm sea")
    text = "".join(whole.answer(30))
    assert text == ByteTokenizer().decode(take(examined, 30, sampling(0.0), prompt=b"\0calm sea"))
    short = talk(examined, (text[10:12],), block)
    short.say("calm sea")
    assert "".join(short.answer(30)) == text[: text.index(text[10:12])]


def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # there are no weights
    assert main_with(tmp_path, monkeypatch, "--prompt", "ship") == 2
    assert "model_type is 'gpt2'; this loader knows granite_swa, llama, ministral," in capfd.readouterr().err


def test_a_text_of_any_length_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MOST_BYTES", 5)
    for text, refused in ((b"abcde", False), (b"abcdef", True)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        with pytest.raises(UserError, match="longer than 5 bytes") if refused else nullcontext():
            assert generate.opening(parse(["runs/x"])) == "abcde"


def test_logits_that_are_not_finite_are_no_text(examined: Examined) -> None:
    with torch.no_grad():
        examined.model.model.norm.weight.fill_(float("inf"))
    talking = talk(examined)
    talking.say("x")
    with pytest.raises(UserError, match="logits are not finite"):
        list(talking.answer(3))


@pytest.mark.parametrize(("terminal", "shown"), [(True, r"a\x1b[2J"), (False, "a\x1b[2J")])
def test_what_is_written_can_not_command_a_terminal(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: str
) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", out)
    talking = talk(examined)
    talking.answer = lambda max_tokens: iter(["a\x1b", "[2J"])  # type: ignore[method-assign]
    generate.reply(talking, "x", 2)
    assert out.getvalue() == shown + "\n"


def test_a_text_that_can_not_be_spelled_is_refused(examined: Examined) -> None:
    with pytest.raises(
        UserError, match=r"^the prompt is empty; give --prompt TEXT, or a file or a line with text in it$"
    ):
        talk(examined).say("")
    examined.tokenizer.encode = lambda text: [254 if c == "\u2603" else ord(c) for c in text]
    with pytest.raises(UserError, match=r"^the prompt contains '\u2603', which this model's tokenizer doesn't know"):
        talk(examined).say("snow \u2603 man")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max-tokens=0", "--max-tokens 0: give at least 1"),
        ("--max-tokens=-5", "--max-tokens -5: give at least 1"),
        ("--temperature=-1", r"--temperature -1.0: give 0 \(greedy\) or more"),
        ("--temperature=nan", "--temperature nan: give 0"),
        ("--top-p=0", "--top-p 0.0: give more than 0 and at most 1"),
        ("--stop=", "--stop '': an empty text stops before the first token"),
        ("--seed=-1", r"--seed -1: give 0 or more, and less than 2\^63"),
        ("--endless --max-tokens=3", "--endless --max-tokens 3: give one of the two"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["runs/x", *argument.split()])


def test_a_device_that_this_machine_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--device nowhere: .*; leave it out, or give cpu or cuda$"):
        generate.check_device("nowhere")


def test_a_prompt_that_can_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(*arguments: str) -> str | None:
        return generate.opening(parse(["runs/x", *arguments]))

    with pytest.raises(UserError, match="No such file or directory; give a text file"):
        text("--file", f"{tmp_path}/none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 \(byte 3\)"):
        text("--file", f"{tmp_path}/latin.txt")
    with pytest.raises(UserError, match=r"--prompt is not UTF-8 \(byte 1\); convert it first"):
        text("--prompt", "a\udcff")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 \(byte 0\)"):
        text()


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_line_that_can_not_be_read_ends_a_piped_text_but_not_one_at_a_terminal(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines, told = b"good\nb\xff\nbetter", "line 2 of standard input is not UTF-8 (byte 1); convert it first"
    piped, typed = talk(examined), talk(examined)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    with pytest.raises(UserError) as caught:
        generate.converse(piped, 3)
    monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO(lines)))
    generate.converse(typed, 3)
    assert str(caught.value) == told
    assert (piped.turns, typed.turns) == (1, 2)
    assert capfd.readouterr().err == f"> > error: {told}\n> > "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, of a model without training."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer([" ".join(f"ship {i} came over the grey water" for i in range(400))], 330)
    config = WindreachConfig(
        vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=5,
    )  # fmt: skip
    save_hf(build_model(config, seed=3), folder / "hf")
    tokenizer.save(folder / "hf")
    (folder / "settings.yaml").write_text("name: tiny\n")
    return folder


def main_with(run: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["generate.py", str(run), *arguments])
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    try:
        return cli(generate.main)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def test_interactive_lines_are_turns_also_through_a_pipe(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"came over\n\nthe water")))
    assert main_with(run, monkeypatch, "--interactive", "--max-tokens", "3", "--prompt", "ship") == 0
    out, told = capfd.readouterr()
    assert out.count("\n") >= 3
    assert "then 9 tokens at" in told


class Signalling(io.StringIO):
    """A terminal at which, after some text, somebody presses Ctrl-C, or from which a signal comes."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number, self.sent = number, False

    def flush(self) -> None:
        if self.tell() > 40 and not self.sent:
            self.sent = True
            signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "mode", "code"),
    [(signal.SIGINT, "--endless", 0), (signal.SIGTERM, "--endless", 0), (signal.SIGINT, "--max-tokens=999", 130)],
)
def test_only_an_open_end_is_well_ended_by_a_signal(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals, mode: str,
    code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdout", Signalling(number))
    assert main_with(run, monkeypatch, mode, "--prompt", "ship") == code
    summary = r"^\d+ prompt tokens in .*, then [\d,]+ tokens at [\d,.]+ tokens/s; cache 1,280 bytes$"
    assert bool(re.search(summary, capfd.readouterr().err, re.MULTILINE)) == (code == 0)


def test_nobody_reading_on_is_no_fault(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        assert main_with(run, monkeypatch, "--endless", "--prompt", "ship") == 0
    assert "1 tokens" in capfd.readouterr().err


def test_wrong_input_exits_with_2_and_a_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main_with(run, monkeypatch, "--prompt", "") == 2
    assert "error: the prompt is empty; give --prompt TEXT" in capfd.readouterr().err


def test_an_endless_process_streams_as_it_writes_until_a_signal(run: Path) -> None:
    command = [sys.executable, "scripts/generate.py", str(run), "--endless", "--prompt", "ship"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert len(process.stdout.read(2000)) == 2000  # before it has ended
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert b"tokens/s; cache 1,280 bytes" in told
    assert b"Traceback" not in told
