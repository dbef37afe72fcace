"""The days of a log file -> their shards. Days are independent of each other."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipeline.appearing import partial_name, read_note
from data_pipeline.bags import Bags, IdsOfRows
from data_pipeline.dialects import Distinct, modulo
from data_pipeline.job import Job, PrepareConfig, identity
from data_pipeline.logs import read_log
from data_pipeline.manifest import RAGGED, measured_columns, shard_columns, shard_type
from data_pipeline.names import shown
from data_pipeline.schema import DataError, Schema
from data_pipeline.shard_files import HEADER_BYTES, new_columns, new_shard, save_array
from data_pipeline.whole_files import new_file

REJECTED = "rejected.tsv"
END = np.iinfo(np.int64).max  # the last line of a file, whichever that is

# Some consecutive rows: an array (n, columns) for each of KINDS, but bags where the schema has any;
# `row_weights` where it has a weight; `clipped` as in `Chunk`; and perhaps `dropped`, how many were before.
Rows = dict[str, Any]


class Source(NamedTuple):
    """A log file and the days in it, which are numbered from `first` on.

    found: the `identity` of the file, as it was found; it may not change from then on.
    stops: the number of each day's last line; where the schema has a `split`, the last line of the file, as
        its rows are of any of the three days.
    origins: what the manifest calls each day.
    """

    path: Path
    found: dict[str, Any]
    first: int
    stops: tuple[int, ...]
    origins: tuple[str, ...]

    def day_of(self, line: int) -> int:
        return self.first + int(np.searchsorted(self.stops, line))

    def first_line(self, day: int) -> int:
        before = (0, *self.stops)[day - self.first]
        return before + 1 if before < END else 1


def parse_days(job: Job, sources: list[Source], days: Sequence[int]) -> None:
    """Write the shards of those of these days that are not done."""
    for source in sources:
        mine = [day for day in days if source.first <= day < source.first + len(source.stops)]
        if needed := [day for day in mine if not _is_parsed(job, source, day)]:
            try:
                _parse_file(job, source, needed)
            finally:  # what is amiss with a line, or has no line, may come of a change too
                _require_unchanged(source)
        if mine:
            job.meter.add(source.found["bytes"])


def _is_parsed(job: Job, source: Source, day: int) -> bool:
    """Whether a day is done, and need not be done again because bad lines are an error now.

    Raises DataError if the file has changed since, and had rows enough to be of use.
    """
    record = read_note(job.work / f"day_{day}.done")
    if record is None or (record["rejected"] and job.config.bad_rows == "error"):
        return False
    if record["source"] != source.found:
        if record["rows"] < 2:  # too few for the last day; it may have got more
            return False
        raise DataError(
            f"{source.path}: has changed since day {day} was prepared from it; remove {job.work} to begin "
            "again"
        )
    schema, columns = job.config.schema, shard_columns(job.config.schema)
    if job.config.ids == "dictionary":
        del columns["sparse"]
    if measured_columns(schema, job.config.dense):
        del columns["dense"]
    ids = sum(record["ids"]) if schema.bags else record["rows"]
    rows = dict.fromkeys(columns, record["rows"]) | dict.fromkeys(RAGGED, ids)
    sizes = {
        job.shard(day, kind): HEADER_BYTES + shard_type(kind).itemsize * n * rows[kind]
        for kind, n in columns.items()
    }
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def _parse_file(job: Job, source: Source, needed: list[int]) -> None:
    """Write the shards of some days of a file: in turn, or side by side where the schema has a `split`."""
    rejected, in_turn = Counter[int](), job.config.schema.split is None
    with ExitStack() as stack:
        files: dict[int, BinaryIO] = {}
        ends: dict[int, ExitStack] = {}
        begun: dict[int, _Day] = {}

        def reject(line: int, reason: str, text: bytes) -> None:
            if (day := source.day_of(line)) in needed:
                if day not in files:
                    path = job.work / f"day_{day}_{REJECTED}"
                    ends[day] = stack.enter_context(ExitStack())
                    files[day] = ends[day].enter_context(new_file(path, partial_name(path)))
                rejected[day] += 1
                files[day].write(f"{shown(source.path)}\t{line}\t{shown(reason)}\t".encode() + text + b"\n")

        def finish() -> None:
            for day in sorted(begun):
                record = begun.pop(day).close()
                _require_unchanged(source)
                if day in ends:
                    ends[day].close()
                record |= {"source": source.found, "rejected": rejected[day]}
                job.note(f"day_{day}.done", record)

        parts = stack.enter_context(closing(_parts(job, source, source.first_line(needed[0]), reject)))
        for day, rows in parts:
            if in_turn and begun and day not in begun:
                finish()
            if in_turn and day > needed[-1]:
                break
            if day in needed:
                if day not in begun:
                    begun[day] = _Day(job, day, stack.enter_context(ExitStack()))
                begun[day].add(rows)
        finish()


def _require_unchanged(source: Source) -> None:
    """Raise DataError if the file is not what it was when it was found: who can say which rows were read?"""
    if identity(source.path) != source.found:
        raise DataError(
            f"{source.path}: has changed while it was read; give the same command again when it is whole"
        )


def _parts(
    job: Job, source: Source, first_line: int, reject: Callable[[int, str, bytes], None]
) -> Generator[tuple[int, Rows], None, None]:
    """Yield the log from a line on as (day, some of its rows), the ids as they are in the log."""
    config = job.config
    chunks = read_log(
        source.path,
        config.schema,
        bad_rows=config.bad_rows,
        on_reject=reject,
        dense=config.dense,
        first_line=first_line,
    )
    with closing(chunks):
        for chunk in chunks:
            job.meter.advance(chunk.position)
            assert chunk.label is not None
            line = chunk.line
            rows = {"labels": chunk.label[:, None], "dense": chunk.dense, "sparse": chunk.ids}
            rows |= {"clipped": chunk.clipped}
            rows |= {} if chunk.weight is None else {"row_weights": chunk.weight[:, None]}
            for day, index, part in _by_day(rows, chunk.split, line, source, config.schema):
                yield day, _thinned(part, line[index], day, config) if day in job.thinned else part


def _by_day(
    rows: Rows, split: np.ndarray | None, line: np.ndarray, source: Source, schema: Schema
) -> Iterator[tuple[int, np.ndarray | slice, Rows]]:
    """Some rows, whose lines are `line` (n,), as (day, which of the rows are of it, these).

    split: (n,) the day of each row, where it does not follow from the line.
    """
    if split is not None:
        for day in np.unique(split).tolist():
            own = np.flatnonzero(split == day)
            yield day, own, _taken(rows, own, schema)
        return
    ends = np.searchsorted(line, source.stops, side="right")
    for day, (start, stop) in enumerate(pairwise([0, *ends]), source.first):
        if start < stop:
            part = {kind: _part(array, start, stop, schema) for kind, array in rows.items()}
            yield day, slice(start, stop), part


def _part(array: IdsOfRows, start: int, stop: int, schema: Schema) -> IdsOfRows:
    """Rows `start` to `stop`."""
    return array.part(start, stop, len(schema.categorical)) if isinstance(array, Bags) else array[start:stop]


def _thinned(rows: Rows, line: np.ndarray, day: int, config: PrepareConfig) -> Rows:
    """Of these rows all clicks, and each other row with the probability `keep_negatives`; and how many rows
    were `dropped`.

    What is drawn for a row follows from the seed, its day and the number of its line (n,) alone.
    """
    first, last = int(line[0]), int(line[-1])
    stream = np.random.PCG64(np.random.SeedSequence(config.seed, spawn_key=(day,))).advance(first)
    words = stream.random_raw(last - first + 1)[line - first]
    drawn = (words >> np.uint64(11)) * 2.0**-53  # from 0 to below 1
    kept = np.flatnonzero((rows["labels"][:, 0] == 1) | (drawn < config.keep_negatives))
    return _taken(rows, kept, config.schema) | {"dropped": len(line) - len(kept)}


def _taken(rows: Rows, index: np.ndarray, schema: Schema) -> Rows:
    """The rows at `index` (n,)."""
    features = len(schema.categorical)
    return {
        kind: array.take(index, features) if isinstance(array, Bags) else array[index]
        for kind, array in rows.items()
    }


class _Day:
    """The shards of a day, as they are written.

    With a dictionary, columns of raw values are written instead of the sparse shard.
    """

    def __init__(self, job: Job, day: int, stack: ExitStack):
        """stack: is left when the day is done."""
        self.job, self.day, self.stack = job, day, stack
        schema, self.dictionary = job.config.schema, job.config.ids == "dictionary"
        self.distinct = Distinct(len(schema.categorical))
        self.rows, self.dropped, self.clipped = 0, 0, np.zeros(len(schema.dense), np.int64)
        self.counts = np.zeros(len(schema.categorical), np.int64)
        self.sha256: dict[str, str] = {}
        self.append = {
            kind: stack.enter_context(new_shard(job.parsed(day, kind), kind, self.sha256))
            for kind in shard_columns(schema)
            if kind != "sparse" or not self.dictionary
        }
        if self.dictionary:
            columns = [job.column(day, "raw", feature) for feature in job.features()]
            self.append["sparse"] = stack.enter_context(new_columns(columns))

    def add(self, arrays: Rows) -> None:
        """Write some rows behind the others."""
        self.dropped += arrays.pop("dropped", 0)
        self.clipped += np.count_nonzero(arrays.pop("clipped"), axis=0)
        modulus = None if self.dictionary else self.job.config.max_ind_range
        ids = arrays["sparse"] = modulo(arrays["sparse"], modulus)
        if isinstance(ids, Bags):
            shards = ids.shards(len(self.counts), int(self.counts.sum()))
            arrays |= shards | ({"sparse": ids} if self.dictionary else {})
            self.counts += ids.lengths(len(self.counts)).sum(axis=0)
        for kind, array in arrays.items():
            self.append[kind](array)
        if not self.dictionary:
            self.distinct.add(ids)
        self.rows += len(arrays["labels"])

    def close(self) -> dict:
        """The rows and hashes of the shards, which are whole now, and how many numbers were clipped.

        Of a day that is thinned, also how many rows were dropped, and where there are bags, how many `ids`
        each column has.
        """
        self.stack.close()
        if not self.dictionary:
            save_array(self.job.work / f"day_{self.day}_distinct.npy", self.distinct.to_array())
        record = {"rows": self.rows, "sha256": self.sha256, "clipped": self.clipped.tolist()}
        record |= {"dropped": self.dropped} if self.day in self.job.thinned else {}
        return record | {"ids": self.counts.tolist()} if self.job.config.schema.bags else record
