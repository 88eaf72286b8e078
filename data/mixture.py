"""Chooses the text of each row of a run: a pure function of (seed, step, row), for one source or a mixture of several.

A row is a training sequence of `data.seq_len` tokens. Rows are counted over the whole run. Every source gets its exact
share of the rows (see `Shares`). An epoch visits all rows of a source once, and each epoch has its own order.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from data.best_fit import PackedRows, best_fit
from data.folders import one_at_a_time, written_whole
from data.order import permuted
from data.settings import DataSettings, RunSettings
from data.tasks.draws import IntArray
from data.tasks.question import UNSCORED
from data.token_store import TokenStore, open_tokens, token_folders
from model.errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


class TextRow(NamedTuple):
    """All (T,). `labels` are what each position must predict, `documents` the number of its document in the row."""

    tokens: IntArray
    labels: IntArray
    documents: IntArray


class Rows(Protocol):
    """The rows of T tokens that a store is cut into. A row begins in the shard `shard_of`."""

    store: TokenStore

    def __len__(self) -> int: ...
    def read(self, row: int) -> TextRow: ...
    def shard_of(self, row: int) -> int: ...


class ConcatRows:
    """Documents one after another, cut every `seq_len` tokens."""

    def __init__(self, store: TokenStore, seq_len: int):
        self.store, self.seq_len = store, seq_len

    def __len__(self) -> int:
        return max(0, self.store.n_tokens - 1) // self.seq_len

    def read(self, row: int) -> TextRow:
        return labelled(self.store, row * self.seq_len, self.seq_len)

    def shard_of(self, row: int) -> int:
        return self.store.shard_at(row * self.seq_len)


def labelled(store: TokenStore, start: int, n: int) -> TextRow:
    """`n` tokens from `start` on. Each predicts the next token of its document, where the store says that it counts."""
    (tokens, documents), scored = store.read(start, n + 1), store.scored(start, n + 1)
    labels = np.where((documents[1:] == documents[:-1]) & scored[1:], tokens[1:], UNSCORED)
    return TextRow(tokens[:-1], labels, documents[:-1] - documents[0])


@dataclass(frozen=True)
class Shares:
    """How the rows of a run are shared out among sources with these weights.

    A period is a stretch of steps with the same weights. It consists of groups of steps, as short as gives each source
    at least one row. At the end of each group every source has its share of the rows of the period, rounded: to the
    nearest whole numbers with the right sum (largest remainders). Within a group the sources are shuffled.

    Rows are counted from step `first` on, where their length or their number in a step last changed.
    """

    weights: Sequence[float | Sequence[tuple[float, float]]]  # of each source, constant or [share of all steps, weight]
    rows_per_step: int
    max_steps: int
    seed: int
    first: int = 0

    def source_of(self, step: int, rows: range) -> tuple[IntArray, IntArray]:
        """(B,) the number of the source of each row of a step, and (B,) how many rows it had before this one."""
        if len(self.weights) == 1:
            numbers = (step - self.first) * self.rows_per_step + np.arange(rows.start, rows.stop)
            return np.zeros(len(rows), dtype=np.int64), numbers
        before = np.zeros(len(self.weights), dtype=np.int64)
        for first, last, weights in self._periods():
            if step < last or last == self.max_steps:
                break
            before += _rounded(weights, (last - first) * self.rows_per_step)
        group, start, end = _group(step - first, last - first, self._steps_per_group(weights))
        begun, ended = (_rounded(weights, n * self.rows_per_step) for n in (start, end))
        borders = np.cumsum(ended - begun)
        within = (step - first - start) * self.rows_per_step + np.arange(rows.start, rows.stop)
        place = permuted(within, int(borders[-1]), [self.seed, 1, first, group])
        source = np.searchsorted(borders, place, side="right")
        return source, before[source] + begun[source] + place - (borders - (ended - begun))[source]

    def _periods(self) -> list[tuple[int, int, list[float]]]:
        """First and last step (exclusive), and the share of each source."""
        points = [[(0.0, w)] if isinstance(w, (int, float)) else sorted(w) for w in self.weights]
        changes = {round(at * self.max_steps) for source in points for at, _ in source}
        starts = [self.first, *sorted(step for step in changes if self.first < step < self.max_steps)]
        periods = []
        for first, last in zip(starts, [*starts[1:], self.max_steps], strict=True):
            now = [[w for at, w in source if round(at * self.max_steps) <= first][-1:] or [0.0] for source in points]
            total = sum(w for (w,) in now)
            periods.append((first, last, [w / total for (w,) in now]))
        return periods

    def _steps_per_group(self, weights: list[float]) -> int:
        return max(1, *(int(np.ceil(1 / (w * self.rows_per_step))) for w in weights if w > 0))


def _group(step: int, steps: int, least: int) -> tuple[int, int, int]:
    """The group of a step in a period of `steps`, and its first and last step (exclusive); each has `least` at least.

    >>> [_group(step, steps=7, least=2) for step in range(7)]
    [(0, 0, 2), (0, 0, 2), (1, 2, 4), (1, 2, 4), (2, 4, 7), (2, 4, 7), (2, 4, 7)]
    """
    groups = max(1, steps // least)
    group = ((step + 1) * groups - 1) // steps
    return group, group * steps // groups, (group + 1) * steps // groups


def _rounded(shares: list[float], total: int) -> IntArray:
    """Whole numbers near `shares` x `total` whose sum is `total`."""
    exact = np.array(shares) * total
    whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")
    whole[largest[: total - int(whole.sum())]] += 1
    return whole


class BestFitRows:
    """Rows of whole documents, with padding at the end. Only documents longer than a row are cut.

    `prepare_best_fit` chose the documents of each row, and `folder` holds its choice.
    """

    def __init__(self, store: TokenStore, seq_len: int, folder: Path):
        self.store, self.seq_len, self.folder = store, seq_len, folder
        self.first_rows = np.load(folder / "first_rows.npy")  # (shards + 1,)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def read(self, row: int) -> TextRow:
        shard = self.shard_of(row)
        packed = self.packed(shard)
        pieces = slice(*packed.first_pieces[row - self.first_rows[shard] :][:2].tolist())
        base, starts, ends = int(self.store.first_tokens[shard]), packed.starts[pieces], packed.lengths[pieces].cumsum()
        padding = len(ends)  # padding is a document of its own, in which nothing is scored
        result = TextRow(*(np.full(self.seq_len, blank) for blank in (0, UNSCORED, padding)))
        for number, (start, first, last) in enumerate(zip(starts.tolist(), [0, *ends.tolist()], ends.tolist())):
            piece = labelled(self.store, base + start, last - first)
            result.tokens[first:last], result.labels[first:last] = piece.tokens, piece.labels
            result.documents[first:last] = number
        return result

    def shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def packed(self, shard: int) -> PackedRows:
        return _open_packed(self.folder, shard)


class HeldOutRows(BestFitRows):
    """The same in memory, for held-out conversations: an answer that is cut from its question says little."""

    def __init__(self, store: TokenStore, seq_len: int):
        self.store, self.seq_len = store, seq_len
        self.shards = [_best_fit(store, seq_len, shard) for shard in range(len(store.shards))]
        self.first_rows = np.cumsum([0, *(len(packed.first_pieces) - 1 for packed in self.shards)])

    def packed(self, shard: int) -> PackedRows:
        return self.shards[shard]


def _best_fit(store: TokenStore, seq_len: int, shard: int) -> PackedRows:
    """The rows of a shard."""
    end = np.diff(store.first_tokens)[shard]
    return best_fit(np.diff(store.shard(shard).starts, append=end), seq_len)


@lru_cache(maxsize=64)
def _open_packed(folder: Path, shard: int) -> PackedRows:
    return PackedRows(*(np.load(folder / f"{shard:05}-{name}.npy", mmap_mode="r") for name in PackedRows._fields))


def prepare_best_fit(store: TokenStore, seq_len: int, folder: Path) -> Path:
    """The folder in `folder` that says which documents are in which row. It is made now if it is missing."""
    rows_folder = folder / f"best_fit-{seq_len}"
    if not rows_folder.is_dir():
        with one_at_a_time(folder):
            if not rows_folder.is_dir():  # else another process wrote it while this one waited, and may be reading it
                _write_best_fit(store, seq_len, rows_folder)
    return rows_folder


def _write_best_fit(store: TokenStore, seq_len: int, folder: Path) -> None:
    with written_whole(folder) as aside:
        rows = [0]
        for number in range(len(store.shards)):
            packed = _best_fit(store, seq_len, number)
            for name, array in packed._asdict().items():
                np.save(aside / f"{number:05}-{name}.npy", array)
            rows.append(len(packed.first_pieces) - 1)
        np.save(aside / "first_rows.npy", np.cumsum(rows))


class Source(NamedTuple):
    """The text of a source, and the rows that its training text is cut into."""

    train: TokenStore
    heldout: TokenStore
    rows: Rows


def prepare_sources(settings: RunSettings, tokenizer: "Tokenizer", workers: int | None = None) -> dict[str, Path]:
    """The folder with the tokens of each source, by its name. What is missing is made now, by `workers` processes."""
    folders = token_folders(settings, tokenizer, workers)
    if settings.data.packing == "best_fit":
        for folder in folders.values():
            prepare_best_fit(open_tokens(folder, tokenizer)["train"], settings.data.seq_len, folder)
    return folders


def open_sources(folders: Mapping[str, Path], tokenizer: "Tokenizer", data: DataSettings) -> dict[str, Source]:
    """What `prepare_sources` has prepared. The text is not needed, so a process on any machine may call this.

    Raises UserError for a source that is shorter than a row.
    """
    sources = {}
    for name, folder in folders.items():
        train, heldout = open_tokens(folder, tokenizer).values()
        packed = folder / f"best_fit-{data.seq_len}"
        rows = (
            BestFitRows(train, data.seq_len, packed) if data.packing == "best_fit" else ConcatRows(train, data.seq_len)
        )
        if not len(rows):
            has = f"the training text{f' of {name}' if name else ''} has {train.n_tokens:,} tokens"
            raise UserError(f"data.seq_len is {data.seq_len:,} and {has}; lower it or give more text")
        sources[name] = Source(train, heldout, rows)
    return sources


class Mixture:
    """The rows of text of a run."""

    def __init__(self, rows: Mapping[str, Rows], shares: Shares):
        self.names, self.rows, self.shares = list(rows), list(rows.values()), shares
        self.seeds = [zlib.crc32(name.encode()) if name else 0 for name in self.names]

    def read(self, step: int, rows: range) -> tuple[list[TextRow], IntArray]:
        """The rows `rows` of a step, and (B,) the number of the source of each."""
        sources, numbers = self._find(step, rows)
        return [self.rows[source].read(row) for source, row in zip(sources, numbers.tolist())], sources

    def verify(self, step: int) -> None:
        """Compare the shards that a step begins to read with their hashes. Raises UserError if one is damaged."""
        sources, numbers = self._find(step, range(self.shares.rows_per_step))
        for source in np.unique(sources):
            rows = self.rows[source]
            rows.store.verify(map(rows.shard_of, numbers[sources == source].tolist()))

    def _find(self, step: int, rows: range) -> tuple[IntArray, IntArray]:
        """(B,) the number of the source of each row, and (B,) the number of the row in its source."""
        sources, numbers = self.shares.source_of(step, rows)
        for source in np.unique(sources):
            numbers[sources == source] = self._ordered(source, numbers[sources == source])
        return sources, numbers

    def _ordered(self, source: int, numbers: IntArray) -> IntArray:
        """Which row of the source comes at each of `numbers` of its rows in the run."""
        epochs, within = np.divmod(numbers, len(self.rows[source]))
        rows = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            of_epoch, key = epochs == epoch, [self.shares.seed, 0, self.seeds[source], int(epoch)]
            key += [self.shares.first] * (self.shares.first > 0)  # other rows, in another order
            rows[of_epoch] = permuted(within[of_epoch], len(self.rows[source]), key)
        return rows
