"""Measures how far a served model sees, by requests to an OpenAI-compatible server.

    python -m eval.conformance.served --endpoint http://127.0.0.1:8000 --model NAME --window W --layers K

Tokens at distance d before the end of a prompt are changed, and the log-probabilities of the tokens that follow are
compared. With greedy decoding a difference above the tolerance means that the model sees that far. No difference proves
less: the influence may be smaller than the tolerance. So a reach is reported as "at least".

1. **Repeats**: the same prompt again, at once and after prompts that share its beginning or nothing. Differences show
   errors of the prefix cache and of chunked prefill. Small ones are rounding; they set the tolerance.
2. **Search**: all tokens from distance d back to the front are changed. Bisection finds the largest d with influence.
3. **Profile**: the same, and one token alone, at powers of two and around R and the reach found.

The environment variable WINDREACH_API_KEY holds the key, if the server wants one. Exit code 1 reports a fault.
"""

import argparse
import json
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eval.command import at_least
from model.errors import UserError, cli
from training.run.checkpoint import finite

Symbols = NDArray[np.int64]  # (T,) for each token of a prompt, which of the ids or words below it is
TOKEN_IDS = range(1000, 2000)  # ordinary tokens in the vocabularies that are common: special ones come before or after
WORDS = (
    "the of and to in is was for on that with as by at from be an or are not this but have had they you which one "
    "were all their there been if more when will would who so no out up into them then its only some could time"
)
FEWEST_SYMBOLS = 4
LIKELIEST = 5  # log-probabilities to ask for at each token: the most that every server gives
ROUNDING = 1e-6  # nats: float32 keeps no more of a log-probability
MARGIN = 3  # the tolerance is so many times the largest difference between repeats
FAULT_SHARE = 0.05  # a repeat that differs by more than this share of what another prompt changes is a fault
CLEAR = 100  # times the tolerance: an influence that ends so large is cut off, it has not faded
REPEAT_CAUSES = {
    "after a different prompt": "state of one request is left for the next",
    "asked again at once": "the cached prompt is not what was computed",
    "after a prompt with the same beginning": "the prefix cache keeps tokens that are not shared, or loses some",
    "after a longer prompt with the same beginning": "the prefix cache has dropped tokens that are still in the window",
    "after its own beginning": "prefill in chunks, or from the prefix cache, differs from prefill at once",
}


class Answer(NamedTuple):
    """What a server generated: the tokens, and for each {token: log-probability in nats} of the likeliest ones."""

    tokens: tuple[str, ...]
    steps: tuple[dict[str, float], ...]
    prompt_tokens: int


class Effect(NamedTuple):
    """Nats between two answers: at the first generated token (prefill), and at most at later ones (decoding)."""

    prefill: float
    decoding: float


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host must not get the key."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


