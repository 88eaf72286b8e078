"""Continues a text token by token in constant memory: each layer keeps keys and values of its last W tokens only.

    python scripts/generate.py runs/quickstart --prompt "It was a dark night"
    python scripts/generate.py runs/quickstart --file letter.txt --max-tokens 2000 --temperature 0.7 --top-p 0.9
    cat letter.txt | python scripts/generate.py runs/quickstart --greedy --stop "THE END"
    python scripts/generate.py runs/quickstart --interactive        the model answers each line; it remembers the others
    python scripts/generate.py runs/quickstart --prompt "Once" --endless --compile      until Ctrl-C or SIGTERM

The continuation goes to stdout. Speed (tokens/s) and cache size (bytes) go to stderr. Exit codes: 0 done, also when a
signal ends an --endless or --interactive text; 2 the input is wrong; 130 Ctrl-C otherwise.
"""

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.models import Examined, load_model
from model.errors import UserError, cli, printable, read_small_file

MOST_BYTES = 64 << 20  # of a text to continue

if TYPE_CHECKING:
    from model.cache import RingCache
    from model.decoder import WindreachForCausalLM
    from model.decoding import Sampler


def stream(
    model: "WindreachForCausalLM", ids: Sequence[int], sampler: "Sampler", cache: "RingCache", block: int = 1,
    max_tokens: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield the tokens after `ids`, without end if `max_tokens` is None. They are computed `block` at a time."""
    import torch

    from model.decoding import token_blocks

    prompt = torch.tensor([ids], device=model.device)
    for tokens in token_blocks(model, prompt, sampler, cache, block, max_tokens):
        yield from tokens[0].tolist()


def texts_of(tokens: Iterable[int], decode: Callable[[Sequence[int]], str], before: int) -> Iterator[str]:
    """Yield the text that each token completes, then the rest. Together they are what all tokens decode to.

    A token decoded alone loses its leading space, so the token before it (`before` at first) is decoded with it. A
    character of several tokens decodes to at most three U+FFFD until it is complete, so these are held back.
    """
    ids, pending = [before], ""
    shown = len(decode(ids))  # characters of the decoded ids
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        end = max(shown, len(text) - min(3, len(text) - len(text.rstrip("\ufffd"))))
        yield text[shown:end]
        pending = text[end:]
        ids = ids[-16:] if pending else [token]  # three characters of four bytes, and some tokens before them
        shown = len(decode(ids)) - len(pending)
    yield pending


def until(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the texts up to the first stop string. Text is held back while it may be the beginning of one."""
    held = ""
    for text in texts:
        held += text
        if starts := [held.find(stop) for stop in stops if stop in held]:
            yield held[: min(starts)]
            return
        end = len(held) - max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[:end]
        held = held[end:]
    yield held


class Conversation:
    """One text that the user and the model write in turns; the cache is kept from turn to turn.

    With blocks of more than one token the cache may hold more than was shown, so there can be one turn only.
    """

    def __init__(self, examined: Examined, sampler: "Sampler", stops: Sequence[str], block: int = 1) -> None:
        from model.cache import RingCache

        self.model, self.tokenizer, self.stops = examined.model, examined.tokenizer, stops
        self.sampler, self.block = sampler, block
        self.cache = RingCache(self.model.config)
        self.unread = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]  # tokens not yet in the cache
        self.read = self.written = self.turns = 0
        self.seconds = {"reading": 0.0, "writing": 0.0}

    def say(self, text: str) -> None:
        """Append the user's text. Raises UserError if it is empty or the tokenizer has no token for a character."""
        ids = self.tokenizer.encode(text)
        if not ids:
            raise UserError("the prompt is empty; give --prompt TEXT, or a file or a line with text in it")
        if self.tokenizer.unk_id in ids:
            unknown = next((c for c in text if self.tokenizer.unk_id in self.tokenizer.encode(c)), text)
            raise UserError(f"the prompt contains {unknown!r}, which this model's tokenizer doesn't know; leave it out")
        self.unread += ids

    def answer(self, max_tokens: int | None) -> Iterator[str]:
        """The continuation up to its end, a stop string or `max_tokens`; without end if that is None."""
        return until(texts_of(self._tokens(max_tokens), self.tokenizer.decode, self.unread[-1]), self.stops)

    def _tokens(self, max_tokens: int | None) -> Iterator[int]:
        self.read += len(self.unread)
        self.turns += 1
        phase, before = "reading", time.perf_counter()
        for token in stream(self.model, self.unread, self.sampler, self.cache, self.block, max_tokens):
            self.seconds[phase] += time.perf_counter() - before
            phase, before = "writing", time.perf_counter()
            self.unread, self.written = [token], self.written + 1
            if token == self.tokenizer.eos_id and max_tokens is not None:
                return
            yield token

    def summary(self) -> str:
        """Speed and memory. The time of a turn's first token counts as reading the prompt."""
        timed = self.written - self.turns
        rate = f"{timed / self.seconds['writing']:,.1f} tokens/s" if timed > 0 else "unknown speed"
        reading = f"{self.read:,} prompt tokens in {self.seconds['reading']:.2f} s"
        return f"{reading}, then {self.written:,} tokens at {rate}; cache {self.cache.bytes:,} bytes"


