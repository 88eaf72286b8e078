"""What the commands `python -m eval.recall`, `relay`, `heat` and `loss` share: arguments, progress and reading results.

It imports neither torch nor matplotlib, so that `--help` and a mistake are answered at once.
"""

import json
import os
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from model.errors import UserError

SECONDS_BETWEEN_LINES = 30  # of progress, where the output is not a terminal


def new_parser(name: str, doc: str | None) -> ArgumentParser:
    """A parser with the arguments of every evaluation. The first paragraph of `doc` is its description."""
    parser = ArgumentParser(prog=f"python -m eval.{name}", description=(doc or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal language model")
    parser.add_argument("--out", metavar="DIR", help="folder for the results; default: the run folder, else this one")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws; default %(default)s")
    parser.add_argument("--text", type=existing_file, metavar="FILE", help="use this UTF-8 file as held-out text")
    parser.add_argument("--data", type=existing_file, metavar="CONFIG", help="use the held-out text of this YAML file")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    return parser


def existing_file(text: str) -> str:
    """An argparse type: the path of a file."""
    if not Path(text).is_file():
        raise ArgumentTypeError(f"{text!r}: no such file")
    return text


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not smaller than `lowest`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < lowest:
            raise ArgumentTypeError(f"{text!r}: give a whole number of at least {lowest}")
        return int(text)

    return number


def numbers(text: str) -> tuple[int, ...]:
    """An argparse type: comma-separated whole numbers of at least 1, which it sorts."""
    return tuple(sorted({at_least(1)(word.strip()) for word in text.split(",")}))


def names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated names that are known."""

    def listed(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
        if unknown := [word for word in words if word not in known]:
            raise ArgumentTypeError(f"unknown {', '.join(unknown)!r}; known: {', '.join(known)}")
        return words

    return listed


def prepare(args: Namespace, max_tokens: int | None = None) -> tuple[Examined, Path, Haystack]:
    """The model, the folder for results and the held-out text, of which at most `max_tokens` are read.

    Several processes that `accelerate launch` has started share each long row. Only the first one prints, and writes
    into the folder for results. Raises UserError for a model that can't share rows, and if its logits on the first
    tokens of the text are not finite: nothing can be measured then.
    """
    import torch

    from eval.forward import last_logits

    layout, processes = None, int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        from training.processes.context import Layout
        from training.processes.ranks import join_ranks

        layout = Layout.of(join_ranks(), processes)
    examined = load_model(args.model, args.device)
    if layout is not None:
        if not examined.ours:
            raise UserError(f"MODEL {args.model!r} runs in transformers, which can't share a row; start 1 process")
        examined.layout = layout
        if layout.index > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
            args.out = tempfile.mkdtemp()
    out, haystack = examined.out_dir(args.out), open_haystack(examined, args.text, args.data, max_tokens)
    if not bool(last_logits(examined, torch.from_numpy(haystack.documents[0].tokens[None, :64])).isfinite().all()):
        raise UserError(f"MODEL {args.model!r}: the logits are not finite; its weights are too large or damaged")
    return examined, out, haystack


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function of the steps just finished: it moves a bar or, off a terminal, prints a line every 30 s."""
    start = last_line = time.monotonic()
    done, terminal = 0, sys.stdout.isatty()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, disable=not terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(steps: int) -> None:
            nonlocal done, last_line
            done += steps
            bar.advance(task, steps)
            now = time.monotonic()
            if not terminal and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line, minutes = now, (now - start) * (total / done - 1) / 60
                print(f"{title}: {done / total:.0%} done, about {minutes:.1f} minutes left", flush=True)

        yield advance


def read_result(file: Path) -> dict[str, Any]:
    """The content of a result file, such as recall.json. Raises UserError if it is missing or damaged."""
    try:
        result = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such result; run the evaluation on that run first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not whole JSON ({error}); run the evaluation again") from error
    if not isinstance(result, dict):
        raise UserError(f"{file} is not a result; run the evaluation again")
    return result
