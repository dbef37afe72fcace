"""With transforms that are measured: what training rows tell of dense columns, and the dense shards by it.

A first pass over what was parsed of the rows that train counts in integers, so the order and the pieces of
the rows change nothing; its result goes into the manifest. A second pass, which the ranks share, writes the
shards day by day. What was read is removed once what was written is whole.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from data_pipeline import shard_files
from data_pipeline.appearing import read_note
from data_pipeline.dialects import distinct, scaler
from data_pipeline.job import Job
from data_pipeline.manifest import Pairs, Stretch, measured_columns
from data_pipeline.npy import NpyFile
from data_pipeline.shard_files import new_shard

DONE = "measured.done"
# zscore counts logarithms, which are at most 89, in steps of this: those from 1/128 on exactly. Squares are
# taken of halves of so many bits, so that the sums over a piece fit in 64 bits.
STEP, HALF = 2.0**-30, 19
# quantile counts float32 numbers by their upper bits: integers below 4096 apart from each other.
DROPPED = 12
# So many quantiles of a column are kept, with the number before each; all numbers if they are fewer.
KNOTS = 100


class _Normal:
    """Mean and standard deviation of a column."""

    def __init__(self):
        self.rows = self.sum = self.squares = 0

    def add(self, column: np.ndarray) -> None:
        steps = np.rint(column.astype(np.float64) / STEP).astype(np.int64)
        high, low = steps >> HALF, steps & ((1 << HALF) - 1)
        self.rows += steps.size
        self.sum += int(steps.sum())
        self.squares += (int(high @ high) << 2 * HALF) + (int(high @ low) << HALF + 1) + int(low @ low)

    def pairs(self) -> Pairs:
        variance = self.rows * self.squares - self.sum**2  # of all rows, times rows^2
        deviation = math.sqrt(variance / self.rows**2) * STEP
        return ((self.sum / self.rows * STEP, deviation or 1.0),)  # a column of one value becomes 0


class _Ranks:
    """The distribution of a column: numbers, and the values that rows with them get.

    A value is the share of rows that have less, and half of those that have as much, scaled such that many
    different numbers get the mean 0 and the variance 1.
    """

    def __init__(self):
        self.seen, self.counts = np.empty(0, np.uint32), np.empty(0, np.int64)

    def add(self, column: np.ndarray) -> None:
        bits = column.view(np.uint32)
        # Of the numbers that are counted as one with 0, or with -0, all are 0.
        bits = np.where(bits & np.uint32(0x7FFFFFFF) < 1 << DROPPED, np.uint32(0), bits)
        # In the order of the numbers.
        bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
        bits = np.sort(bits >> DROPPED)
        first = np.flatnonzero(np.diff(bits, prepend=~bits[:1]))
        known, new = self.seen, bits[first]
        self.seen = distinct(iter((known, new)))
        counts = np.zeros(self.seen.size, np.int64)
        counts[np.searchsorted(self.seen, known)] = self.counts
        counts[np.searchsorted(self.seen, new)] += np.diff(first, append=bits.size)
        self.counts = counts

    def pairs(self) -> Pairs:
        seen, counts, rows = self.seen, self.counts, int(self.counts.sum())
        twice = 2 * np.cumsum(counts) - counts  # the rows below, and half of those that are as large, times 2
        wanted = np.searchsorted(twice, 2 * rows * np.arange(1, KNOTS) // KNOTS)
        near = np.unique([0, *wanted.clip(max=seen.size - 1), seen.size - 1])
        # And the number before each, as a value leaps between a number of few rows and one of many.
        chosen = np.arange(seen.size) if seen.size <= KNOTS else np.unique([*near, *(near[1:] - 1)])
        bits = seen[chosen] << DROPPED
        # Of the numbers that are counted as one, that with the fewest digits.
        least = np.uint32((1 << DROPPED) - 1)
        numbers = np.where(bits >> 31, bits ^ np.uint32(0x80000000), ~(bits | least)).view(np.float32)
        values = math.sqrt(12) * (twice[chosen] / (2 * rows) - 0.5)
        return tuple(zip(numbers.tolist(), values.tolist(), strict=True))


MEASURES: dict[str, Callable[[], _Normal | _Ranks]] = {"zscore": _Normal, "quantile": _Ranks}


def measure(job: Job, train: tuple[Stretch, ...]) -> None:
    """Note what the rows that train tell of each column whose transform is measured."""
    config = job.config
    columns = measured_columns(config.schema, config.dense)
    measures = {name: MEASURES[transform]() for name, transform in columns.items()}
    if (job.work / DONE).exists():
        return
    for day, start, stop in train:
        for rows in _pieces(job, day, start, stop):
            for name, found in measures.items():
                found.add(rows[:, config.schema.dense.index(name)])
    job.note(DONE, {name: found.pairs() for name, found in measures.items()})


def measured(job: Job) -> dict[str, Pairs]:
    """What `measure` noted; nothing where no transform is measured."""
    return {name: tuple(map(tuple, pairs)) for name, pairs in (read_note(job.work / DONE) or {}).items()}


def scale_days(job: Job, day_rows: list[int]) -> None:
    """Write the dense shard of each day from what was parsed."""
    config = job.config
    scale = scaler(config.schema, config.dense, measured(job))
    for day in job.ranks.share(range(len(day_rows))):
        done = job.work / f"scaled_{day}.done"
        if not done.exists():
            sha256: dict[str, str] = {}
            with new_shard(job.shard(day, "dense"), "dense", sha256) as append:
                for rows in _pieces(job, day, 0, day_rows[day]):
                    append(scale(rows))
            job.note(done.name, sha256)
        job.parsed(day, "dense").unlink(missing_ok=True)


def _pieces(job: Job, day: int, start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows (n, dense columns) of a day as they were parsed."""
    remedy = f"remove {job.work} to begin again"
    parsed = NpyFile(job.parsed(day, "dense"), missing=f"missing; {remedy}", remedy=remedy)
    step = shard_files.PIECE // parsed.shape[1]
    for first in range(start, stop, step):
        yield parsed.part(first, min(first + step, stop))
