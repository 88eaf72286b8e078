"""Claims about `eval.conformance.served`, against a real model behind a real HTTP server on the loopback interface."""

import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from eval.conformance.served import WORDS, Endpoint, compare, examine_endpoint, main, verdict
from model.errors import UserError

WINDOW, LAYERS, VOCABULARY = 6, 2, 2048
REACH = LAYERS * (WINDOW - 1)
Ids = list[int]


def mistral(window: int | None = WINDOW) -> MistralForCausalLM:
    """The same random weights for every window, large enough for influence to be seen over all of R."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


class Server(HTTPServer):
    """The completions protocol. What a test sets makes the server take words, or go wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = self.decoding_model = mistral()
        self.takes_ids = self.gives_logprobs = True
        self.chat_form = False
        self.context = 4096
        self.prefilled: Callable[[Ids, Ids], Ids] = lambda ids, before: ids  # what is computed after another prompt
        self.before: Ids = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @torch.inference_mode()
    def generate(self, ids: Ids, count: int) -> Iterator[tuple[str, dict[str, float]]]:
        """Greedy tokens, each with the log-probabilities of the five likeliest."""
        for step in range(count):
            model = self.decoding_model if step else self.model
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            top = logprobs.topk(5)
            yield f"<{top.indices[0]}>", {f"<{i}>": p for i, p in zip(top.indices.tolist(), top.values.tolist())}
            ids = [*ids, int(top.indices[0])]

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != "tiny":
            return 404, {"error": f"The model {body['model']} does not exist."}
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = [1, *(1000 + WORDS.split().index(word) for word in ids.split())]
        elif not self.takes_ids:
            return 422, {"error": "prompt must be a string"}
        ids = ids[-self.context :]
        computed, self.before = self.prefilled(ids, self.before), ids
        tokens, top = zip(*self.generate(computed, body["max_tokens"]))
        logprobs: Any = {"tokens": tokens, "top_logprobs": top}
        if self.chat_form:
            listed = ([{"token": token, "logprob": p} for token, p in step.items()] for step in top)
            logprobs = {"content": [{"token": t, "top_logprobs": step} for t, step in zip(tokens, listed)]}
        if not self.gives_logprobs or "logprobs" not in body:
            logprobs = None
        return 200, {
            "choices": [{"text": "".join(tokens), "logprobs": logprobs}],
            "usage": {"prompt_tokens": len(ids)},
        }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(*self.server.complete(body))

    def reply(self, status: int, content: Any) -> None:
        self.send_response(status)
        if status == 307:
            self.send_header("Location", content)
        self.end_headers()
        self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running, serving(running):
        yield running


@contextmanager
def serving(server: Server) -> Iterator[None]:
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield
    server.shutdown()
    thread.join()


def examine(server: Server, **settings: Any) -> dict[str, Any]:
    endpoint = Endpoint(server.url, "tiny", generate=2, compare=settings.pop("compare", "logprobs"))
    return examine_endpoint(endpoint, **{"window": WINDOW, "layers": LAYERS, "texts": 2} | settings)


@pytest.mark.parametrize(("takes_ids", "chat_form"), [(True, False), (False, False), (True, True)])
def test_the_reach_of_a_right_server_is_met_exactly(server: Server, takes_ids: bool, chat_form: bool) -> None:
    server.takes_ids, server.chat_form = takes_ids, chat_form
    result = examine(server)
    assert result["prompts_of"] == ("token ids" if takes_ids else "words")
    assert (result["seen"], result["faults"]) == (REACH, [])
    assert verdict(result).endswith("R = 10 is met.")


@pytest.mark.parametrize(
    ("window", "seen", "cause"),
    [
        (WINDOW + 1, REACH + LAYERS, "each layer sees W + 1 tokens"),
        (WINDOW - 1, REACH - LAYERS, "each layer sees W - 1 tokens"),
        (None, 73, "the window is ignored"),
        (2 * WINDOW, 2 * (2 * WINDOW - 1), "larger than asked"),
    ],
)
def test_a_wrong_window_is_found(server: Server, window: int | None, seen: int, cause: str) -> None:
    server.model = server.decoding_model = mistral(window)
    result = examine(server)
    assert result["seen"] == seen
    assert [cause in fault for fault in result["faults"]] == [True]


def test_a_window_that_only_decoding_ignores_is_found(server: Server) -> None:
    server.decoding_model = mistral(None)
    result = examine(server)
    assert result["seen_by_prefill"] == REACH < result["seen"]
    assert ["only generated tokens see so far" in fault for fault in result["faults"]] == [True]


def test_text_alone_shows_an_ignored_window_and_never_claims_a_smaller_one(server: Server) -> None:
    server.gives_logprobs = False
    faded = examine(server, compare="text", reach=60, window=None, layers=None)
    assert 0 < faded["seen"] <= REACH
    assert faded["faults"] == []
    server.model = server.decoding_model = mistral(None)
    assert "the window is ignored" in examine(server, compare="text")["faults"][0]


def shared(ids: Ids, before: Ids) -> int:
    return next((i for i, (one, other) in enumerate(zip(ids, before)) if one != other), min(len(ids), len(before)))


def test_a_prefix_cache_that_keeps_one_token_too_many_is_found(server: Server) -> None:
    server.prefilled = lambda ids, before: before[: shared(ids, before) + 1] + ids[shared(ids, before) + 1 :]
    faults = examine(server)["faults"]
    assert any("after a prompt with the same beginning (82 tokens in common)" in fault for fault in faults)


