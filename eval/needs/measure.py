"""Measures how well the same tokens are predicted from fewer and from more tokens before them.

Random excerpts of the documents are scored once for each context c, in strided passes. Each token is predicted from the
c to c + stride - 1 tokens before it, or from all that precede it in its document if they are fewer. The stride is
c / 4, and at most one excerpt. So what context c gains over context b comes from tokens that are more than b and less
than c + stride tokens back.

Legend: N scored tokens, C contexts, U units of the bootstrap, S resamples.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.haystack import HeldOutDocument, IntArray
from eval.models import Examined
from model.errors import UserError

FloatArray = NDArray[np.float64]
ALPHA, BETA = 2.0, -2.0  # nats: LongPPL's bounds (arXiv 2410.23771) for the contrast and for the log-probability
RESAMPLES = 1000
LEAST_UNITS = 10  # fewer say too little about the units that were not drawn
EXCERPTS = 32  # of a text, at least, if it is long enough


class Excerpt(NamedTuple):
    """The scored tokens [first, end) of document number `document`, whose tokens are `tokens` (n,)."""

    document: int
    tokens: IntArray
    first: int
    end: int


def draw_excerpts(documents: Sequence[HeldOutDocument], length: int, budget: int, seed: Sequence[int]) -> list[Excerpt]:
    """Excerpts of `length` scored tokens in random order, until `budget` tokens are scored or no text is left.

    A document ends with a shorter excerpt. Its first token has no context and is never scored.
    """
    parts = [
        Excerpt(i, document.tokens, first, min(first + length, len(document.tokens)))
        for i, document in enumerate(documents)
        for first in range(1, len(document.tokens), length)
    ]
    order = np.random.default_rng(seed).permutation(len(parts))
    before = np.cumsum([0, *(parts[i].end - parts[i].first for i in order)])
    return [parts[i] for i, scored in zip(order, before[:-1], strict=True) if scored < budget]


def excerpt_length(contexts: Sequence[int], budget: int) -> int:
    """Scored tokens of an excerpt: a quarter of the longest context, but at least `EXCERPTS` excerpts in all."""
    return max(1, min(contexts[-1] // 4, budget // EXCERPTS))


class Window(NamedTuple):
    """The tokens [start, end) of the excerpt's document go into the model, and [scored, end) are scored."""

    excerpt: Excerpt
    start: int
    scored: int
    end: int

    @property
    def ids(self) -> IntArray:
        return self.excerpt.tokens[self.start : self.end]

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens that are read, and tokens that are scored."""
        return self.end - self.start, self.end - self.scored


def windows_of(excerpts: Sequence[Excerpt], context: int) -> list[Window]:
    """What the model reads to score the excerpts with a context of `context` tokens.

    >>> [window[1:] for window in windows_of([Excerpt(0, np.arange(40), 17, 25)], context=16)]
    [(1, 17, 21), (5, 21, 25)]
    """
    stride = max(1, context // 4)
    return [
        Window(excerpt, max(0, scored - context), scored, min(scored + stride, excerpt.end))
        for excerpt in excerpts
        for scored in range(excerpt.first, excerpt.end, stride)
    ]


def nats_with_context(
    examined: Examined, excerpts: Sequence[Excerpt], context: int, advance: Callable[[int], None]
) -> FloatArray:
    """(N,) -ln p of the scored tokens in the order of the excerpts; calls `advance` with the tokens just read."""
    import torch

    from eval.forward import batch_rows, token_nats

    windows = windows_of(excerpts, context)
    shapes = [window.shape for window in windows]
    nats: list[Any] = [None] * len(windows)
    for (size, scored), group in groupby(sorted(range(len(windows)), key=shapes.__getitem__), shapes.__getitem__):
        members, rows = list(group), batch_rows(examined, size)
        for batch in (members[i : i + rows] for i in range(0, len(members), rows)):
            ids = torch.from_numpy(np.stack([windows[i].ids for i in batch]))
            for i, row in zip(batch, token_nats(examined, ids, scored), strict=True):
                nats[i] = row
            advance(ids.numel())
    return np.concatenate(nats)


def bootstrap(values: FloatArray, units: IntArray, seed: Sequence[int]) -> FloatArray:
    """(1 + S, C) means of values (N, C): row 0 of all tokens, each other row of U units drawn with replacement.

    `units` (N,) names the unit of each token. Tokens of one unit depend on each other, so they are drawn together.
    """
    _, unit = np.unique(units, return_inverse=True)
    counts = np.bincount(unit)
    sums = np.stack([np.bincount(unit, column) for column in values.T], axis=1)
    draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
    weights = np.vstack([np.ones(len(counts), dtype=np.int64), draws])
    return np.asarray((weights @ sums) / (weights @ counts)[:, None])


def interval(statistic: FloatArray) -> list[float]:
    """[value, low, high] with the 95 % percentile interval, for a statistic (1 + S,) of the rows of `bootstrap`."""
    low, high = np.quantile(statistic[1:], [0.025, 0.975])
    return [float(f"{number:.5g}") for number in (statistic[0], low, high)]


def needs_more(nats: FloatArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N, C) each: does a token need more than each context, and the same with both contexts exchanged.

    A token needs more than c tokens if the longest context raises its log-probability by more than ALPHA over context
    c, and to more than BETA. Exchanged, the contrast counts tokens that the longest context spoils by as much: what
    the definition counts where context only shuffles the predictions.
    """
    longest = nats[:, -1:]
    return (nats - longest > ALPHA) & (-longest > BETA), (longest - nats > ALPHA) & (-nats > BETA)


