"""Recall tasks on a haystack: `filler ... <needle> VALUE filler ... <query>`, and the model must say VALUE.

Distance = (position whose logits are read, the query's last token) - (position of the value). With distance 1 the value
stands immediately before the query:

    distance 3:   f f f f <needle> VALUE f f <query>
                                   ^ value_position = 5   ^ query_position = 8

Needles and queries overwrite filler, so items on one haystack share everything before the needle, and removing the
needle gives the haystack back. Between a needle and its query stands nothing but filler: another query there would
serve as a relay station, and the model would not learn to do without. (The one exception is by definition: the other
pairs of `keys` stand where there is room.)

`data.tasks` says what is asked; training (`training_rows`) and evaluation (`item`) lay it out here, with one generator.
Legend: B rows, T tokens of a row, N questions of a row, L tokens of a needle, M of a query, P needles elsewhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.tasks import TASKS
from data.tasks.draws import Draws
from data.tasks.question import DEFAULT_OPTIONS, LEAVE, UNSCORED, Questions, Size, Task, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.errors import UserError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MAX_GAP = 16  # tokens between a query and the next needle, exclusive


@dataclass(frozen=True)
class RecallItem:
    """One question as a counterfactual pair: the same context with another deciding token asks for another answer."""

    tokens: tuple[int, ...]
    counterfactual_tokens: tuple[int, ...]  # one token differs, at `value_position`
    blind_tokens: tuple[int, ...]  # the needle is gone: there the haystack is back
    value_position: int
    query_position: int
    answer: int  # token that must follow the query
    counterfactual_answer: int

    @property
    def distance(self) -> int:
        return self.query_position - self.value_position

    @property
    def value(self) -> int:
        """The token that decides the answer."""
        return self.tokens[self.value_position]

    @property
    def counterfactual_value(self) -> int:
        return self.counterfactual_tokens[self.value_position]


@dataclass(frozen=True)
class RowRules:
    """How training rows are laid out."""

    single_share: float = 0.5  # of rows: one needle, and its query at the end, as in evaluation
    short_share: float = 0.2  # of distances: drawn from [1, short_distance], which long ones would crowd out
    short_distance: int = 16  # tokens
    long_share: float = 0.0  # of distances: D itself; only behind such a value stand fillers of every age up to D
    relay_share: float = 1 / 9  # of the filler between value and query: where the relay head is asked
    relay_pace: float | None = None  # tokens a layer: after layer l it is asked up to l x pace tokens on
    layers: int = 1  # of the model


DEFAULT_RULES = RowRules()


@dataclass(frozen=True)
class RecallRows:
    """Training rows; every array is (B, T). Labels are `UNSCORED` where nothing is asked."""

    tokens: IntArray
    answers: IntArray  # what must follow, at queries
    relays: IntArray  # number of the deciding token, at some fillers behind it; before all values their number
    relay_layers: IntArray  # number of the layer after which it is asked there, else 0
    distances: IntArray  # at queries, else 0


def task_size(task: str, vocab: RecallVocabulary, options: TaskOptions) -> Size:
    """What a question of the task needs, with the markers of this vocabulary."""
    return TASKS[task].size(options, len(vocab.needle), len(vocab.query))


def clean_filler(filler: IntArray, vocab: RecallVocabulary) -> IntArray:
    """(..., T) the filler, its reserved tokens replaced by ordinary pieces, the same each time."""
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


# ---------------------------------------------------------------------------------------------------- evaluation


class ItemDraws:
    """Draws for one row. Two that share what was drawn differ in the deciding number alone: a counterfactual pair."""

    def __init__(self, rng: np.random.Generator, drawn: dict[str, IntArray] | None = None, member: int = 0):
        self.rng, self.drawn, self.member = rng, {} if drawn is None else drawn, member

    def counterfactual(self) -> "ItemDraws":
        return ItemDraws(self.rng, self.drawn, member=1)

    def integers(self, name: str, n: int, high: int) -> IntArray:
        if name not in self.drawn:
            self.drawn[name] = self.rng.integers(high, size=(1, n))
        return self.drawn[name]

    def distinct(self, name: str, n: int, count: int, high: int) -> IntArray:
        if name not in self.drawn:
            self.drawn[name] = np.array([[self.rng.choice(high, size=count, replace=False) for _ in range(n)]])
        return self.drawn[name]

    def deciding(self, n: int, count: int, high: int) -> IntArray:
        """The first question's deciding number is the first of its numbers, or, for the counterfactual, one more."""
        if "deciding" not in self.drawn:
            self.drawn["deciding"] = self.rng.choice(high, size=count + 1, replace=False)
        first, *others, alternative = self.drawn["deciding"]
        asked = np.array([[[alternative if self.member else first, *others]]], dtype=np.int64)
        return np.concatenate((asked, self.distinct("older", n - 1, count, high)), axis=1) if n > 1 else asked

    def up_to(self, name: str, n: int, high: int) -> IntArray:
        return np.full((1, n), high)


