"""Recall questions on a haystack: `filler ... <needle> VALUE filler ... <query>`, and the model must answer VALUE.

Distance = (position of the query's last token, whose logits are read) - (position of the value):

    distance 3:   f f f f <needle> VALUE f f <query>
                                   ^ value_position = 5   ^ query_position = 8

Needles and queries overwrite filler, so items on one haystack share everything before the needle. Between a needle and
its query stands filler alone. Another query there would act as a relay station, and the model would not learn to do
without. The one exception is `keys`, whose other pairs stand wherever there is room.

`data.tasks.all_tasks` draws what is asked. Training (`training_rows`) and evaluation (`item`) write it into rows here.
Legend: that of `data.tasks.question`, and T tokens in a row; K questions that fit, over all rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.settings import RowRules
from data.tasks.all_tasks import TASKS
from data.tasks.draws import Draws, IntArray, ItemDraws, TaskDraws
from data.tasks.question import DEFAULT_OPTIONS, LEAVE, UNSCORED, Questions, Size, Task, TaskOptions
from data.tasks.vocabulary import RecallVocabulary
from data.token_store import TokenStore
from model.errors import UserError

MAX_GAP = 16  # a query and the next needle are fewer tokens apart
DEFAULT_RULES = RowRules()


@dataclass(frozen=True)
class RecallItem:
    """One question of evaluation as a counterfactual pair: with another deciding token, another answer is right."""

    tokens: tuple[int, ...]
    counterfactual_tokens: tuple[int, ...]  # one token differs, at `value_position`
    blind_tokens: tuple[int, ...]  # without the needle: the haystack shows in its place
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


@dataclass(frozen=True)
class RecallRows:
    """Training rows; every array is (B, T). Labels are `UNSCORED` where nothing is asked."""

    tokens: IntArray
    answers: IntArray  # the token that must follow, at queries
    relays: IntArray  # number of the value that a filler should carry; before any value: the number of values
    relay_layers: IntArray  # number of the layer after which the relay head reads there, else 0
    distances: IntArray  # at queries, else 0


def task_size(task: str, vocab: RecallVocabulary, options: TaskOptions) -> Size:
    """Tokens that a question of the task needs, with the markers of this vocabulary."""
    return TASKS[task].size(options, len(vocab.needle), len(vocab.query))


def needle_tokens(task: str, vocab: RecallVocabulary, options: TaskOptions) -> int:
    """Tokens of a needle of the task, L."""
    return TASKS[task].ask(Draws(0, 0, range(1)), 1, vocab, options).needle.shape[-1]


def clean_filler(filler: IntArray, vocab: RecallVocabulary) -> IntArray:
    """(..., T) the filler with ordinary tokens in place of reserved ones, always the same."""
    reserved = np.isin(filler, vocab.reserved)
    if not reserved.any():
        return filler
    other = vocab.plain[(filler * 2654435761 + np.arange(filler.shape[-1]) * 40503) % len(vocab.plain)]
    return np.where(reserved, other, filler)


def filler_room(store: TokenStore, length: int) -> int:
    """Number of positions in the store at which `length` tokens may begin. Raises `UserError` when there are none."""
    if store.n_tokens < length:
        raise UserError(
            f"a recall row needs {length:,} tokens of text and the data has {store.n_tokens:,}; "
            "give more text (data.train_files, data.heldout_files), or lower recall.seq_len or the distances"
        )
    return store.n_tokens - length + 1


def item(
    task: str, rng: np.random.Generator, filler: IntArray | TokenStore, vocab: RecallVocabulary, total_length: int,
    distance: int, options: TaskOptions = DEFAULT_OPTIONS, distractors: int = 0,
) -> RecallItem:  # fmt: skip
    """A question in `total_length` tokens, the same number for all distances.

    The query stands at the end. If the task's needle opens the row, the query stands `distance` tokens after its value.
    `filler` is the haystack, at least `total_length` token ids, or a store to draw one from.
    `distractors` older needles of the same task stand before the needle, which supersedes them; the query then always
    stands at the end. Their values are drawn independently, so one may equal the answer by chance.
    Raises `UserError` when the question does not fit.
    """
    size = task_size(task, vocab, options)
    needed = size.row(distance) + distractors * needle_tokens(task, vocab, options)
    if distance < size.nearest or total_length < needed:
        raise UserError(
            f"distance {distance} does not fit {total_length} tokens: {task} needs {needed} tokens for it, and a "
            f"distance of at least {size.nearest}; use a longer row (recall.seq_len) or another distance"
        )
    if isinstance(filler, TokenStore) and TASKS[task].noise:
        filler = vocab.plain[rng.integers(len(vocab.plain), size=total_length)]
    elif isinstance(filler, TokenStore):
        filler, _ = filler.read(int(rng.integers(filler_room(filler, total_length))), total_length)
    haystack = clean_filler(np.asarray(filler[:total_length], dtype=np.int64), vocab)
    assert len(haystack) == total_length, "the haystack is shorter than the item"
    draws = ItemDraws(rng)
    asked, other = (TASKS[task].ask(d, 1 + distractors, vocab, options) for d in (draws, draws.counterfactual()))
    value_at = int(asked.value_at[0, 0])
    value = value_at if TASKS[task].at_start and not distractors else total_length - 1 - distance
    end = value + distance
    start, query = np.array([value - value_at]), np.array([end - asked.query.shape[-1] + 1])
    tokens, row = haystack[None].copy(), np.array([0])
    _write(tokens, row, start, asked.needle[:, 0])
    _write(tokens, row, query, asked.query[:, 0])
    if distractors:
        _scatter(draws, tokens, asked.needle[:, 1:], start, right=start)
    if asked.elsewhere is not None:
        _scatter(draws, tokens, asked.elsewhere, start, right=query)
    counterfactual, blind = tokens[0].copy(), tokens[0].copy()
    counterfactual[value] = other.needle[0, 0, value_at]
    needle = slice(start[0], start[0] + asked.needle.shape[-1])
    blind[needle] = haystack[needle]
    return RecallItem(
        tuple(tokens[0].tolist()), tuple(counterfactual.tolist()), tuple(blind.tolist()),
        value, end, int(asked.answers[0, 0, -1]), int(other.answers[0, 0, -1]),
    )  # fmt: skip


def training_rows(
    draws: Draws, filler: IntArray, vocab: RecallVocabulary, max_distance: int, rules: RowRules, task: str = "needle",
    options: TaskOptions = DEFAULT_OPTIONS,
) -> RecallRows:  # fmt: skip
    """Write one or several questions, with distances up to `max_distance`, over each row of clean filler (B, T)."""
    length = filler.shape[1]
    n = 1 if TASKS[task].alone else 2 + 4 * length // (max_distance + 4)
    asked = TASKS[task].ask(draws, n, vocab, options)
    distances, ends, kept = _layout(draws, length, asked, max_distance, rules, TASKS[task])
    row, end, distance = kept.nonzero()[0], ends[kept], distances[kept]  # (K,)
    value, start = end - distance, end - distance - asked.value_at[kept]
    query = end - asked.query.shape[-1] + 1
    tokens, answers, spans = filler.copy(), np.full_like(filler, UNSCORED), np.zeros_like(filler)
    _write(tokens, row, start, asked.needle[kept])
    _write(tokens, row, query, asked.query[kept])
    if asked.elsewhere is not None:
        _scatter(draws, tokens, asked.elsewhere, start, right=query)
    labels, edges = asked.answers[kept], np.zeros_like(filler)
    _write(answers, row, query, np.where(labels == UNSCORED, LEAVE, labels))
    _write(spans, row, query, np.where(labels == UNSCORED, LEAVE, distance[:, None]))
    edges[row, value], edges[row, end - asked.query_tokens[kept] + 1] = 1, -1
    relays, layers = _relays(draws, tokens, vocab, rules, asked.carried, edges)
    return RecallRows(tokens, answers, relays, layers, spans)


def _layout(
    draws: Draws, length: int, asked: Questions, max_distance: int, rules: RowRules, task: Task
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """(B, N) three times: distance and query end of questions one after another, and which fit; the first always does.

    A share of the rows holds a single question, as in evaluation: its query at the end, or its needle at the start.
    """
    low = asked.needle.shape[-1] - 1 - asked.value_at + asked.query_tokens  # the nearest distance of each question
    n = low.shape[1]
    choice = draws.uniform("short", n)
    high = np.where(choice < rules.short_share, min(max_distance, rules.short_distance), max_distance)
    high = np.maximum(low, high)
    distances = low + (draws.uniform("distance", n) * (high - low + 1)).astype(np.int64)
    distances = np.where(choice >= 1 - rules.long_share, high, distances)
    lengths = asked.value_at + 1 + distances
    gaps = draws.integers("gap", n, MAX_GAP)
    gaps[:, 0] = np.minimum(gaps[:, 0], length - lengths[:, 0])
    single = draws.uniform("single", 1)[:, 0] < (1.0 if task.alone else rules.single_share)
    gaps[single, 0] = 0 if task.at_start else length - lengths[single, 0]
    ends = np.cumsum(gaps + lengths, axis=1) - 1
    kept = ends < length
    kept[single, 1:] = False
    return distances, ends, kept


def _relays(
    draws: Draws, tokens: IntArray, vocab: RecallVocabulary, rules: RowRules, carried: IntArray, edges: IntArray
) -> tuple[IntArray, IntArray]:
    """(B, T) twice: the number that the relay head should read at fillers, and after which layer it reads.

    `edges` (B, T) is 1 at values and -1 where their queries start. Without a pace the head reads after the last layer.
    With a pace the layer is drawn among those that the value can have reached, early ones more often than late ones.
    Where a needle holds several values, a filler can't know which will be asked. The best answer is then an even split.
    """
    value_here, index = edges == 1, np.arange(tokens.shape[1])
    latest = np.cumsum(value_here, axis=1) - 1  # the question whose value was passed last, -1 before the first
    no_value_yet = (latest < 0) & (np.cumsum(np.isin(tokens, vocab.values), axis=1) == 0)
    layer = np.full_like(tokens, rules.layers)
    if rules.relay_pace is not None:
        age = index - np.maximum.accumulate(np.where(value_here, index, 0), axis=1)  # tokens since that value
        first = np.ceil(np.where(no_value_yet, 0, age) / rules.relay_pace).astype(np.int64).clip(min=1)
        later = (draws.uniform("relay layer", len(index)) ** 2 * (rules.layers + 1 - first)).astype(np.int64)
        layer = np.where(first <= rules.layers, first + later, 0)
    drawn = draws.uniform("relay", len(index)) < rules.relay_share
    asked = ((np.cumsum(edges, axis=1) > 0) & ~value_here | no_value_yet) & drawn & (layer > 0)
    if vocab.keys:
        asked &= ~np.isin(tokens, (*vocab.values, *vocab.keys))
    known = np.where(no_value_yet, len(vocab.values), np.take_along_axis(carried, latest.clip(min=0), axis=1))
    return np.where(asked, known, UNSCORED), np.where(asked, layer, 0)


def _write(tokens: IntArray, row: IntArray, start: IntArray, patches: IntArray) -> None:
    """Overwrite `tokens` (B, T) in place, except with `LEAVE`: patch i (K, n) goes from `start[i]` on into `row[i]`."""
    which, offset = (patches != LEAVE).nonzero()
    tokens[row[which], start[which] + offset] = patches[which, offset]


def _scatter(draws: TaskDraws, tokens: IntArray, needles: IntArray, start: IntArray, right: IntArray) -> None:
    """Put needles (B, P, L) at random before `start` (B,) and from start + L on to `right` (B,), in place.

    They never overlap: they stand in cells of L tokens, on a grid aligned to `start`.
    """
    n, size = needles.shape[1:]
    cell = np.arange(tokens.shape[1] // size)
    left = start[:, None] // size
    position = np.where(cell < left, start[:, None] - size * (cell + 1), start[:, None] + size * (cell - left + 1))
    free = (cell < left) | (position + size <= right[:, None])
    score = draws.integers("cell", len(cell), 1 << 30) / (1 << 30)  # the order in which cells are filled
    order = np.argsort(np.where(free, score, 2.0), axis=1, kind="stable")[:, :n]
    row, which = np.take_along_axis(free, order, axis=1).nonzero()
    _write(tokens, row, np.take_along_axis(position, order, axis=1)[row, which], needles[row, which])
