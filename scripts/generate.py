"""Continue a text, token by token, in constant memory: keys and values live in a ring of W slots per layer.

    python scripts/generate.py runs/quickstart --prompt "It was a dark night"
    python scripts/generate.py runs/quickstart --file letter.txt --max-tokens 2000 --temperature 0.7 --top-p 0.9
    cat letter.txt | python scripts/generate.py runs/quickstart --greedy --stop "THE END"
    python scripts/generate.py runs/quickstart --interactive        each line goes on from what both of you wrote
    python scripts/generate.py runs/quickstart --prompt "Once" --endless --compile      until Ctrl-C or SIGTERM

The continuation goes to stdout, tokens/s and the bytes of the cache to stderr. Exit codes: 0 done, also when an endless
or interactive text was stopped by a signal; 2 wrong input; 130 Ctrl-C otherwise.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from eval.models import Examined, load_model
from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError, cli

MAX_TOKENS = 200


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; `top_p` keeps the likeliest tokens of that mass."""

    temperature: float
    top_p: float
    generator: torch.Generator

    def draw(self, logits_v: Tensor) -> int:
        """One token id from logits (V,)."""
        if self.temperature == 0:
            return int(logits_v.argmax())
        probabilities, ids = (logits_v.float().cpu() / self.temperature).softmax(-1).sort(descending=True)
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= self.top_p, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=self.generator)])