def curves_of(nats: FloatArray, units: IntArray, seed: Sequence[int]) -> FloatArray:
    """(1 + S, 3, C) from nats (N, C): bits per token, and the two shares of tokens of `needs_more`."""
    figures = np.hstack([nats / np.log(2), *needs_more(nats)])
    return bootstrap(figures, units, seed).reshape(1 + RESAMPLES, 3, -1)


def summary(curves: FloatArray, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each context, from curves (1 + S, 3, C). Figures are [value, low, high].

    gain: bits gained over the context before. share: of the gain from the first context to the last one, None if that
    gain is not above 0 in its whole interval. need, by_chance: see `needs_more`.
    """
    bits, need, by_chance = curves.swapaxes(0, 1)
    gained = bits[:, :1] - bits
    some_gain = interval(gained[:, -1])[1] > 0
    return [
        {
            "context": context,
            "bits": interval(bits[:, i]),
            "gain": interval(bits[:, i - 1] - bits[:, i]) if i else None,
            "share": interval(gained[:, i] / gained[:, -1]) if some_gain else None,
            "need": interval(need[:, i]),
            "by_chance": interval(by_chance[:, i]),
        }
        for i, context in enumerate(contexts)
    ]


class Text(NamedTuple):
    """What was measured of one text: how much of it, `units` units of the kind `unit`, and curves (1 + S, 3, C)."""

    text: str
    documents: int
    tokens: int
    unit: str
    units: int
    curves: FloatArray

    def result(self, contexts: Sequence[int]) -> dict[str, Any]:
        facts = self._asdict()
        curves = facts.pop("curves")
        return facts | {"contexts": summary(curves, contexts)}


def units_of(name: str, excerpts: Sequence[Excerpt]) -> tuple[str, IntArray]:
    """What the bootstrap draws, and the unit of each token (N,): documents, or excerpts if the documents are few.

    Raises UserError if there are too few excerpts as well.
    """
    documents, numbers = [excerpt.document for excerpt in excerpts], list(range(len(excerpts)))
    unit, ids = ("documents", documents) if len(set(documents)) >= LEAST_UNITS else ("excerpts", numbers)
    if len(set(ids)) < LEAST_UNITS:
        raise UserError(
            f"TEXT {name!r} gives only {len(excerpts)} excerpts, and an interval needs at least {LEAST_UNITS}; "
            "give more text, or smaller --contexts"
        )
    return unit, np.repeat(ids, [excerpt.end - excerpt.first for excerpt in excerpts])


def score(
    examined: Examined, name: str, excerpts: Sequence[Excerpt], contexts: Sequence[int], seed: Sequence[int],
    advance: Callable[[int], None],
) -> Text:  # fmt: skip
    """The excerpts of one text with every context."""
    unit, units = units_of(name, excerpts)
    nats = np.stack([nats_with_context(examined, excerpts, context, advance) for context in contexts], axis=1)
    documents = len({excerpt.document for excerpt in excerpts})
    return Text(name, documents, len(nats), unit, len(np.unique(units)), curves_of(nats, units, seed))


def together(texts: Sequence[Text]) -> Text:
    """All texts as one. Their shares of the tokens are the same in every resample."""
    _, documents, tokens, units, counts, curves = zip(*texts, strict=True)
    unit = " and ".join(sorted(set(units)))
    mean = np.average(curves, axis=0, weights=tokens)
    return Text("all texts", sum(documents), sum(tokens), unit, sum(counts), mean)