def test_a_prefix_cache_that_has_dropped_a_part_of_the_window_is_found(server: Server) -> None:
    def keeps_what_the_longer_prompt_needed(ids: Ids, before: Ids) -> Ids:
        lost = shared(ids, before) if len(before) >= len(ids) + WINDOW else 0
        return [0] * lost + ids[lost:]

    server.prefilled = keeps_what_the_longer_prompt_needed
    faults = examine(server)["faults"]
    assert ["after a longer prompt with the same beginning (40 tokens in common)" in fault for fault in faults] == [
        True
    ]


def test_a_second_chunk_that_does_not_see_the_first_is_found(server: Server) -> None:
    server.prefilled = lambda ids, before: ids[min(shared(ids, before), len(ids) - 1) :]
    faults = examine(server)["faults"]
    assert any("after its own beginning (82 tokens in common)" in fault for fault in faults)


def test_rounding_widens_the_tolerance_and_is_no_fault(server: Server) -> None:
    exact, rounded = mistral(), mistral()
    rounded.lm_head.weight.data *= 1 + 1e-4

    def rounds_after_shorter_prompts(ids: Ids, before: Ids) -> Ids:
        server.model = server.decoding_model = rounded if len(before) < len(ids) else exact
        return ids

    server.prefilled = rounds_after_shorter_prompts
    result = examine(server)
    assert 1e-4 < result["tolerance"] < 0.1
    assert result["faults"] == []


@pytest.mark.parametrize(("token", "effect"), [("\ufffd", (0.0, 0.0)), ("", (0.0, 0.0)), ("c", (1.0, 1.0))])
def test_tokens_whose_text_does_not_name_them_are_not_compared(
    server: Server, monkeypatch: pytest.MonkeyPatch, token: str, effect: tuple[float, float]
) -> None:
    def complete(body: dict[str, Any]) -> tuple[int, Any]:
        p = -float(body["prompt"][0])
        logprobs = {"tokens": [token, "x"], "top_logprobs": [{token: p, "a": -1.0, "b": -math.inf}, {"x": p}]}
        return 200, {"choices": [{"text": "", "logprobs": logprobs}], "usage": {"prompt_tokens": 1}}

    monkeypatch.setattr(server, "complete", complete)
    endpoint = Endpoint(server.url, "tiny")
    assert compare(endpoint.complete([1]), endpoint.complete([2])) == effect


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDREACH_API_KEY", "secret")
    Endpoint(server.url, "tiny").complete([1000])
    assert server.keys == {"Bearer secret"}


def test_what_goes_wrong_is_said_in_a_sentence(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no answer .*refused.*; is the server up"):
            examine_endpoint(Endpoint(nobody, "tiny"))
    with pytest.raises(UserError, match="begins with http"):
        Endpoint("file:///etc/hosts", "tiny")
    with pytest.raises(UserError, match=r"HTTP 404 .*The model other does not exist.*lists: tiny"):
        examine_endpoint(Endpoint(server.url, "other"))
    with pytest.raises(UserError, match="stopped after 5 requests; raise --max-requests"):
        examine_endpoint(Endpoint(server.url, "tiny", most_requests=5))
    with pytest.raises(UserError, match="--length 32: too short to look beyond 30 tokens"):
        examine(server, length=32, reach=30)
    server.gives_logprobs = False
    with pytest.raises(UserError, match="no log-probabilities; switch them on"):
        examine(server)


def test_a_prompt_that_is_cut_is_refused(server: Server) -> None:
    server.context = 50
    with pytest.raises(UserError, match="a prompt of 84 tokens is counted as 50; distances are unknown"):
        examine(server)


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, "<html>", "the answer is not JSON"),
        (200, {"choices": []}, "no choices, text or usage.prompt_tokens in"),
        (307, "http://127.0.0.1:1/stolen", "HTTP 307"),
        (401, "no", "HTTP 401 Unauthorized; the key is read from WINDREACH_API_KEY: no"),
    ],
)
def test_a_strange_answer_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, content: Any, words: str
) -> None:
    monkeypatch.setattr(server, "complete", lambda body: (status, content))
    with pytest.raises(UserError, match=words):
        examine(server)


@pytest.mark.parametrize(("window", "code"), [(WINDOW, 0), (WINDOW + 1, 1)])
def test_the_command_writes_json_and_its_exit_code_tells_of_faults(
    server: Server, tmp_path: Path, window: int, code: int
) -> None:
    server.model = server.decoding_model = mistral(window)
    run = [
        sys.executable, "-m", "eval.conformance.served", "--endpoint", server.url, "--model", "tiny",
        "--window", str(WINDOW), "--layers", str(LAYERS), "--texts", "1", "--json", str(tmp_path / "served.json"),
    ]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    assert ("FAULT:" in done.stdout) == bool(code)
    assert json.loads((tmp_path / "served.json").read_text())["seen"] == LAYERS * (window - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "8"], "give --window and --layers together"),
        (["--reach", "8", "--window", "8", "--layers", "2"], "or --reach alone"),
        (["--json", "nowhere/served.json"], "there is no folder nowhere"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["served", "--endpoint", "http://127.0.0.1:1", "--model", "tiny", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert words in capsys.readouterr().err
