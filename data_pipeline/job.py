"""What all steps of a preparation share: the settings, where files lie, and how far the work is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipeline.chunk import BadRows
from data_pipeline.dialects import Dialect, Order
from data_pipeline.input_files import InputOrder
from data_pipeline.manifest import measured_columns, shard_name
from data_pipeline.partitions import files_of, size_of
from data_pipeline.ranks import Ranks
from data_pipeline.schema import CRITEO, Dense, Schema
from data_pipeline.stores import Stored
from data_pipeline.whole_files import sync, write_json

# Called with how many bytes of the logs, as they lie on disk, have been read, and how many will be in all,
# None where a store does not tell; making a dictionary counts as reading them once more.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[Path, ...]
    """Raw logs or tables (Parquet, Arrow, CSV, JSON lines), text also packed with gzip, bzip2, xz, Zstandard
    or zip: one file per day, oldest first; or one folder, whose day_0, day_1, ... are taken in that order, or
    its Parquet files, or its partitions such as date=2024-01-01; or one file, to be cut up. They may lie in a
    store: s3://, gs://, az:// or hf://, with the credentials of the environment."""
    out: Path
    """Folder to write; it must not exist yet, or be empty. Until it is done, what there is lies in
    .OUT.partial beside it, and the same command goes on from there."""
    ids: Dialect = "hash"
    """hash keeps the 32 bits of the log, for hashed embeddings; modulo takes them modulo --max-ind-range.
    dictionary numbers the values of each feature that training saw, from 1 on, for tables; others are 0."""
    max_ind_range: int | None = None
    """Take ids modulo this number. With a dictionary, values are taken modulo it before they are numbered, as
    MLPerf v1 does with 40000000."""
    min_count: int = 1
    """Leave values that training saw less often out of the dictionary; they share id 0 with those it never
    saw."""
    order: Order = "first"
    """The dictionary numbers values in order of first appearance, or by falling count, ties by value."""
    dense: Dense = "log1p"
    """log1p writes log(max(x, 0) + 1) of the dense values, none the values themselves; missing ones are 0.
    zscore takes the mean from these logarithms, and divides by their standard deviation; quantile writes the
    share of rows with smaller values. Both are measured on the rows that train. A schema may name another
    transform for a column."""
    bad_rows: BadRows = "error"
    """error stops at the first malformed line; skip leaves such lines out and lists them in rejected.tsv."""
    input_order: InputOrder = "names"
    """names sorts files whose names differ only in numbers by these, day_2 before day_10, and refuses other
    orders that the names contradict; given takes the files as they are listed."""
    blocks: int = 7
    """Number of days of equal length to cut a single file into; DLRM cuts Criteo Kaggle into 7."""
    days: str | None = None
    """Only parse these days, like 0-3,7, so that other processes can parse others at the same time. When all
    are done, the same command without --days finishes the folder."""
    schema: Schema = CRITEO
    """The columns; default: those of Criteo's logs. `schema FILE` proposes a file to give here."""
    append: Path | None = None
    """A prepared folder whose days come before these, each file then being one day more. Its shards are
    linked, not copied, where both folders are on one file system, and it stays as it is. Columns, transforms
    and the meaning of ids are its own; a dictionary keeps its numbers and grows by the values of the new days
    (all of them, those that test now too)."""
    split: str | None = None
    """Which rows test and validate; None is mlperf, if no `split` of the schema names a column that says it.
    mlperf: the first half of the last day, and the second. torchrec: the other way round. kaggle: as mlperf,
    of 7 equal days. 0.8,0.1,0.1: shares of all rows in the order of the log, to train, validate and test.
    test=5,validation=6: these days, from 0 (or ranges, 20-22)."""
    keep_negatives: float = 1.0
    """Of the days that train, keep each row without a click with this probability, for shorter trainings.
    Models know of it, and their probabilities are those of whole days."""
    seed: int = 0
    """Seed of which of these rows are kept."""


class Job(NamedTuple):
    """A preparation under way. Its files lie in the folder `work`; `work`/data becomes the new folder.

    thinned: the days of which only some rows without a click are kept.
    """

    config: PrepareConfig
    work: Path
    ranks: Ranks
    meter: "Meter"
    thinned: tuple[int, ...] = ()

    def shard(self, day: int, kind: str) -> Path:
        return self.work / "data" / shard_name(day, kind)

    def parsed(self, day: int, kind: str) -> Path:
        """Where a shard is written as it is parsed: apart, if its values are to be measured and scaled."""
        apart = kind == "dense" and measured_columns(self.config.schema, self.config.dense)
        return self.work / shard_name(day, kind) if apart else self.shard(day, kind)

    def column(self, day: int, form: Literal["raw", "ids"], feature: int) -> Path:
        """The file of a feature's values on a day, raw or as ids of its dictionary: plain uint32."""
        return self.work / f"day_{day}_{form}_{feature}"

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Note in the file `name` that a part of the work is done, once the disk holds all that it wrote."""
        sync(self.work / "data")
        sync(self.work)
        write_json(self.work / name, record)

    def features(self) -> range:
        return range(len(self.config.schema.categorical))


class Meter:
    """Adds up the work done, in bytes of the log files."""

    def __init__(self, report: Progress | None):
        self.report = report
        # size: of the files read; counted: of those, what is read once more before, to count its rows.
        self.size = self.counted = self.done = self.before = 0
        self.total: int | None = 0

    def plan(self, files: Sequence[Path], cut: bool, dictionary: bool) -> None:
        """Find the total of the work on some files.

        Each file is read once to write the shards. One that is cut into days is read before that, to count
        its rows; making a dictionary takes about as long as one more pass.
        """
        sizes = [size_of(path) for path in files]
        self.size = sum(size or 0 for size in sizes)
        self.counted = self.size * cut
        self.total = None if None in sizes else self.counted + self.size * (1 + dictionary)

    def advance(self, amount: int) -> None:
        """Report that `amount` bytes of the current part are done."""
        self.done = self.before + amount
        if self.total is not None:
            self.done = min(self.done, self.total)
        if self.report is not None:
            self.report(self.done, self.total)

    def add(self, amount: int) -> None:
        """Report that the current part is done, and was of `amount` bytes."""
        self.advance(max(amount, self.done - self.before))
        self.before = self.done

    def finish(self) -> None:
        if self.total is not None and self.done < self.total:
            self.add(self.total)

    def share(self) -> float:
        """How much of the pass that writes the shards is done, from 0 to 1."""
        return min(max(self.done - self.counted, 0) / self.size, 1.0) if self.size else 0.0


def identity(path: Path) -> dict[str, Any]:
    """Size and time of the last change of a log: if they differ, the file is not what it was.

    Of one in a store, which tells neither, the names of its files.
    """
    if isinstance(path, Stored):
        return {"bytes": 0, "files": [str(file) for file in files_of(path)]}
    infos = [file.stat() for file in files_of(path)]
    changed = max((info.st_mtime_ns for info in infos), default=0)
    return {"bytes": sum(info.st_size for info in infos), "changed_ns": changed}
