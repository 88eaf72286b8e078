"""Recall tasks: `filler ... <needle> VALUE filler ... <query>`, and the model must say VALUE after <query>.

Distance = (position whose logits are read, the query's last token) - (position of the value). With distance 1 the value
stands immediately before the query:

    distance 3:   f f f f <needle> VALUE f f <query>
                                   ^ value_position = 5   ^ query_position = 8

Markers and values overwrite filler, so items on one haystack share everything before the needle, and removing the
needle gives the haystack back. Between a needle and its query stands nothing but filler: another query there would
serve as a relay station, and the model would not learn to do without.

Tasks: `needle` hides it in real text, `needle-noise` in ordinary pieces drawn at random.
Legend: B rows, T tokens of a row, N questions of a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.draws import Draws
from data.packing import TokenStore
from data.recall_vocabulary import RecallVocabulary
from model.errors import UserError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

UNSCORED = -100
TASKS = ("needle", "needle-noise")
MAX_GAP = 16  # tokens between a query and the next needle, exclusive


@dataclass(frozen=True)
class RecallItem:
    """One question, its query at the very end."""

    tokens: tuple[int, ...]
    value_position: int
    query_position: int
    value: int
    counterfactual_value: int
    answer_ids: tuple[int, ...]

    @property
    def distance(self) -> int:
        return self.query_position - self.value_position

    @property
    def counterfactual_tokens(self) -> tuple[int, ...]:
        """The same context with the other value: one token differs."""
        return (*self.tokens[: self.value_position], self.counterfactual_value, *self.tokens[self.value_position + 1 :])


@dataclass(frozen=True)
class RowRules:
    """How training rows are laid out."""

    single_share: float = 0.5  # of rows: one needle, and its query at the end, as in evaluation
    short_share: float = 0.2  # of distances: drawn from [1, short_distance], which long ones would crowd out
    short_distance: int = 16  # tokens
    relay_share: float = 1 / 9  # of the filler between value and query: where the relay head is asked
    relay_pace: float | None = None  # tokens a layer: after layer l it is asked up to l x pace tokens on
    layers: int = 1  # of the model


DEFAULT_RULES = RowRules()


@dataclass(frozen=True)
class RecallRows:
    """Training rows; every array is (B, T). Labels are `UNSCORED` where nothing is asked."""

    tokens: IntArray
    answers: IntArray  # value token, at queries
    relays: IntArray  # index of the value, at some fillers between value and query; before all values their number
    relay_layers: IntArray  # number of the layer after which it is asked there, else 0
    distances: IntArray  # at queries, else 0


def max_row_distance(vocab: RecallVocabulary, length: int) -> int:
    """Longest distance, in tokens, that a row of `length` tokens can hold."""
    return length - 1 - len(vocab.needle)


def clean_filler(filler: IntArray, vocab: RecallVocabulary) -> IntArray:
    """(..., T) the filler, its needle, query and value tokens replaced by ordinary pieces, the same each time."""
    taken = np.isin(filler, vocab.reserved)
    if not taken.any():
        return filler
    other = vocab.plain[(filler * 2654435761 + np.arange(filler.shape[-1]) * 40503) % len(vocab.plain)]
    return np.where(taken, other, filler)


def filler_room(store: TokenStore, length: int) -> int:
    """Number of places in the store where a filler of `length` tokens may begin. Raises `UserError` when none."""
    room = len(store.tokens) - length + 1
    if room < 1:
        raise UserError(
            f"a recall row needs {length:,} tokens of text and the data has {len(store.tokens):,}; "
            "give more text (data.train_files, data.heldout_files), or lower recall.seq_len or the distances"
        )
    return room


def item(
    task: str,
    rng: np.random.Generator,
    filler: IntArray | TokenStore,
    vocab: RecallVocabulary,
    total_length: int,
    distance: int,
) -> RecallItem:
    """A question of `total_length` tokens, the same for all distances, with its query at the end.

    `filler` is the haystack, (>= total_length,) ids, or a store to draw one from.
    Raises `UserError` when the distance does not fit.
    """
    _check_distance(vocab, total_length, distance)
    if isinstance(filler, TokenStore):
        filler = _haystack(task, rng, filler, vocab, total_length)
    tokens = clean_filler(np.asarray(filler[:total_length], dtype=np.int64), vocab).copy()
    assert len(tokens) == total_length, "the haystack is shorter than the item"
    value, other = rng.choice(vocab.values, size=2, replace=False).tolist()
    query_at = np.array([total_length - 1])
    value_at = query_at - distance
    _write(tokens[None], vocab, np.array([0]), value_at, query_at, np.array([value]))
    return RecallItem(tuple(tokens.tolist()), int(value_at[0]), int(query_at[0]), value, other, (value,))


def training_rows(
    draws: Draws, filler: IntArray, vocab: RecallVocabulary, max_distance: int, rules: RowRules
) -> RecallRows:
    """Lay one or several questions, with distances up to `max_distance`, over each clean filler (B, T)."""
    distances, query_at, kept = _layout(draws, filler.shape[1], vocab, max_distance, rules)
    chosen = draws.integers("value", distances.shape[1], len(vocab.values))
    values = np.asarray(vocab.values, dtype=np.int64)[chosen]
    tokens, answers, asked = filler.copy(), np.full_like(filler, UNSCORED), np.zeros_like(filler)
    rows, _ = kept.nonzero()
    ends = query_at[kept]
    _write(tokens, vocab, rows, ends - distances[kept], ends, values[kept])
    answers[rows, ends], asked[rows, ends] = values[kept], distances[kept]
    inside, latest, age = _between(filler.shape, rows, ends - distances[kept], ends - len(vocab.query) + 1)
    before = latest < 0
    layer = _relay_layers(draws, np.where(before, 0, age), rules)
    relayed = (inside | before) & (draws.uniform("relay", filler.shape[1]) < rules.relay_share) & (layer > 0)
    known = np.where(before, len(vocab.values), np.take_along_axis(chosen, latest.clip(min=0), axis=1))
    relays = np.where(relayed, known, UNSCORED)
    return RecallRows(tokens, answers, relays, np.where(relayed, layer, 0), asked)


def _relay_layers(draws: Draws, age: IntArray, rules: RowRules) -> IntArray:
    """(B, T) the layer after which a filler `age` tokens behind its value is asked for it; 0 where none can know it.

    Without a pace the last one; with a pace any that has had the time, early ones more often: the front of the wave.
    """
    if rules.relay_pace is None:
        return np.full_like(age, rules.layers)
    first = np.ceil(age / rules.relay_pace).astype(np.int64).clip(min=1)
    later = (draws.uniform("relay layer", age.shape[1]) ** 2 * (rules.layers + 1 - first)).astype(np.int64)
    return np.where(first <= rules.layers, first + later, 0)


def _haystack(task: str, rng: np.random.Generator, store: TokenStore, vocab: RecallVocabulary, length: int) -> IntArray:
    if task == "needle-noise":
        return vocab.plain[rng.integers(len(vocab.plain), size=length)]
    start = int(rng.integers(filler_room(store, length)))
    return store.tokens[start : start + length].astype(np.int64)


def _check_distance(vocab: RecallVocabulary, length: int, distance: int) -> None:
    longest = max_row_distance(vocab, length)
    if not len(vocab.query) <= distance <= longest:
        raise UserError(
            f"distance {distance} does not fit {length} tokens: it must lie between {len(vocab.query)} and {longest}; "
            "use a longer row (recall.seq_len) or another distance"
        )


def _layout(
    draws: Draws, length: int, vocab: RecallVocabulary, max_distance: int, rules: RowRules
) -> tuple[IntArray, IntArray, BoolArray]:
    """Distances and query positions (B, N) of questions one after another, and which fit: the first always does.

    A share of the rows holds a single one, its query at the end.
    """
    n = 2 + 4 * length // (max_distance + 4)
    short = draws.uniform("short", n) < rules.short_share
    low, high = len(vocab.query), np.where(short, min(max_distance, rules.short_distance), max_distance)
    high = np.maximum(low, high)
    distances = low + (draws.uniform("distance", n) * (high - low + 1)).astype(np.int64)
    lengths = len(vocab.needle) + 1 + distances
    gaps = draws.integers("gap", n, MAX_GAP)
    gaps[:, 0] = np.minimum(gaps[:, 0], length - lengths[:, 0])
    single = draws.uniform("single", 1)[:, 0] < rules.single_share
    gaps[single, 0] = length - lengths[single, 0]
    query_at = np.cumsum(gaps + lengths, axis=1) - 1
    return distances, query_at, query_at < length


def _write(
    tokens: IntArray, vocab: RecallVocabulary, rows: IntArray, value_at: IntArray, query_at: IntArray, values: IntArray
) -> None:
    """Overwrite filler (B, T), in place, with markers, values, and queries ending at `query_at`; the rest is (n,)."""
    tokens[rows, value_at] = values
    for i, token in enumerate(reversed(vocab.needle), start=1):
        tokens[rows, value_at - i] = token
    for i, token in enumerate(reversed(vocab.query)):
        tokens[rows, query_at - i] = token


def _between(
    shape: tuple[int, ...], rows: IntArray, value_at: IntArray, query_start: IntArray
) -> tuple[BoolArray, IntArray, IntArray]:
    """(B, T) three times: is this filler between a value and its query, the number of the row's latest question there
    (-1 before the first), and how many tokens its value is back."""
    begun, ended = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    begun[rows, value_at] = 1
    ended[rows, query_start] = 1
    begun, started = np.cumsum(begun, axis=1), begun
    inside = (begun > np.cumsum(ended, axis=1)) & (started == 0)
    index = np.broadcast_to(np.arange(shape[1]), shape)
    age = index - np.maximum.accumulate(np.where(started > 0, index, 0), axis=1)
    return inside, begun - 1, age
