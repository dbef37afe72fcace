"""Raw logs -> a folder of shards and its manifest, in memory that does not grow with the log.

    parse    a day of the log -> its shards; days are independent of each other
    number   with a dictionary only: a feature of all days -> its ids; features are independent of each other
    join     with a dictionary only: the ids of all features on a day -> its sparse shard
    finish   manifest.json, and the folder appears

What is written gets its name when it is whole, and days and features that are done are noted as done, all in
`.OUT.partial` beside the folder to be. So the same command goes on where an earlier one was ended, by
whatever means, and the bytes are the same in the end. Several processes may share the work (`--days`,
mpiexec).
"""

import ctypes
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.appearing import finish, partial_name, resuming, work_folder, write_whole
from data_pipeline.dialects import DICTIONARY, Dense, Dictionary, Distinct, Numbers, Order, learn, modulo
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, Stretch, shard_name
from data_pipeline.ranks import Ranks
from data_pipeline.raw import BadRows, count_rows, read_log
from data_pipeline.schema import CRITEO, CRITEO_TB_ROWS, DataError, Schema
from data_pipeline.splits import halves_of, split
from data_pipeline.synthetic import FIGURES

REJECTED = "rejected.tsv"
DAY_FILE = re.compile(r"day_(\d+)(\..*)?")
HEADER_BYTES = 128
PIECE = 1 << 22  # so many values of a column or shard are in memory at a time
END = np.iinfo(np.int64).max

# Hears how many bytes of the logs, as they lie on disk, have been read, and how many will be in all;
# numbering counts as reading them once more.
Progress = Callable[[int, int], None]

# Some consecutive rows: an array (n, columns) for each of KINDS.
Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[Path, ...]
    """Raw logs, plain or gzip, or tables (.parquet, .arrow, .csv, .tsv): one file per day, oldest
    first; or one folder, whose day_0, day_1, ... are taken in that order; or one file, to be cut up."""
    out: Path
    """Folder to write; it must not exist yet, or be empty. What is done meanwhile is kept in .OUT.partial
    beside it: the same command goes on from there."""
    ids: Literal["hash", "modulo", "dictionary"] = "hash"
    """hash keeps the 32 bits of the log, for hashed embeddings; modulo takes them modulo --max-ind-range.
    dictionary numbers the values of each feature that training saw, with 0 for all others, for tables."""
    max_ind_range: int | None = None
    """Take ids modulo this; with a dictionary, before it, as MLPerf v1 does with 40000000."""
    min_count: int = 1
    """Leave out of the dictionary what training saw less often; it shares id 0 with what it never saw."""
    order: Order = "first"
    """The dictionary numbers by first appearance, or by falling count, ties by value."""
    dense: Dense = "log1p"
    """log1p writes log(max(x, 0) + 1) of the dense values, none the values themselves; missing ones are 0."""
    bad_rows: BadRows = "error"
    """error stops at the first malformed line; skip leaves such lines out and lists them in rejected.tsv."""
    blocks: int = 7
    """Number of days of equal length to cut a single file into; DLRM cuts Criteo Kaggle into 7."""
    days: str | None = None
    """Only parse these days, like 0-3,7: other processes may do others at the same time. When all are done,
    the same command without --days finishes the folder."""
    schema: Schema = CRITEO
    """The columns; default: those of Criteo's logs. `schema FILE` proposes a file to give here."""
    split: str = "mlperf"
    """Which rows test and validate. mlperf: the first half of the last day, and the second. torchrec: the
    other way round. kaggle: as mlperf, of 7 equal days. 0.8,0.1,0.1: shares of all rows in the order of the
    log, to train, validate and test. test=5,validation=6: these days, from 0 (or ranges, 20-22)."""


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Manifest | None:
    """Write the folder `config.out` and return its manifest; None with `days`, which do not finish it.

    Raises DataError. If a day is done by then, it is kept for the next attempt, else nothing is. Under
    mpiexec every rank calls this and does its share.
    """
    _check(config)
    _keep_freed_memory()
    files = _input_files(config.inputs)
    _synthetic(files, None)
    count = len(files) if len(files) > 1 else config.blocks
    if count < 2:
        raise DataError(f"{files[0]}: a single file cannot be {count} days; give --blocks 2 or more")
    split([10**6] * count, config.split)  # so that what is wrong with it is told now
    days = range(count) if config.days is None else _chosen(config.days, count)
    parts = None if config.days is None else [f"day_{day}" for day in days]
    ranks, meter = Ranks(), _Meter(progress)
    job = _Job(config, work_folder(config.out), ranks, meter)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.rank == 0:
                stack.enter_context(resuming(config.out, _settings(config, files), meter.share, parts))
                meter.plan(files, ranks.share(days), config.ids == "dictionary")
                if len(files) == 1:
                    _count(job, files[0])
        sources = _sources(job, files)
        with ranks.together():
            _parse(job, sources, ranks.share(days))
        if config.days is not None:
            return None
        origins = [origin for source in sources for origin in source.origins]
        with ranks.together():  # before rank 0 may remove them
            records = [_read(job.work / f"day_{day}.done") or {"rows": 0} for day in days]
        parts, note = _split([record["rows"] for record in records], origins, config.split)
        if config.ids == "dictionary":
            with ranks.together():
                _number(job, records, parts["train"])
            with ranks.together():
                _join(job, records)
        with ranks.together():
            if ranks.rank == 0:
                _finish(job, files, origins, records, parts, note)
        meter.finish()
    return Manifest.load(config.out)