def item(
    task: str,
    rng: np.random.Generator,
    filler: IntArray | TokenStore,
    vocab: RecallVocabulary,
    total_length: int,
    distance: int,
    options: TaskOptions = DEFAULT_OPTIONS,
    distractors: int = 0,
) -> RecallItem:
    """A question of `total_length` tokens, the same for all distances.

    Its query stands at the end, but that of a task whose needle opens the row, which stands `distance` behind it.
    `filler` is the haystack, (>= total_length,) ids, or a store to draw one from. `distractors` older needles of the
    task's own kind, with values of their own, stand before the needle, which supersedes them; the query is then always
    at the end. Raises `UserError` when the distance, or what the task needs besides, does not fit.
    """
    _check_fits(task, vocab, total_length, distance, options, distractors)
    if isinstance(filler, TokenStore):
        filler = _haystack(TASKS[task].noise, rng, filler, vocab, total_length)
    haystack = clean_filler(np.asarray(filler[:total_length], dtype=np.int64), vocab)
    assert len(haystack) == total_length, "the haystack is shorter than the item"
    draws = ItemDraws(rng)
    asked = TASKS[task].ask(draws, 1 + distractors, vocab, options)
    other = TASKS[task].ask(draws.counterfactual(), 1 + distractors, vocab, options)
    at_start = TASKS[task].at_start and not distractors
    end = int(asked.value_at[0, 0]) + distance if at_start else total_length - 1
    tokens = _laid_item(draws, haystack, asked, end, distance)
    start = end - distance - int(asked.value_at[0, 0])
    needle = slice(start, start + asked.needle.shape[-1])
    blind = tokens.copy()
    blind[needle] = haystack[needle]
    return RecallItem(
        tuple(tokens.tolist()), tuple(_laid_item(draws, haystack, other, end, distance).tolist()),
        tuple(blind.tolist()), end - distance, end, int(asked.answers[0, 0, -1]), int(other.answers[0, 0, -1]),
    )  # fmt: skip


def _laid_item(draws: ItemDraws, haystack: IntArray, q: Questions, end: int, distance: int) -> IntArray:
    """(T,) the first question on the haystack, its query ending at `end`; the needles of the others before it."""
    tokens, first = haystack[None].copy(), np.array([0])
    start = np.array([end - distance]) - q.value_at[:, 0]
    _write(tokens, first, start, q.needle[:, 0])
    _write(tokens, first, np.array([end - q.query.shape[-1] + 1]), q.query[:, 0])
    if q.needle.shape[1] > 1:
        _scatter(draws, tokens, q.needle[:, 1:], start, right=start)
    if q.elsewhere is not None:
        _scatter(draws, tokens, q.elsewhere, start, right=np.array([end - q.query.shape[-1] + 1]))
    return tokens[0]


