"""Bags: any number of ids in a cell, as ragged arrays, and the shards that hold them.

Where a schema has a bag, all F categorical columns are in this form, the others as bags of one id. The ids
lie one behind the other, row by row, and in a row column by column: bag (b, f) is
values[offsets[b * F + f] : offsets[b * F + f + 1]].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from data_pipeline.manifest import MORE_KINDS, Ids, Manifest, possible
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError

GATHERED = 1 << 12  # so many rows are gathered at a time
CHECKED_ROWS = 1 << 14  # the bags of so many rows are looked at at a time
LONGEST = np.iinfo(MORE_KINDS["lengths"]).max  # so many ids a bag may have
# The ids of rows: (n, F) uint32, or Bags. Who takes either tells them apart.
IdsOfRows: TypeAlias = Any


class Bags(NamedTuple):
    """The bags of n rows. Functions that take `features` cannot tell it from the arrays: it is F."""

    values: np.ndarray  # (N,) uint32
    offsets: np.ndarray  # (n * F + 1,) int64, from 0 to N
    weights: np.ndarray | None  # (N,) float32; None where the schema has none

    def part(self, start: int, stop: int, features: int) -> Self:
        """Rows `start` to `stop`; their ids are views."""
        offsets = self.offsets[start * features : stop * features + 1]
        ids = slice(int(offsets[0]), int(offsets[-1]))
        weights = None if self.weights is None else self.weights[ids]
        return type(self)(self.values[ids], offsets - offsets[0], weights)

    def take(self, order: np.ndarray, features: int) -> Self:
        """The rows with these numbers (m,), in this order."""
        before = self.offsets[:-1:features][order]
        offsets = ends(self.lengths(features)[order])
        after = offsets[::features]
        values = np.empty(offsets[-1], np.uint32)
        weights = None if self.weights is None else np.empty(offsets[-1], np.float32)
        # Some rows at a time, as their ids' numbers take more memory than these.
        for start in range(0, len(order), GATHERED):
            stop = min(start + GATHERED, len(order))
            moved = np.repeat(before[start:stop] - after[start:stop], np.diff(after[start : stop + 1]))
            there = slice(int(after[start]), int(after[stop]))
            ids = moved + np.arange(there.start, there.stop)
            # No index needs clipping; with mode="raise", NumPy would gather to memory of its own first.
            self.values.take(ids, out=values[there], mode="clip")
            if weights is not None:
                self.weights.take(ids, out=weights[there], mode="clip")
        return type(self)(values, offsets, weights)

    def spread(self, at: np.ndarray, rows: int, features: int) -> Self:
        """The same bags in rows `at` (n,), rising, of so many; the bags of the others are empty."""
        lengths = np.zeros((rows, features), np.int64)
        lengths[at] = self.lengths(features)
        return self._replace(offsets=ends(lengths))

    def lengths(self, features: int) -> np.ndarray:
        """How many ids each bag has, (n, F) int64."""
        return np.diff(self.offsets).reshape(-1, features)

    def columns(self, features: int) -> list[np.ndarray]:
        """The ids of each column, those of all its bags in one (N_f,)."""
        lengths = self.lengths(features)
        return np.split(self.values[_by_column(lengths)], np.cumsum(lengths.sum(axis=0))[:-1])

    def mapped(self, functions: Sequence[Callable[[np.ndarray], np.ndarray]]) -> Self:
        """The same bags, of what each column's function makes of its ids (N_f,)."""
        features = len(functions)
        columns = [one(ids) for one, ids in zip(functions, self.columns(features), strict=True)]
        return self._replace(values=laid_in(self.lengths(features), columns))

    def shards(self, features: int, before: int) -> dict[str, np.ndarray]:
        """What shards get of these rows (n, columns), behind so many ids of the same day."""
        found = {
            "sparse": self.values[:, None].view(np.int32),
            "lengths": self.lengths(features).astype(MORE_KINDS["lengths"]),
            "starts": self.offsets[:-1:features, None] + before,
        }
        return found if self.weights is None else found | {"weights": self.weights[:, None]}


class Column(NamedTuple):
    """The bags of one categorical column, of n rows."""

    values: np.ndarray  # (N_f,) uint32
    lengths: np.ndarray  # (n,) int64
    weights: np.ndarray | None = None  # (N_f,) float32; None for 1 each

    def keep(self, good: np.ndarray) -> Self:
        """The rows for which `good` (n,) is True."""
        ids = np.repeat(good, self.lengths)
        weights = None if self.weights is None else self.weights[ids]
        return type(self)(self.values[ids], self.lengths[good], weights)


def of_columns(columns: Sequence[Column], weighted: bool) -> Bags:
    """The bags of rows whose columns are these."""
    lengths = np.stack([column.lengths for column in columns], axis=1)
    weights = [
        np.ones(len(column.values), np.float32) if column.weights is None else column.weights
        for column in columns
    ]
    values = laid_in(lengths, [column.values for column in columns])
    return Bags(values, ends(lengths), laid_in(lengths, weights) if weighted else None)


