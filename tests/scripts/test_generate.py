import io
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.models import Examined
from model.cache import RingCache
from model.errors import UserError
from scripts import generate
from scripts.generate import Detokenizer, Sampling, Stops, parse, read_prompt, stream
from tests.scripts.conftest import ByteTokenizer

PROMPT = list(b"the sea was calm and a ship came slowly")  # 39 tokens, more than 3 W


def sampling(temperature: float, top_p: float = 1.0, seed: int = 0) -> Sampling:
    return Sampling(temperature, top_p, torch.Generator().manual_seed(seed))


def take(examined: Examined, n: int, how: Sampling, cache: RingCache | None = None) -> list[int]:
    tokens = stream(examined.model, PROMPT, how, cache or RingCache(examined.model.config))
    return [next(tokens) for _ in range(n)]


@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 512])
def test_streaming_from_the_ring_equals_greedy_full_passes(
    examined: Examined, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PREFILL_TOKENS", chunk)
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(examined.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert take(examined, 20, sampling(0.0)) == ids[len(PROMPT) :]


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


def test_top_p_keeps_the_likeliest_tokens_that_hold_the_mass() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert {sampling(1.0, 0.79, seed).draw(logits) for seed in range(50)} == {1, 3}
    assert sampling(1.0, 1e-6).draw(logits) == 1


@given(st.text())
def test_text_streamed_token_by_token_is_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    words = Detokenizer(tokenizer.decode, tokenizer.bos_id)
    assert "".join(words.push(token) for token in tokenizer.encode(text)) == text


@given(st.text(alphabet="abc"), st.integers(1, 4))
def test_a_stop_string_is_found_however_the_text_arrives(text: str, size: int) -> None:
    stops = Stops(["ab", "cca"])
    shown = ""
    for start in range(0, len(text), size):
        shown += stops.push(text[start : start + size])
        if stops.found:
            break
    ends = [at for stop in stops.stops if (at := text.find(stop)) >= 0]
    assert stops.found == bool(ends)
    assert shown + stops.held == text[: min(ends, default=len(text))]


def test_generate_streams_and_tells_speed_and_memory(
    examined: Examined, arguments: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    line = generate.generate(examined, "calm sea", arguments)
    assert "9 prompt tokens" in line
    assert "cache 1,280 bytes" in line
    assert capsys.readouterr().out.endswith("\n")


def test_a_model_of_another_kind_is_refused(examined: Examined, arguments: SimpleNamespace) -> None:
    examined.model = torch.nn.Linear(1, 1)
    examined.model.config = SimpleNamespace(model_type="gpt2")
    with pytest.raises(UserError, match="is a gpt2 model, which brings its own cache; give a Windreach run"):
        generate.generate(examined, "x", arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max-tokens=0", "--max-tokens 0: give at least 1"),
        ("--temperature=-1", r"--temperature -1.0: give 0 \(greedy\) or more"),
        ("--temperature=nan", "--temperature nan: give 0"),
        ("--top-p=0", "--top-p 0.0: give more than 0 and at most 1"),
        ("--stop=", "--stop '': an empty text stops before the first token"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["runs/x", argument])


def test_a_prompt_that_can_not_be_read_is_refused(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="No such file or directory; give a text file"):
        read_prompt(None, f"{tmp_path}/none.txt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 \(byte 0\)"):
        read_prompt(None, None)