@torch.inference_mode()
def stream(model: WindreachForCausalLM, prompt: Sequence[int], sampling: Sampling, cache: RingCache) -> Iterator[int]:
    """Token ids without end. The cache holds the last W tokens of each layer, whatever has been read or written."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    while True:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = sampling.draw(logits[0, -1])
        yield token
        ids = torch.tensor([[token]], device=device)


class Detokenizer:
    """Text of tokens as they come. One alone loses its leading space, so its predecessor is kept beside it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: int) -> None:
        self.decode = decode
        self._restart([before])

    def push(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character of several bytes."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith("\ufffd") and len(self.ids) < 8:
            return ""
        new = text[len(self.shown) :]
        self._restart([token])
        return new

    def _restart(self, ids: list[int]) -> None:
        self.ids, self.shown = ids, self.decode(ids)


class Stops:
    """Text held back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now; sets `found` once a stop string is complete, which is not shown."""
        self.held += text
        starts = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if starts:
            self.found, shown = True, self.held[: min(starts)]
            self.held = ""
            return shown
        keep = max((n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


class Conversation:
    """One text that a reader and the model write in turns; the ring goes on from turn to turn."""

    def __init__(self, examined: Examined, sampling: Sampling, stops: Sequence[str]) -> None:
        if not isinstance(examined.model, WindreachForCausalLM):
            raise UserError(
                f"MODEL {examined.name!r} is a {examined.model.config.model_type} model, which brings its own cache; "
                "give a Windreach run or a checkpoint of type mistral, ministral, qwen3 or windreach"
            )
        self.model, self.tokenizer, self.sampling, self.stops = examined.model, examined.tokenizer, sampling, stops
        self.cache = RingCache(self.model.config)
        self.unread: list[int] = []  # tokens that are not yet in the cache
        self.read = self.written = self.turns = 0
        self.reading_seconds = self.writing_seconds = 0.0

    def say(self, text: str) -> None:
        """Add to the text what the model is to go on from. Raises UserError where the tokenizer can't spell it."""
        ids = self.tokenizer.encode(text)
        if not ids:
            raise UserError("the prompt is empty; give --prompt TEXT, a file or a line that says something")
        if self.tokenizer.unk_id in ids:
            strange = next((c for c in text if self.tokenizer.unk_id in self.tokenizer.encode(c)), text)
            raise UserError(
                f"the prompt holds {strange!r}, which the tokenizer of this model doesn't know; leave it out"
            )
        if not self.turns and not self.unread and self.tokenizer.bos_id is not None:
            self.unread.append(self.tokenizer.bos_id)
        self.unread += ids

    def answer(self, max_tokens: int | None) -> Iterator[str]:
        """The continuation in pieces, up to its end, a stop string or `max_tokens`; without end if that is None."""
        self.read += len(self.unread)
        self.turns += 1
        words, stops = Detokenizer(self.tokenizer.decode, self.unread[-1]), Stops(self.stops)
        began = first = time.perf_counter()
        try:
            for count, token in enumerate(stream(self.model, self.unread, self.sampling, self.cache), 1):
                first = time.perf_counter() if count == 1 else first
                self.unread, self.written = [token], self.written + 1
                if token == self.tokenizer.eos_id and max_tokens is not None:
                    break
                yield stops.push(words.push(token))
                if stops.found or count == max_tokens:
                    break
        finally:
            self.reading_seconds += first - began
            self.writing_seconds += time.perf_counter() - first
        yield stops.held

    def summary(self) -> str:
        """Speed and memory. The first token of a turn is counted to the reading of its prompt."""
        timed = self.written - self.turns
        rate = f"{timed / self.writing_seconds:,.1f} tokens/s" if timed > 0 else "no speed to tell"
        return (
            f"{self.read:,} prompt tokens in {self.reading_seconds:.2f} s, then {self.written:,} tokens at {rate}; "
            f"cache {self.cache.bytes:,} bytes"
        )


def show(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def converse(talk: Conversation, lines: Iterable[bytes], max_tokens: int) -> None:
    """A turn for each line. Empty ones are passed over; a slip at a terminal is told, and does not end the text."""
    for number, line in enumerate(lines, 1):
        try:
            text = _utf8(line, f"line {number} of standard input")
            if not text.strip():
                continue
            talk.say(text)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        show(talk.answer(max_tokens))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="run folder or checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="default: --file, or standard input")
    source.add_argument("--file", metavar="FILE", help="a UTF-8 file to continue")
    parser.add_argument("--max-tokens", type=int, help=f"of a continuation; default: {MAX_TOKENS}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--interactive", action="store_true", help="go on with each line of standard input")
    length.add_argument("--endless", action="store_true", help="go on until Ctrl-C, SIGTERM or a stop string")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--compile", action="store_true", help="compile first: some 15 s, then about twice as fast")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    arguments = parser.parse_args(argv)
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    if arguments.endless and arguments.max_tokens is not None:
        raise UserError(f"--endless --max-tokens {arguments.max_tokens}: give one of the two")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UserError(f"--max-tokens {arguments.max_tokens}: give at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature {arguments.temperature}: give 0 (greedy) or more")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p {arguments.top_p}: give more than 0 and at most 1")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed {arguments.seed}: give 0 or more, and less than 2^63")
    if "" in arguments.stop:
        raise UserError("--stop '': an empty text stops before the first token; leave it out")
    if arguments.device:
        _check_device(arguments.device)


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; leave it out, or give cpu or cuda") from error


def opening(arguments: argparse.Namespace) -> str | None:
    """The text to begin with; None when an interactive one begins with its first line."""
    if arguments.prompt is not None:
        return _utf8(arguments.prompt.encode("utf-8", "surrogateescape"), "--prompt")
    if arguments.file is not None:
        try:
            return _utf8(Path(arguments.file).read_bytes(), arguments.file)
        except OSError as error:
            raise UserError(f"--file {arguments.file}: {error.strerror}; give a text file that can be read") from error
    if arguments.interactive:
        return None
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, --file FILE, --interactive, or pipe a text in")
    return _utf8(sys.stdin.buffer.read(), "standard input")


def lines_of_stdin() -> Iterator[bytes]:
    """Lines as they come, without their ends; a terminal gets a prompt for each."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line.rstrip(b"\r\n")


def _utf8(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); convert it first") from error


def write(arguments: argparse.Namespace, talk: Conversation) -> None:
    text = opening(arguments)
    if text is not None:
        talk.say(text)
        show(talk.answer(None if arguments.endless else arguments.max_tokens or MAX_TOKENS))
    if arguments.interactive:
        converse(talk, lines_of_stdin(), arguments.max_tokens or MAX_TOKENS)


def main() -> None:
    arguments = parse(sys.argv[1:])
    examined = load_model(arguments.model, arguments.device)
    temperature = 0.0 if arguments.greedy else arguments.temperature
    sampling = Sampling(temperature, arguments.top_p, torch.Generator().manual_seed(arguments.seed))
    talk = Conversation(examined, sampling, arguments.stop)
    if arguments.compile:
        talk.model.compile_decoding()
    open_ended = arguments.endless or arguments.interactive
    if open_ended:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        write(arguments, talk)
    except KeyboardInterrupt:
        if not open_ended:
            raise
    except BrokenPipeError:  # nobody reads on; what Python would still write at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"\n{talk.summary()}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli(main))