def joined(parts: Sequence[IdsOfRows]) -> IdsOfRows:
    """The rows of all parts, one part behind the other."""
    if not isinstance(parts[0], Bags):
        return np.concatenate(parts)
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    values, weights = (
        None if parts[0][i] is None else np.concatenate([part[i] for part in parts]) for i in (0, 2)
    )
    return Bags(values, ends(lengths), weights)


def ends(lengths: np.ndarray) -> np.ndarray:
    """The offsets of bags of these lengths, of any shape."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _by_column(lengths: np.ndarray) -> np.ndarray:
    """Where the ids of bags (n, F) lie, (N,): first those of the first column, then those of the next."""
    column = np.tile(np.arange(lengths.shape[1], dtype=np.uint16), len(lengths))
    return np.argsort(np.repeat(column, lengths.ravel()), kind="stable")  # by radix, as there are 16 bits


def laid_in(lengths: np.ndarray, columns: Sequence[np.ndarray]) -> np.ndarray:
    """The numbers (N_f,) of each column, in the order of bags of these lengths (n, F)."""
    numbers = np.concatenate(columns)
    out = np.empty_like(numbers)
    out[_by_column(lengths)] = numbers
    return out


class BagShards:
    """The bags of a day, as its shards hold them: `sparse`, `lengths`, `starts` and perhaps `weights`.

    Raises DataError where one is missing, or two do not agree: here, or when rows are read.
    """

    def __init__(self, manifest: Manifest, day: int):
        self.features, self.ids = len(manifest.schema.categorical), manifest.ids
        self.names = manifest.schema.categorical
        self.weights: NpyFile | None = None
        self.open(manifest, day)

    def open(self, manifest: Manifest, day: int) -> None:
        """Open the files of a day."""
        self.sparse, self.lengths, self.starts = (
            manifest.open_shard(day, kind) for kind in ("sparse", "lengths", "starts")
        )
        self.weights = manifest.open_shard(day, "weights") if manifest.schema.weighted() else None
        if self.weights is not None and len(self.weights) != len(self.sparse):
            raise DataError(
                f"{self.weights.path}: holds {len(self.weights):,} weights of {len(self.sparse):,} ids; "
                "prepare the data again"
            )

    def read(self, start: int, stop: int) -> Bags:
        """Rows `start` to `stop`."""
        offsets = ends(self.lengths.part(start, stop))
        first, last = (self._start(row) for row in (start, stop))
        # A first row that begins late would give all rows the ids of others.
        inside = (first == 0 if start == 0 else first >= 0) and last <= len(self.sparse)
        if not inside or last - first != offsets[-1]:
            raise DataError(
                f"{self.starts.path}, rows {start} to {stop} (from 0): the ids of these bags are {first} to "
                f"{last} of {len(self.sparse):,}, but their lengths add up to {offsets[-1]}; prepare the "
                "data again"
            )
        values = np.empty(last - first, np.uint32)
        self.sparse.read(first, values)
        weights = None if self.weights is None else np.empty(last - first, np.float32)
        if self.weights is not None:
            self.weights.read(first, weights)
        return Bags(values, offsets, weights)

    def _start(self, row: int) -> int:
        """Where the ids of a row begin."""
        return int(self.starts.part(row, row + 1)[0, 0]) if row < len(self.starts) else len(self.sparse)

    def checked(self, start: int, stop: int) -> Iterator[int]:
        """Read the rows `start` to `stop`, some at a time, and yield how many they are.

        Raises DataError that names the first id or weight that cannot be.
        """
        for first in range(start, stop, CHECKED_ROWS):
            bags = self.read(first, last := min(first + CHECKED_ROWS, stop))
            good = _good_ids(bags, self.ids, self.features)
            self._require(good, bags.values, bags, first, "sparse", "below its column's cardinality")
            if bags.weights is not None:
                finite = possible(bags.weights, "weights")
                self._require(finite, bags.weights, bags, first, "weights", "finite")
            yield last - first

    def _require(self, good, numbers: np.ndarray, bags: Bags, first: int, kind: str, words: str) -> None:
        if not good.all():
            number = np.argmin(good)
            bag = np.searchsorted(bags.offsets, number, side="right") - 1
            row, column = divmod(int(bag), self.features)
            raise DataError(
                f"{getattr(self, kind).path}, row {first + row} (from 0), column {self.names[column]}: "
                f"{numbers[number]} is not {words}; prepare the data again"
            )


def _good_ids(bags: Bags, ids: Ids, features: int) -> np.ndarray:
    """Which ids (N,) are below the cardinality of their column."""
    if ids.dialect == "hash":
        return np.ones(bags.values.shape, bool)
    lengths = bags.lengths(features)
    return bags.values < np.repeat(np.tile(ids.cardinalities, len(lengths)), lengths.ravel())


def columns_of(ids: IdsOfRows, features: int) -> Iterable[np.ndarray]:
    """The ids of each column, of all rows."""
    return ids.columns(features) if isinstance(ids, Bags) else ids.T
