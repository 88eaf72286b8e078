"""Continue a prompt, token by token, in constant memory: keys and values live in a ring of W slots per layer.

    python scripts/generate.py runs/quickstart --prompt "It was a dark night"
    python scripts/generate.py runs/quickstart --file letter.txt --max-tokens 2000 --temperature 0.7 --top-p 0.9
    cat letter.txt | python scripts/generate.py runs/quickstart --greedy --stop "THE END"

The continuation goes to stdout, tokens/s and the bytes of the cache to stderr. Exit codes: 0 done, 2 wrong input.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from eval.models import Examined, load_model
from model.cache import RingCache
from model.decoder import WindreachForCausalLM
from model.errors import UserError, cli

PREFILL_TOKENS = 512  # prompt tokens per forward pass; any number gives the same logits


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
    for start in range(0, len(prompt), PREFILL_TOKENS):
        chunk = torch.tensor([prompt[start : start + PREFILL_TOKENS]], device=device)
        logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    while True:
        token = sampling.draw(logits[0, -1])
        yield token
        logits = model(torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True).logits


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


def generate(examined: Examined, text: str, arguments: argparse.Namespace) -> str:
    """Write the continuation of `text` to stdout as it comes; returns the line about speed and memory."""
    model = examined.model
    if not isinstance(model, WindreachForCausalLM):
        raise UserError(
            f"MODEL {examined.name!r} is a {model.config.model_type} model, which brings its own cache; "
            "give a Windreach run or a checkpoint of type mistral, ministral, qwen3 or windreach"
        )
    tokenizer = examined.tokenizer
    prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    if not prompt:
        raise UserError("the prompt is empty, and this tokenizer has no token to begin a text with; give --prompt TEXT")
    greedy = arguments.greedy or arguments.temperature == 0
    sampling = Sampling(
        0.0 if greedy else arguments.temperature, arguments.top_p, torch.Generator().manual_seed(arguments.seed)
    )
    cache, words, stops = RingCache(model.config), Detokenizer(tokenizer.decode, prompt[-1]), Stops(arguments.stop)
    count, began, first = 0, time.perf_counter(), 0.0
    for token in stream(model, prompt, sampling, cache):
        first = first or time.perf_counter()
        count += 1
        if token == tokenizer.eos_id:
            break
        sys.stdout.write(stops.push(words.push(token)))
        sys.stdout.flush()
        if stops.found or count == arguments.max_tokens:
            break
    sys.stdout.write(stops.held + "\n")
    seconds = max(time.perf_counter() - first, 1e-9)
    rate = f"{(count - 1) / seconds:,.1f} tokens/s" if count > 1 else "one token"
    return (
        f"{len(prompt):,} prompt tokens in {first - began:.2f} s, then {count:,} tokens at {rate}; "
        f"cache {cache.bytes:,} bytes"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="run folder or checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="default: --file, or standard input")
    source.add_argument("--file", metavar="FILE", help="a UTF-8 file to continue")
    parser.add_argument("--max-tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    arguments = parser.parse_args(argv)
    if arguments.max_tokens < 1:
        raise UserError(f"--max-tokens {arguments.max_tokens}: give at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature {arguments.temperature}: give 0 (greedy) or more")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p {arguments.top_p}: give more than 0 and at most 1")
    if "" in arguments.stop:
        raise UserError("--stop '': an empty text stops before the first token; leave it out")
    return arguments


def read_prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, --file FILE, or pipe a text in")
    try:
        return Path(file).read_text(encoding="utf-8") if file else sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}; give a text file that can be read") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'standard input'} is not UTF-8 (byte {error.start}); convert it first") from error


def main() -> None:
    arguments = parse(sys.argv[1:])
    text = read_prompt(arguments.prompt, arguments.file)
    print(f"\n{generate(load_model(arguments.model, arguments.device), text, arguments)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli(main))