def _check_fits(
    task: str, vocab: RecallVocabulary, length: int, distance: int, options: TaskOptions, distractors: int
) -> None:
    size = task_size(task, vocab, options)
    before = size.before + distractors * needle_tokens(task, vocab, options)
    if not size.nearest <= distance <= length - before:
        raise UserError(
            f"distance {distance} does not fit {length} tokens: it must lie between {size.nearest} and "
            f"{length - before}; use a longer row (recall.seq_len) or another distance"
        )
    if length < size.least:
        raise UserError(f"{task} needs rows of at least {size.least} tokens, not {length}; use a longer row, or less")


def needle_tokens(task: str, vocab: RecallVocabulary, options: TaskOptions) -> int:
    """Tokens of a needle of the task, L."""
    return TASKS[task].ask(Draws(0, 0, range(1)), 1, vocab, options).needle.shape[-1]


def _haystack(
    noise: bool, rng: np.random.Generator, store: TokenStore, vocab: RecallVocabulary, length: int
) -> IntArray:
    if noise:
        return vocab.plain[rng.integers(len(vocab.plain), size=length)]
    start = int(rng.integers(filler_room(store, length)))
    return store.tokens[start : start + length].astype(np.int64)


# ------------------------------------------------------------------------------------------------------ training


def training_rows(
    draws: Draws,
    filler: IntArray,
    vocab: RecallVocabulary,
    max_distance: int,
    rules: RowRules,
    task: str = "needle",
    options: TaskOptions = DEFAULT_OPTIONS,
) -> RecallRows:
    """Lay one or several questions, with distances up to `max_distance`, over each clean filler (B, T)."""
    kind, length = TASKS[task], filler.shape[1]
    n = 1 if kind.alone else 2 + 4 * length // (max_distance + 4)
    asked = kind.ask(draws, n, vocab, options)
    distances, query_at, kept = _layout(draws, length, asked, max_distance, rules, kind)
    rows, slots = kept.nonzero()
    ends, far = query_at[kept], distances[kept]
    queries = ends - asked.query.shape[-1] + 1
    tokens, answers, spans = filler.copy(), np.full_like(filler, UNSCORED), np.zeros_like(filler)
    _write(tokens, rows, ends - far - asked.value_at[kept], asked.needle[rows, slots])
    _write(tokens, rows, queries, asked.query[rows, slots])
    if asked.elsewhere is not None:
        start = ends - far - asked.value_at[:, 0]
        _scatter(draws, tokens, asked.elsewhere, start, right=queries)
    labels = asked.answers[rows, slots]
    _write(answers, rows, queries, labels, labels != UNSCORED)
    _write(spans, rows, queries, np.broadcast_to(far[:, None], labels.shape), labels != UNSCORED)
    begun = ends - asked.query_tokens[kept] + 1
    relays, layers = _relays(draws, tokens, vocab, rules, asked.carried, rows, ends - far, begun)
    return RecallRows(tokens, answers, relays, layers, spans)


def _layout(
    draws: Draws, length: int, asked: Questions, max_distance: int, rules: RowRules, kind: Task
) -> tuple[IntArray, IntArray, BoolArray]:
    """Distances and query positions (B, N) of questions one after another, and which fit: the first always does.

    A share of the rows holds a single one, as in evaluation: its query at the end, or its needle at the start.
    """
    low = asked.nearest
    n = low.shape[1]
    kind_of = draws.uniform("short", n)
    short, long = kind_of < rules.short_share, kind_of >= 1 - rules.long_share
    high = np.maximum(low, np.where(short, min(max_distance, rules.short_distance), max_distance))
    distances = low + (draws.uniform("distance", n) * (high - low + 1)).astype(np.int64)
    distances = np.where(long, high, distances)
    lengths = asked.value_at + 1 + distances
    gaps = draws.integers("gap", n, MAX_GAP)
    gaps[:, 0] = np.minimum(gaps[:, 0], length - lengths[:, 0])
    single = draws.uniform("single", 1)[:, 0] < (1.0 if kind.alone else rules.single_share)
    gaps[single, 0] = 0 if kind.at_start else length - lengths[single, 0]
    query_at = np.cumsum(gaps + lengths, axis=1) - 1
    kept = query_at < length
    kept[single, 1:] = False
    return distances, query_at, kept