def reply(talk: Conversation, text: str, max_tokens: int | None) -> None:
    """Print the answer to a text while it is written."""
    talk.say(text)
    shown = printable if sys.stdout.isatty() else str  # a terminal would obey what it is sent
    for part in talk.answer(max_tokens):
        print(shown(part), end="", flush=True)
    print(flush=True)


def converse(talk: Conversation, max_tokens: int) -> None:
    """Answer each line of standard input. A bad line ends a piped text; at a terminal only its error is printed."""
    terminal = sys.stdin.isatty()
    for number in itertools.count(1):
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.buffer.readline(MOST_BYTES + 1)):
            return
        try:
            text = _utf8(line.rstrip(b"\r\n"), f"line {number} of standard input")
            if text.strip():
                reply(talk, text, max_tokens)
        except UserError as error:
            if not terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="run folder or checkpoint")
    source, length = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue; default: --file, or standard input")
    source.add_argument("--file", metavar="FILE", help="continue the text of this UTF-8 file")
    length.add_argument("--interactive", action="store_true", help="answer each line of standard input")
    length.add_argument("--endless", action="store_true", help="continue until Ctrl-C, SIGTERM or a stop string")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of a continuation; default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default: %(default)s")
    parser.add_argument("--greedy", action="store_const", const=0.0, dest="temperature", help="same as --temperature 0")
    parser.add_argument("--top-p", type=float, default=0.95, help="mass of the likeliest tokens; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--compile", action="store_true", help="compile first: about 15 s, then about twice as fast")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    arguments = parser.parse_args(argv)
    n, t, p, seed = arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed
    for wrong, message in (
        (arguments.endless and n is not None, f"--endless --max-tokens {n}: give one of the two"),
        (n is not None and n < 1, f"--max-tokens {n}: give at least 1"),
        (not 0 <= t < float("inf"), f"--temperature {t}: give 0 (greedy) or more"),
        (not 0 < p <= 1, f"--top-p {p}: give more than 0 and at most 1"),
        (not 0 <= seed < 2**63, f"--seed {seed}: give 0 or more, and less than 2^63"),
        ("" in arguments.stop, "--stop '': an empty text stops before the first token; leave it out"),
    ):
        if wrong:
            raise UserError(message)
    return arguments


def check_device(name: str) -> None:
    """Raises UserError if torch can't use the device on this machine."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; leave it out, or give cpu or cuda") from error


def opening(arguments: argparse.Namespace) -> str | None:
    """The text to begin with; None if an interactive text begins with the first line of standard input."""
    if arguments.prompt is not None:
        return _utf8(arguments.prompt.encode("utf-8", "surrogateescape"), "--prompt")
    if arguments.file is not None:
        try:
            return _utf8(read_small_file(arguments.file, MOST_BYTES), arguments.file)
        except OSError as error:
            raise UserError(f"--file {arguments.file}: {error.strerror}; give a text file that can be read") from error
    if arguments.interactive:
        return None
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, --file FILE, --interactive, or pipe a text in")
    return _utf8(sys.stdin.buffer.read(MOST_BYTES + 1), "standard input")


def _utf8(text: bytes, where: str) -> str:
    if len(text) > MOST_BYTES:
        raise UserError(f"{where} is longer than {MOST_BYTES:,} bytes, the most that is read; give its end alone")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); convert it first") from error


def main() -> None:
    arguments = parse(sys.argv[1:])
    text = opening(arguments)
    if arguments.device:
        check_device(arguments.device)
    examined = load_model(arguments.model, arguments.device, ours_only=True)
    import torch

    from model.decoding import GPU_BLOCK, Sampler

    device = examined.device
    generator = torch.Generator(device).manual_seed(arguments.seed)
    sampler = Sampler(arguments.temperature, arguments.top_p, generator)
    block = GPU_BLOCK if device.type == "cuda" and not arguments.interactive else 1
    talk = Conversation(examined, sampler, arguments.stop, block)
    if arguments.compile:
        talk.model.compile_decoding()
    open_ended, max_tokens = arguments.endless or arguments.interactive, arguments.max_tokens or 200
    if open_ended:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if text is not None:
            reply(talk, text, None if arguments.endless else max_tokens)
        if arguments.interactive:
            converse(talk, max_tokens)
    except KeyboardInterrupt:
        if not open_ended:
            raise
    except BrokenPipeError:  # the reader has left; what Python writes at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"\n{talk.summary()}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli(main))