def verify(folder: Path | str) -> Manifest:
    """Read every shard again: its bytes and values; raises DataError naming the first that is wrong."""
    manifest = Manifest.load(folder)
    for number, day in enumerate(manifest.days):
        for kind in KINDS:
            path = manifest.folder / shard_name(number, kind)
            shard, digest, trouble = manifest.open_shard(number, kind), hashlib.sha256(), None
            step = PIECE // max(1, shard.shape[1])
            for start in range(0, len(shard), step):
                rows = np.ascontiguousarray(shard[start : start + step].astype(KINDS[kind], copy=False))
                digest.update(rows)
                wrong = np.flatnonzero(~_valid(rows, kind, manifest.ids).all(axis=1))
                if wrong.size and trouble is None:
                    trouble = f"row {start + wrong[0]} holds what no {kind} may be"
            if digest.hexdigest() != day.sha256[kind]:
                trouble = "its bytes are not those that were written"
            if trouble is not None:
                raise DataError(f"{path}: {trouble}; prepare the data again")
    if manifest.dictionary_sha256 is not None:
        Dictionary.load(manifest)
    return manifest


def _valid(rows: np.ndarray, kind: str, ids: Ids) -> np.ndarray:
    """Which values of a shard are possible."""
    if kind == "labels":
        return (rows == 0) | (rows == 1)
    if kind == "dense":
        return np.isfinite(rows)
    if ids.dialect == "hash":
        return np.ones(rows.shape, bool)
    return rows.view(np.uint32) < np.array(ids.cardinalities)


def against_published(manifest: Manifest) -> str | None:
    """Whether days named like Criteo Terabyte's have as many lines; None if there are no such days."""
    found = []
    for day in manifest.days:
        match, lines = DAY_FILE.fullmatch(Path(day.source).name), day.rows + day.rejected
        # Smaller files of that name are samples, or of another log.
        if match and int(match[1]) < len(CRITEO_TB_ROWS) and lines > 10**8:
            found.append((day.source, lines, CRITEO_TB_ROWS[int(match[1])]))
    for source, lines, published in found:
        if lines != published:
            return (
                f"{source}: {lines:,} lines, but Criteo Terabyte has {published:,} there; is the file whole?"
            )
    return f"lines of {len(found)} days: as published of Criteo Terabyte" if found else None