def _relays(
    draws: Draws,
    tokens: IntArray,
    vocab: RecallVocabulary,
    rules: RowRules,
    carried: IntArray,
    rows: IntArray,
    value_at: IntArray,
    query_start: IntArray,
) -> tuple[IntArray, IntArray]:
    """(B, T) twice: what fillers are asked to carry, and after which layer.

    Where a needle holds several values, a filler can't know which will be asked: the best answer is then an even split.
    """
    inside, latest, age = _between(tokens.shape, rows, value_at, query_start)
    none_yet = (latest < 0) & (np.cumsum(np.isin(tokens, vocab.values), axis=1) == 0)
    layer = _relay_layers(draws, np.where(none_yet, 0, age), rules)
    asked = (inside | none_yet) & (draws.uniform("relay", tokens.shape[1]) < rules.relay_share) & (layer > 0)
    if vocab.keys:
        asked &= ~np.isin(tokens, (*vocab.values, *vocab.keys))
    known = np.where(none_yet, len(vocab.values), np.take_along_axis(carried, latest.clip(min=0), axis=1))
    return np.where(asked, known, UNSCORED), np.where(asked, layer, 0)


def _relay_layers(draws: Draws, age: IntArray, rules: RowRules) -> IntArray:
    """(B, T) the layer after which a filler `age` tokens behind its value is asked for it; 0 where none can know it.

    Without a pace the last one; with a pace any that has had the time, early ones more often: the front of the wave.
    """
    if rules.relay_pace is None:
        return np.full_like(age, rules.layers)
    first = np.ceil(age / rules.relay_pace).astype(np.int64).clip(min=1)
    later = (draws.uniform("relay layer", age.shape[1]) ** 2 * (rules.layers + 1 - first)).astype(np.int64)
    return np.where(first <= rules.layers, first + later, 0)


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


# ------------------------------------------------------------------------------------------------ writing pieces


def _write(
    tokens: IntArray, rows: IntArray, starts: IntArray, pieces: IntArray, where: BoolArray | None = None
) -> None:
    """Overwrite tokens (B, T), in place: piece i (n, L) from `starts[i]` on in row `rows[i]`, but for its `LEAVE`."""
    where = pieces != LEAVE if where is None else where
    at = starts[:, None] + np.arange(pieces.shape[1])
    tokens[np.broadcast_to(rows[:, None], at.shape)[where], at[where]] = pieces[where]


def _scatter(draws: Draws | ItemDraws, tokens: IntArray, needles: IntArray, start: IntArray, right: IntArray) -> None:
    """Put needles (B, P, L) at random before `start` (B,) and from start + L on to `right` (B,), in place.

    They never overlap: the places are a grid of cells of L tokens that the needle at `start` belongs to.
    """
    n, size = needles.shape[1:]
    cell = np.arange(tokens.shape[1] // size)
    left = start[:, None] // size
    places = np.where(cell < left, start[:, None] - size * (cell + 1), start[:, None] + size * (cell - left + 1))
    free = (cell < left) | (places + size <= right[:, None])
    order = np.argsort(np.where(free, _scores(draws, len(cell)), 2.0), axis=1, kind="stable")[:, :n]
    fits = np.take_along_axis(free, order, axis=1)
    row, which = fits.nonzero()
    _write(tokens, row, np.take_along_axis(places, order, axis=1)[fits], needles[row, which])


def _scores(draws: Draws | ItemDraws, n: int) -> NDArray[np.float64]:
    """(B, n) on [0, 1): the order in which cells are taken."""
    return draws.integers("cell", n, 1 << 30) / (1 << 30)