class Endpoint:
    """An OpenAI-compatible server at `url`, asked for greedy completions. No proxy is used. `requests` counts."""

    def __init__(
        self,
        url: str,
        model: str,
        generate: int = 4,
        compare: str = "logprobs",
        timeout: float = 120.0,
        most_requests: int = 1000,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {url!r}: give a URL that begins with http:// or https://")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model, self.generate, self.compare, self.timeout = model, generate, compare, timeout
        self.requests, self.most_requests = 0, most_requests
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def complete(self, prompt: str | list[int]) -> Answer:
        """The server's greedy answer to a prompt. Raises UserError if it has no log-probabilities or no usage."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.generate, "temperature": 0}
        if self.compare == "logprobs":
            body["logprobs"] = LIKELIEST
        reply = self._send("completions", body)
        try:
            choice, prompt_tokens = reply["choices"][0], int(reply["usage"]["prompt_tokens"])
            text, logprobs = str(choice["text"]), choice.get("logprobs")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.url}/completions: no choices, text or usage.prompt_tokens in {reply!r:.200}"
            ) from error
        if self.compare == "text":
            return Answer((text,), (), prompt_tokens)
        if logprobs is None:
            raise UserError(
                f"{self.url}/completions: the answer has no log-probabilities; switch them on in the server, "
                "or give --compare text to compare generated text, which shows fewer changes"
            )
        tokens, steps = _read_logprobs(logprobs)
        return Answer(tokens or ("",), steps or ({},), prompt_tokens)  # nothing to compare if the model ends at once

    def models(self) -> list[str]:
        """The names of the models that the server lists; none if it has no such list."""
        try:
            return [str(entry["id"]) for entry in self._send("models")["data"]]
        except _Refused:
            return []

    def _send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        self.requests += 1
        if self.requests > self.most_requests:
            raise UserError(f"stopped after {self.most_requests} requests; raise --max-requests or lower --texts")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("WINDREACH_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url, data = f"{self.url}/{path}", None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(urllib.request.Request(url, data, headers), timeout=self.timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode(errors="replace").strip()
            remedy = "; the key is read from WINDREACH_API_KEY" if error.code in (401, 403) else ""
            raise _Refused(f"{url}: HTTP {error.code} {error.reason}{remedy}: {said}") from error
        except (OSError, HTTPException) as error:
            raise UserError(
                f"{url}: no answer ({error}); is the server up, and is {self.timeout:g} s enough?"
            ) from error
        except ValueError as error:
            raise UserError(f"{url}: the answer is not JSON; is this an OpenAI-compatible server?") from error


class _Refused(UserError):
    """The server answered with an HTTP error."""


def _read_logprobs(logprobs: dict[str, Any]) -> tuple[tuple[str, ...], tuple[dict[str, float], ...]]:
    """Tokens and log-probabilities of both forms: that of completions, and the `content` of chat, which some use."""
    if content := logprobs.get("content"):
        listed = [[(entry["token"], entry["logprob"]) for entry in step["top_logprobs"]] for step in content]
        tokens = [step["token"] for step in content]
    else:
        tokens, listed = logprobs.get("tokens") or [], [step.items() for step in logprobs.get("top_logprobs") or []]
    steps = (
        {token: p for token, p in step if _is_clear(token) and p is not None and math.isfinite(p)} for step in listed
    )
    return tuple(tokens), tuple(steps)


def _is_clear(token: str) -> bool:
    """Whether a token's text names it. Parts of a character do not: many are written as nothing or as U+FFFD."""
    return bool(token) and "\ufffd" not in token


def compare(one: Answer, other: Answer) -> Effect:
    """How far two answers differ. Tokens after the first that may differ have other contexts and are not compared."""
    if not one.steps:
        return Effect(float(one.tokens != other.tokens), 0.0)
    nats = []
    for token, other_token, step, other_step in zip(one.tokens, other.tokens, one.steps, other.steps):
        nats.append(_distance(step, other_step))
        if token != other_token or not _is_clear(token):
            break
    return Effect(nats[0], max(nats[1:], default=0.0))


def _distance(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference in nats, at the least: a token that is not listed is at most as likely as the last listed.

    >>> _distance({"a": -1.0, "b": -2.0}, {"a": -1.5, "c": -1.75})
    0.5
    """
    common = [abs(one[token] - other[token]) for token in one.keys() & other.keys()]
    least, other_least = (min(step.values(), default=math.inf) for step in (one, other))
    missing = [one[token] - other_least for token in one.keys() - other.keys()]
    missing += [other[token] - least for token in other.keys() - one.keys()]
    return max(0.0, *common, *missing)


class Prompts:
    """Prompts of known length in tokens: token ids where the server takes them, else words of one token each."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.words: tuple[str, ...] = ()
        try:
            self.extra = endpoint.complete(list(TOKEN_IDS[:8])).prompt_tokens - 8
        except _Refused as refusal:
            self.extra, self.words = self._single_token_words(refusal)
        self.count = len(self.words or TOKEN_IDS)  # different symbols

    def _single_token_words(self, refusal: UserError) -> tuple[int, tuple[str, ...]]:
        """Tokens that the server adds, and words that are one token. `refusal` is what it says to token ids."""
        words = WORDS.split()
        try:
            counts = [self.endpoint.complete(" ".join(words[:n])).prompt_tokens for n in range(1, len(words) + 1)]
        except _Refused as error:
            listed = ", ".join(self.endpoint.models()) or "none"
            raise UserError(f"{error}; models that it lists: {listed}; to token ids it says: {refusal}") from error
        usable = (words[0], *(word for word, step in zip(words[1:], np.diff(counts)) if step == 1))
        if len(usable) < FEWEST_SYMBOLS:
            raise UserError(f"{self.endpoint.url}: it takes no token ids, and only {usable} are one token each")
        return counts[0] - 1, usable

    def ask(self, sequence: Symbols) -> Answer:
        """The answer to a sequence of symbols. Raises UserError if the server counts other tokens than expected."""
        words = " ".join(self.words[i] for i in sequence) if self.words else None
        answer = self.endpoint.complete(words or [TOKEN_IDS[i] for i in sequence])
        if answer.prompt_tokens != len(sequence) + self.extra:
            raise UserError(
                f"{self.endpoint.url}: a prompt of {len(sequence) + self.extra} tokens is counted as "
                f"{answer.prompt_tokens}; distances are unknown. Is it cut to the context? Then give a smaller --length"
            )
        return answer

    def draw(self, length: int, *seed: int) -> Symbols:
        """A random sequence (length,). The first symbol is always the same: it may be special to the model."""
        sequence = np.random.default_rng(seed).integers(0, self.count, length)
        sequence[0] = 0
        return sequence

    def change(self, sequence: Symbols, start: int, end: int, *seed: int) -> Symbols:
        """A copy in which every symbol from index `start` to before `end` is another one."""
        changed, count = sequence.copy(), self.count
        shifts = np.random.default_rng(seed).integers(1, count, end - start)
        changed[start:end] = (changed[start:end] + shifts) % count
        return changed


def check_repeats(prompts: Prompts, sequence: Symbols) -> list[dict[str, Any]]:
    """The same prompt (T,) in different company: results {test, shared, difference, share, fault}.

    `shared` is how many tokens the prompt before had in common. `difference` is in nats, and `share` is its part of
    what an entirely different prompt changes. Rounding explains a small share; a large one is a fault.
    """
    length, half, first = len(sequence), len(sequence) // 2, prompts.ask(sequence)
    other = prompts.draw(length, 1, length)
    signal = max(compare(first, prompts.ask(other)))
    if signal <= ROUNDING:
        raise UserError(f"{prompts.endpoint.url}: two different prompts get the same answer; is this a language model?")
    first_half = prompts.ask(sequence[:half])

    def again(test: str, shared: int, *before: Symbols, subject: Symbols = sequence, answer: Answer = first) -> None:
        for prompt in before:
            prompts.ask(prompt)
        difference = max(compare(answer, prompts.ask(subject)))
        row = {"test": test, "shared": shared, "difference": difference, "share": difference / signal}
        results.append(row | {"fault": difference > FAULT_SHARE * signal})

    results: list[dict[str, Any]] = []
    again("after a different prompt", 0, other)
    again("asked again at once", length)
    for shared in (half + 1, length - 9, length - 2):
        again("after its own beginning", shared, other, sequence[:shared])
        again("after a prompt with the same beginning", shared, prompts.change(sequence, shared, length, shared))
    longer = prompts.change(sequence, half - 2, length, half)
    again("after a longer prompt with the same beginning", half - 2, longer, subject=sequence[:half], answer=first_half)
    return results


class Reach:
    """The effect of changed tokens by distance: the largest of several prompts (n, T)."""

    def __init__(self, prompts: Prompts, sequences: Sequence[Symbols], tolerance: float) -> None:
        self.prompts, self.sequences, self.tolerance = prompts, sequences, tolerance
        self.answers = [prompts.ask(sequence) for sequence in sequences]
        self.effects: dict[tuple[int, bool], Effect] = {}

    def effect(self, distance: int, alone: bool = False) -> Effect:
        """Nats when the token at a distance is changed, together with all before it unless `alone`."""
        if (distance, alone) not in self.effects:
            start = len(self.sequences[0]) - 1 - distance
            self.effects[distance, alone] = Effect(*map(max, zip(*self._measure(start, alone))))
        return self.effects[distance, alone]

    def _measure(self, start: int, alone: bool) -> Iterator[Effect]:
        for i, (sequence, answer) in enumerate(zip(self.sequences, self.answers)):
            changed = self.prompts.change(sequence, start if alone else 1, start + 1, i, start)
            yield (effect := compare(answer, self.prompts.ask(changed)))
            if effect.prefill and not answer.steps:
                return  # texts differ or not: more of them show no more

    def search(self, last: int) -> int:
        """Bisection for the largest distance up to `last` with an effect; 0 if there is none."""
        low, high, middle = 0, last + 1, last
        while high - low > 1:
            low, high = (middle, high) if max(self.effect(middle)) > self.tolerance else (low, middle)
            middle = (low + high) // 2
        return low

    def farthest(self, of: Callable[[Effect], float]) -> int:
        """The largest distance measured so far at which a number of the effect is above the tolerance; 0 if none."""
        return max((d for (d, _), effect in self.effects.items() if of(effect) > self.tolerance), default=0)

    def largest(self, distance: int) -> float:
        """The largest effect measured at a distance, 0 if none was."""
        return max((max(effect) for (d, _), effect in self.effects.items() if d == distance), default=0.0)

    def profile(self, last: int, edges: Iterable[int]) -> list[dict[str, Any]]:
        """Effects at powers of two, around the edges and at `last`: of one token, and of it and all before."""
        near = {edge + step for edge in edges for step in (-2, -1, 0, 1, 2)} | {2**n for n in range(last.bit_length())}
        return [
            {"distance": d, "one_token": self.effect(d, alone=True)._asdict(), "and_before": self.effect(d)._asdict()}
            for d in sorted(near | {last})
            if 1 <= d <= last
        ]


def examine_endpoint(
    endpoint: Endpoint,
    window: int | None = None,
    layers: int | None = None,
    reach: int | None = None,
    length: int | None = None,
    texts: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that the JSON file holds. R is `reach`, else layers · (window − 1), else unknown; `length` is tokens.

    Raises UserError if the server can't be asked, or if a prompt of `length` tokens is too short to show R.
    """
    asked = layers * (window - 1) if reach is None and window and layers else reach
    length = length or (2048 if asked is None else 2 * asked + 64)
    last = length - 1 - max(8, length // 8)  # the tokens beyond it are changed together: one alone may not be seen
    if last < (asked or 0) + 2:
        raise UserError(f"--length {length}: too short to look beyond {asked or 0} tokens; leave it out, or double it")
    prompts = Prompts(endpoint)
    sequences = [prompts.draw(length, 0, seed, i) for i in range(texts)]
    repeats = check_repeats(prompts, sequences[0])
    rounding = max((row["difference"] for row in repeats if not row["fault"]), default=0.0)
    measured = Reach(prompts, sequences, max(ROUNDING, MARGIN * rounding))
    edge = measured.search(last)
    profile = measured.profile(last, (edge, asked or edge))
    seen = measured.farthest(max)
    result = {
        "endpoint": endpoint.url, "model": endpoint.model, "models_listed": endpoint.models(),
        "prompts_of": "words" if prompts.words else "token ids", "compared": endpoint.compare, "length": length,
        "generated": endpoint.generate, "texts": texts, "seed": seed, "window": window, "layers": layers,
        "reach": asked, "tolerance": measured.tolerance, "longest_distance": last, "seen": seen,
        "seen_by_prefill": measured.farthest(lambda effect: effect.prefill), "effect_at_seen": measured.largest(seen),
        "repeats": repeats, "profile": profile, "requests": endpoint.requests,
    }  # fmt: skip
    return result | {"faults": [*repeat_faults(repeats), *reach_faults(result)]}


def repeat_faults(repeats: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence for each repeat that got another answer."""
    return [
        f"The same prompt gets another answer {row['test']} ({row['shared']:,} tokens in common): "
        f"the difference is {row['share']:.0%} of what another prompt changes. "
        f"Likely cause: {REPEAT_CAUSES[row['test']]}."
        for row in repeats
        if row["fault"]
    ]


def reach_faults(result: dict[str, Any]) -> list[str]:
    """A sentence if the model sees farther than R, or is cut off before R."""
    asked, seen, layers = result["reach"], result["seen"], result["layers"] or 0
    if asked is None or seen == asked:
        return []
    if seen > asked:
        cause = "the window is larger than asked, or another layer has none"
        if result["seen_by_prefill"] <= asked:
            cause = "the cache of decoding keeps more than the window: only generated tokens see so far"
        elif seen == result["longest_distance"]:
            cause = "the window is ignored, or a layer has none"
        elif seen == asked + layers:
            cause = "each layer sees W + 1 tokens: W does not count the current one"
        return [f"Tokens up to {seen:,} back have an influence, and R is {asked:,}. Likely cause: {cause}."]
    clear = result["effect_at_seen"] / result["tolerance"]
    if clear < CLEAR or result["compared"] == "text":
        return []  # it may have faded
    cause = "each layer sees W - 1 tokens" if seen == asked - layers else "the window is smaller than asked"
    return [
        f"Influence ends at {seen:,} tokens back, where it is {clear:,.0f} times the tolerance, and R is {asked:,}. "
        f"Likely cause: {cause}."
    ]


def verdict(result: dict[str, Any]) -> str:
    """What was seen of the reach, and no more than that."""
    seen, asked, longest = result["seen"], result["reach"], result["longest_distance"]
    how = "generated text" if result["compared"] == "text" else f"tolerance {result['tolerance']:.1g} nats"
    if seen == longest:
        return f"Reach at least {seen:,} tokens, the longest distance tested ({how})."
    words = f"Reach at least {seen:,} tokens; no influence seen beyond, up to {longest:,} ({how})."
    if asked == seen:
        return f"{words} R = {asked:,} is met."
    if asked is None or reach_faults(result):
        return words
    return f"{words} R = {asked:,} is not contradicted: influence may fade before it."


def print_result(result: dict[str, Any], console: Console) -> None:
    unit = "1: other text" if result["compared"] == "text" else "nats"
    repeats = Table("prompt", "tokens in common", "difference", "share of another prompt's", title=f"Repeats, {unit}")
    for row in result["repeats"]:
        repeats.add_row(row["test"], f"{row['shared']:,}", f"{row['difference']:.2g}", f"{row['share']:.2%}")
    profile = Table("distance", "this token", "and all before", "while decoding", title=f"Effect of a change, {unit}")
    for row in result["profile"]:
        one, back = row["one_token"], row["and_before"]
        cells = one["prefill"], back["prefill"], max(one["decoding"], back["decoding"])
        profile.add_row(f"{row['distance']:,}", *(f"{n:.2g}" if n > result["tolerance"] else "–" for n in cells))
    console.print(repeats, profile)
    if result["models_listed"] and result["model"] not in result["models_listed"]:
        console.print(f"Note: {result['model']} is not in the server's list: {result['models_listed']}", markup=False)
    console.print(f"{verdict(result)} {result['requests']} requests.", markup=False)
    for fault in result["faults"]:
        console.print(f"FAULT: {fault}", markup=False)


def main() -> int:
    description = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m eval.conformance.served", description=description)
    add = parser.add_argument
    add("--endpoint", required=True, metavar="URL", help="an OpenAI-compatible server, such as http://127.0.0.1:8000")
    add("--model", required=True, metavar="NAME", help="the model's name at that server")
    add("--window", type=at_least(1), metavar="W", help="the window asked for, in tokens; counts the current token")
    add("--layers", type=at_least(1), metavar="K", help="how many layers have that window, if all have it")
    add("--reach", type=at_least(1), metavar="R", help="the reach asked for, in tokens, instead of W and K")
    add("--length", type=at_least(32), help="tokens of a prompt; default: 2 R + 64, and 2048 without R")
    add("--generate", type=at_least(1), default=4, help="tokens to generate and compare; default %(default)s")
    add("--texts", type=at_least(1), default=3, help="random prompts for each distance; default %(default)s")
    add("--compare", choices=("logprobs", "text"), default="logprobs", help="text: where there are no logprobs")
    add("--timeout", type=at_least(1), default=120, help="seconds to wait for an answer; default %(default)s")
    add("--max-requests", type=at_least(1), default=1000, help="stop after so many; default %(default)s")
    add("--seed", type=at_least(0), default=0, help="seed of the prompts; default %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the result to this file")
    args = parser.parse_args()
    if (args.window is None) != (args.layers is None) or (args.window and args.reach):
        parser.error("give --window and --layers together, or --reach alone")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    endpoint = Endpoint(args.endpoint, args.model, args.generate, args.compare, args.timeout, args.max_requests)
    with console.status(f"Asking {endpoint.url}"):
        result = examine_endpoint(endpoint, args.window, args.layers, args.reach, args.length, args.texts, args.seed)
    if args.json:
        args.json.write_text(json.dumps(finite(result), indent=1))
    print_result(result, console)
    return int(bool(result["faults"]))


if __name__ == "__main__":
    sys.exit(cli(main))