def _check(config: PrepareConfig) -> None:
    """Raise DataError for settings that do not go together."""
    modulus = config.max_ind_range
    if config.ids == "modulo" and modulus is None:
        raise DataError("--ids modulo: needs --max-ind-range, the number to take ids modulo")
    if config.ids == "hash" and modulus is not None:
        raise DataError("--max-ind-range: not with --ids hash; give --ids modulo or dictionary")
    if modulus is not None and not 1 <= modulus < 1 << 32:
        raise DataError(f"--max-ind-range {modulus}: must be from 1 to {2**32 - 1}")
    if config.min_count < 1:
        raise DataError(f"--min-count {config.min_count}: must be at least 1")
    if config.ids != "dictionary" and (config.min_count, config.order) != (1, "first"):
        raise DataError("--min-count and --order: are of dictionaries; give --ids dictionary")


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of a chunk for the next: to fetch it anew took a tenth of all time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, size in ((-3, 1 << 25), (-1, 1 << 28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, size)


def _settings(config: PrepareConfig, files: list[Path]) -> dict:
    """All that must stay the same from one attempt to the next."""
    same = ("ids", "max_ind_range", "min_count", "order", "dense", "split")
    return {
        "inputs": [str(file) for file in files],
        "columns": config.schema.fingerprint(),
        **{name: getattr(config, name) for name in same},
        "blocks": config.blocks if len(files) == 1 else None,
    }


def _chosen(text: str, count: int) -> list[int]:
    """The days that are meant by a text like 0-3,7, of `count` days."""
    days = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < count:
            raise DataError(f"--days {text}: give days from 0 to {count - 1}, like 0-3,7")
        days.update(range(first, last + 1))
    return sorted(days)


class _Job(NamedTuple):
    """What all steps of a preparation need to know."""

    config: PrepareConfig
    work: Path
    ranks: Ranks
    meter: "_Meter"

    def shard(self, day: int, kind: str) -> Path:
        return self.work / "data" / shard_name(day, kind)

    def column(self, day: int, form: Literal["raw", "ids"], feature: int) -> Path:
        """A feature on a day, as plain uint32."""
        return self.work / f"day_{day}_{form}_{feature}"

    def features(self) -> range:
        return range(len(self.config.schema.categorical))


class _Source(NamedTuple):
    """A file and the days in it: day `first + i` ends with line `stops[i]`, and `origins[i]` is its name."""

    path: Path
    first: int
    stops: tuple[int, ...]
    origins: tuple[str, ...]

    def day_of(self, line: int) -> int:
        return self.first + int(np.searchsorted(self.stops, line))

    def first_line(self, day: int) -> int:
        return 1 if day == self.first else self.stops[day - self.first - 1] + 1


class _Meter:
    """Adds up what has been read, in bytes of the files."""

    def __init__(self, report: Progress | None):
        self.report = report
        self.size = self.counted = self.total = self.done = self.before = 0

    def plan(self, files: list[Path], days: Sequence[int], dictionary: bool) -> None:
        """One pass writes; a single file is read before, to count its rows; a dictionary is made after."""
        sizes = [path.stat().st_size for path in files]
        self.size = sizes[0] if len(files) == 1 else sum(sizes[day] for day in days)
        self.counted = self.size * (len(files) == 1)
        self.total = self.counted + self.size * (1 + dictionary)

    def advance(self, amount: int) -> None:
        """So much has been done of what `add` will add."""
        self.done = min(self.before + amount, self.total)
        if self.report is not None:
            self.report(self.done, self.total)

    def add(self, amount: int) -> None:
        self.advance(amount)
        self.before = self.done

    def finish(self) -> None:
        if self.done < self.total:
            self.add(self.total)

    def share(self) -> float:
        """The share done of the pass that writes."""
        return min(max(self.done - self.counted, 0) / self.size, 1.0) if self.size else 0.0


def _input_files(inputs: tuple[Path, ...]) -> list[Path]:
    """The log files in order, all there and all different."""
    if not inputs:
        raise DataError("no input: name one log file per day, or one folder of day_0, day_1, ...")
    if len(inputs) == 1 and inputs[0].is_dir():
        folder = inputs[0]
        days = sorted((int(m[1]), path) for path in folder.iterdir() if (m := DAY_FILE.fullmatch(path.name)))
        if not days:
            raise DataError(f"{folder}: holds no day_0, day_1, ...; name the log files one by one")
        for (number, path), (next_number, twin) in pairwise(days):
            if number == next_number:
                raise DataError(f"{twin}: is the same day as {path}; name the log files one by one")
        inputs = tuple(path for _, path in days)
    seen = {}
    for path in inputs:
        try:
            info = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check the path") from None
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name log files, or one folder alone")
        if not path.is_file():
            raise DataError(f"{path}: is not an ordinary file; write the log to one first")
        identity = info.st_dev, info.st_ino
        if identity in seen:
            raise DataError(f"{path}: is the same file as {seen[identity]}; name each file once")
        seen[identity] = path
    return list(inputs)


def _count(job: _Job, path: Path) -> None:
    """Count the rows of a single file."""
    note = job.work / "lines.json"
    if (_read(note) or {}).get("source") != _identity(path):
        write_whole(note, {"source": _identity(path), "rows": count_rows(path, job.meter.advance)})
    job.meter.add(path.stat().st_size)


def _sources(job: _Job, files: list[Path]) -> list[_Source]:
    if len(files) > 1:
        return [_Source(path, day, (END,), (str(path),)) for day, path in enumerate(files)]
    (path,), blocks = files, job.config.blocks
    lines = _read(job.work / "lines.json")["rows"]
    sizes = [lines // blocks + (block < lines % blocks) for block in range(blocks)]
    origins = tuple(f"{path}, block {block} of {blocks}" for block in range(1, blocks + 1))
    return [_Source(path, 0, (*np.cumsum(sizes[:-1]).tolist(), END), origins)]


def _split(rows: list[int], origins: Sequence[str], how: str) -> tuple[dict[str, tuple[Stretch, ...]], str]:
    """The splits of days with so many rows, and in words which is which."""
    last = len(rows) - 1
    for count, origin, least in zip(rows, origins, [1] * last + [2 if halves_of(how) else 1], strict=True):
        if count < least:
            raise DataError(
                f"{origin}: {count} usable rows, but each day needs 1 and the last 2; give more "
                "rows, or cut a single file into fewer --blocks"
            )
    return split(rows, how)


def _parse(job: _Job, sources: list[_Source], days: Sequence[int]) -> None:
    """Write the shards of these days, as far as that is not done."""
    for source in sources:
        mine = [day for day in days if source.first <= day < source.first + len(source.stops)]
        if needed := [day for day in mine if not _parsed(job, source, day)]:
            _parse_source(job, source, needed)
        if mine:
            job.meter.add(source.path.stat().st_size)


def _parsed(job: _Job, source: _Source, day: int) -> bool:
    """Whether a day is done, and what is to be done with bad lines has not changed."""
    record = _read(job.work / f"day_{day}.done")
    if record is None or (record["rejected"] and job.config.bad_rows == "error"):
        return False
    if record["source"] != _identity(source.path):
        raise DataError(
            f"{source.path}: has changed since day {day} was prepared from it; remove {job.work} to begin "
            "again"
        )
    schema = job.config.schema
    columns = {"labels": 1, "dense": len(schema.dense), "sparse": len(schema.categorical)}
    if job.config.ids == "dictionary":
        del columns["sparse"]
    sizes = {job.shard(day, kind): HEADER_BYTES + 4 * n * record["rows"] for kind, n in columns.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def _parse_source(job: _Job, source: _Source, needed: list[int]) -> None:
    """Write the shards of some days of a file."""
    identity, rejected = _identity(source.path), Counter()
    with ExitStack() as stack:
        files = {}

        def reject(line: int, reason: str, text: bytes) -> None:
            if (day := source.day_of(line)) in needed:
                if day not in files:
                    path = partial_name(job.work / f"day_{day}_{REJECTED}")
                    files[day] = stack.enter_context(open(path, "wb"))
                rejected[day] += 1
                files[day].write(f"{source.path}\t{line}\t{reason}\t".encode() + text + b"\n")

        parts = stack.enter_context(closing(_parts(job, source, source.first_line(needed[0]), reject)))
        for day, group in groupby(parts, key=itemgetter(0)):
            if day in needed:
                record = _write_day(job, day, (rows for _, rows in group))
                if day in files:
                    files[day].close()
                    path = job.work / f"day_{day}_{REJECTED}"
                    partial_name(path).replace(path)
                record |= {"source": identity, "rejected": rejected[day]}
                write_whole(job.work / f"day_{day}.done", record)
            if day == needed[-1]:
                break


def _parts(
    job: _Job, source: _Source, first_line: int, reject: Callable[[int, str, bytes], None]
) -> Iterator[tuple[int, Rows]]:
    """The log from a line on as (day, some of its rows), the ids as they are in the log."""
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
            ends = np.searchsorted(chunk.line, source.stops, side="right")
            for day, (start, stop) in enumerate(pairwise([0, *ends]), source.first):
                if start < stop:
                    rows = {"labels": chunk.label[:, None], "dense": chunk.dense, "sparse": chunk.ids}
                    yield day, {kind: array[start:stop] for kind, array in rows.items()}


def _write_day(job: _Job, day: int, parts: Iterator[Rows]) -> dict:
    """Write the shards of a day; with a dictionary, the raw columns instead of the sparse one."""
    schema, dictionary = job.config.schema, job.config.ids == "dictionary"
    modulus = None if dictionary else job.config.max_ind_range
    distinct = Distinct(len(schema.categorical))
    rows, sha256 = 0, {}
    with ExitStack() as stack:
        append = {
            kind: stack.enter_context(_shard(job.shard(day, kind), kind, sha256))
            for kind in KINDS
            if kind != "sparse" or not dictionary
        }
        if dictionary:
            columns = [job.column(day, "raw", feature) for feature in job.features()]
            append["sparse"] = stack.enter_context(_columns(columns))
        for arrays in parts:
            arrays["sparse"] = modulo(arrays["sparse"], modulus)
            for kind, array in arrays.items():
                append[kind](array)
            if not dictionary:
                distinct.add(arrays["sparse"])
            rows += len(arrays["labels"])
    if not dictionary:
        np.save(job.work / f"day_{day}_distinct.npy", distinct.to_array())
    return {"rows": rows, "sha256": sha256}


@contextmanager
def _shard(path: Path, kind: str, sha256: dict[str, str]) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends rows to a new .npy file, which gets its name, and its sha256 told, at the end.

    How many rows there are is known only then, so the header is written last, into room left for it.
    """
    digest, shape = hashlib.sha256(), [0, 0]
    with open(partial_name(path), "wb") as file:
        file.write(bytes(HEADER_BYTES))

        def write(array: np.ndarray) -> None:
            file.write(array)
            digest.update(array)
            shape[:] = shape[0] + len(array), array.shape[1]

        with _behind(write) as append:
            yield append
        file.seek(0)
        header = {"descr": KINDS[kind].str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER_BYTES
    partial_name(path).replace(path)
    sha256[kind] = digest.hexdigest()


@contextmanager
def _columns(paths: list[Path]) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends each column of its rows (n, F) to a file of its own."""
    with ExitStack() as stack:
        files = [stack.enter_context(open(partial_name(path), "wb")) for path in paths]

        def write(array: np.ndarray) -> None:
            for file, column in zip(files, np.ascontiguousarray(array.T), strict=True):
                file.write(column)

        with _behind(write) as append:
            yield append
    for path in paths:
        partial_name(path).replace(path)


@contextmanager
def _behind(write: Callable[[np.ndarray], None]) -> Iterator[Callable[[np.ndarray], None]]:
    """The same function, done in a thread while its caller prepares the next call."""
    with ThreadPoolExecutor(1) as thread:
        pending = []

        def later(array: np.ndarray) -> None:
            for last in pending:
                last.result()
            pending[:] = [thread.submit(write, array)]

        yield later
        for last in pending:
            last.result()


def _number(job: _Job, records: list[dict], train: tuple[Stretch, ...]) -> None:
    """Learn the dictionary of each feature, and write its columns as ids."""
    config, features = job.config, job.features()
    for feature in job.ranks.share(features):
        done = job.work / f"feature_{feature}.done"
        if not done.exists():

            def pieces(feature: int = feature) -> Iterator[np.ndarray]:
                for day, start, stop in train:
                    yield from _pieces(job.column(day, "raw", feature), start, stop)

            rows = sum(stop - start for _, start, stop in train)
            learned = learn(pieces, rows, config.max_ind_range, config.min_count, config.order)
            np.save(job.work / f"feature_{feature}.npy", learned.values)
            numbers = Numbers(learned.values, config.max_ind_range)
            for day, record in enumerate(records):
                path = job.column(day, "ids", feature)
                with open(partial_name(path), "wb") as file:
                    for piece in _pieces(job.column(day, "raw", feature), 0, record["rows"]):
                        file.write(numbers.find(piece))
                partial_name(path).replace(path)
            write_whole(done, learned.report)
        for day in range(len(records)):
            job.column(day, "raw", feature).unlink(missing_ok=True)
        job.meter.add(job.meter.size // (2 * len(features)))


def _join(job: _Job, records: list[dict]) -> None:
    """Write the sparse shards from the columns of ids."""
    features = job.features()
    for day in job.ranks.share(range(len(records))):
        done, rows = job.work / f"joined_{day}.done", records[day]["rows"]
        if not done.exists():
            sha256 = {}
            with _shard(job.shard(day, "sparse"), "sparse", sha256) as append:
                for start in range(0, rows, PIECE // len(features)):
                    stop = min(start + PIECE // len(features), rows)
                    columns = [next(_pieces(job.column(day, "ids", f), start, stop)) for f in features]
                    append(np.stack(columns, axis=1))
            write_whole(done, sha256)
        for feature in features:
            job.column(day, "ids", feature).unlink(missing_ok=True)
        job.meter.add(job.meter.size // (2 * len(records)))


def _pieces(path: Path, start: int, stop: int) -> Iterator[np.ndarray]:
    """Values `start` to `stop` of a column."""
    for at in range(start, stop, PIECE):
        piece = np.fromfile(path, np.uint32, min(PIECE, stop - at), offset=4 * at)
        if piece.size < min(PIECE, stop - at):
            raise DataError(f"{path}: damaged; remove {path.parent} to begin again")
        yield piece


def _finish(
    job: _Job,
    files: list[Path],
    origins: list[str],
    records: list[dict],
    parts: dict[str, tuple[Stretch, ...]],
    note: str,
) -> None:
    """Write what describes the shards, and let the folder appear."""
    config, work = job.config, job.work
    if config.bad_rows == "skip":
        with open(work / "data" / REJECTED, "wb") as file:
            for day, record in enumerate(records):
                if record["rejected"]:
                    file.write((work / f"day_{day}_{REJECTED}").read_bytes())
    dictionary_sha256 = None
    if config.ids == "dictionary":
        for day, record in enumerate(records):
            record["sha256"] |= _read(work / f"joined_{day}.done")
        values = np.concatenate([np.load(work / f"feature_{feature}.npy") for feature in job.features()])
        np.save(work / "data" / DICTIONARY, values)
        dictionary_sha256 = hashlib.sha256(values).hexdigest()
        features = tuple(_read(work / f"feature_{feature}.done") for feature in job.features())
        cardinalities, exact = tuple(feature["kept"] + 1 for feature in features), True
    else:
        distinct = Distinct(len(job.features()))
        for day in range(len(records)):
            distinct.merge(np.load(work / f"day_{day}_distinct.npy"))
        features = tuple({"distinct": count} for count in distinct.counts())
        cardinalities, exact = distinct.counts(), distinct.exact()
        if config.ids == "modulo":
            cardinalities, exact = (config.max_ind_range,) * len(features), True
    manifest = Manifest(
        schema=config.schema,
        dense_transform=config.dense,
        ids=Ids(config.ids, cardinalities, exact, config.max_ind_range, config.min_count, config.order),
        days=tuple(
            Day(record["rows"], record["sha256"], origin, record["rejected"])
            for record, origin in zip(records, origins, strict=True)
        ),
        split=parts,
        split_note=note,
        synthetic=_synthetic(files, None if records[-1]["rejected"] else halves_of(config.split)),
        dictionary_sha256=dictionary_sha256,
        features=features,
    )
    manifest.save(work / "data")
    finish(work, config.out)


def _identity(path: Path) -> dict:
    """What tells a file from what it was before."""
    info = path.stat()
    return {"bytes": info.st_size, "changed_ns": info.st_mtime_ns}


def _read(path: Path) -> dict | None:
    """What `write_whole` wrote; None if it did not."""
    return json.loads(path.read_text()) if path.exists() else None


def _synthetic(files: list[Path], halves: tuple[str, str] | None) -> dict | None:
    """What the generator says of its files, and of the two halves of the last.

    halves: which splits these are; None if they are none, or if the day is not as the generator left it.

    None for files it did not write; raises DataError for a mixture, which nobody could name truly.
    """
    path = files[-1].parent / FIGURES
    if not path.is_file():
        return None
    try:
        generator = json.loads(path.read_text())
        figures = generator.pop("files")
        own = [file for file in files if file.name in figures]
        same = [file for file in own if figures[file.name]["bytes"] == file.stat().st_size]
        if not own:
            return None
        if same != files:
            other = next(file for file in files if file not in same)
            raise DataError(f"{other}: is not what {path} describes; keep synthetic files apart from others")
        bayes = None
        if len(files) > 1 and halves is not None:
            last = figures[files[-1].name]
            known = dict(zip(halves, (last["first_half"], last["second_half"]), strict=True))
            # With one class alone there is nothing to rank.
            bayes = known if all(half["auc"] is not None for half in known.values()) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not what the generator writes ({error!r}); generate it again") from None
    return {"generator": generator, "bayes": bayes}
