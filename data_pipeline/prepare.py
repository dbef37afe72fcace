"""Raw logs -> a folder of shards and its manifest, in one pass, in memory that does not grow with the log.

The folder appears whole or not at all: it is written beside its place under another name, the manifest last,
and then renamed. The same input gives the same bytes.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.appearing import appearing, check_free
from data_pipeline.dialects import Dictionary, HashIds
from data_pipeline.manifest import KINDS, Day, Manifest, shard_name
from data_pipeline.raw import BadRows, count_rows, read_log
from data_pipeline.schema import CRITEO, DataError, Schema
from data_pipeline.splits import halves_of, split
from data_pipeline.synthetic import FIGURES

REJECTED = "rejected.tsv"
DAY_FILE = re.compile(r"day_(\d+)(\..*)?")
HEADER_BYTES = 128
END = np.iinfo(np.int64).max

# Hears how many bytes of the logs, as they lie on disk, have been read, and how many will be in all.
Progress = Callable[[int, int], None]

# Some consecutive rows: an array (n, columns) for each of KINDS.
Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[Path, ...]
    """Raw logs, plain or gzip, or tables (.parquet, .arrow, .csv, .tsv): one file per day, oldest
    first; or one folder, whose day_0, day_1, ... are taken in that order; or one file, to be cut up."""
    out: Path
    """Folder to write; it must not exist yet, or be empty."""
    ids: Literal["hash", "dictionary"] = "hash"
    """hash keeps the 32 bits of the log, for hashed embeddings. dictionary numbers the values of each feature
    in order of first appearance in training, with 0 for all others, for tables."""
    bad_rows: BadRows = "error"
    """error stops at the first malformed line; skip leaves such lines out and lists them in rejected.tsv."""
    blocks: int = 7
    """Number of days of equal length to cut a single file into; DLRM cuts Criteo Kaggle into 7."""
    schema: Schema = CRITEO
    """The columns; default: those of Criteo's logs. `run.py schema FILE` proposes a file to give here."""
    split: str = "mlperf"
    """Which rows test and validate. mlperf: the first half of the last day, and the second. torchrec: the
    other way round. kaggle: as mlperf, of 7 equal days. 0.8,0.1,0.1: shares of all rows in the order of the
    log, to train, validate and test. test=5,validation=6: these days, from 0 (or ranges, 20-22)."""


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Manifest:
    """Write the folder `config.out` and return its manifest; raises DataError and then leaves nothing."""
    check_free(config.out)
    files = _input_files(config.inputs)
    size = sum(path.stat().st_size for path in files)
    meter = _Meter(size, passes=2 if len(files) == 1 else 1, report=progress)
    sources = _sources(files, config.blocks, meter)
    origins = [origin for source in sources for origin in source.origins]
    last = len(origins) - 1
    learned = _training_days(len(origins), config)
    dialect = {"hash": HashIds, "dictionary": Dictionary}[config.ids](len(config.schema.categorical))
    rejected = Counter()

    with appearing(config.out, meter.last_pass) as folder:
        written = {}
        with open(folder / REJECTED, "wb") if config.bad_rows == "skip" else nullcontext() as rejects:

            def reject(source: _Source, line: int, reason: str, text: bytes) -> None:
                rejected[source.day_of(line)] += 1
                rejects.write(f"{source.path}\t{line}\t{reason}\t".encode() + text + b"\n")

            for day, parts in groupby(_parts(sources, config, reject, meter), key=itemgetter(0)):
                encode = partial(dialect.encode, learn=day in learned)
                written[day] = _write_day(folder, day, (arrays for _, arrays in parts), encode)

        days = tuple(Day(*written.get(day, (0, {})), origins[day], rejected[day]) for day in range(last + 1))
        for day, least in zip(days, [1] * last + [2 if halves_of(config.split) else 1], strict=True):
            if day.rows < least:
                raise DataError(
                    f"{day.source}: {day.rows} usable rows, but each day needs 1 and the last 2; give more "
                    "rows, or cut a single file into fewer --blocks"
                )
        parts, note = split([day.rows for day in days], config.split)
        manifest = Manifest(
            schema=config.schema,
            dense_transform="log1p",
            ids=dialect.describe(),
            days=days,
            split=parts,
            split_note=note,
            synthetic=_synthetic(files, None if rejected[last] else halves_of(config.split)),
            dictionary_sha256=dialect.save(folder) if config.ids == "dictionary" else None,
        )
        manifest.save(folder)
    return Manifest.load(config.out)


def verify(folder: Path | str) -> Manifest:
    """Hash every shard again; raises DataError naming the first that is not what the manifest says."""
    manifest = Manifest.load(folder)
    for number, day in enumerate(manifest.days):
        for kind in KINDS:
            shard = manifest.open_shard(number, kind).astype(KINDS[kind], copy=False)
            if hashlib.sha256(np.ascontiguousarray(shard)).hexdigest() != day.sha256[kind]:
                path = manifest.folder / shard_name(number, kind)
                raise DataError(f"{path}: its bytes are not those that were written; prepare the data again")
    if manifest.dictionary_sha256 is not None:
        Dictionary.load(manifest)
    return manifest


class _Source(NamedTuple):
    """A file and the days in it: day `first + i` ends with line `stops[i]`, and `origins[i]` is its name."""

    path: Path
    first: int
    stops: tuple[int, ...]
    origins: tuple[str, ...]

    def day_of(self, line: int) -> int:
        return self.first + int(np.searchsorted(self.stops, line))


class _Meter:
    """Adds up what has been read of the files, `size` bytes in all, which are read `passes` times."""

    def __init__(self, size: int, passes: int, report: Progress | None):
        self.size, self.passes, self.report = size, passes, report
        self.before = self.done = 0

    def start(self) -> None:
        """Begin a file."""
        self.before = self.done

    def advance(self, position: int) -> None:
        """Note the position reached in the file."""
        self.done = self.before + position
        if self.report is not None:
            self.report(self.done, self.size * self.passes)

    def last_pass(self) -> float:
        """The share done of the last pass, the one that writes."""
        return self.done / self.size - (self.passes - 1)


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


def _sources(files: list[Path], blocks: int, meter: _Meter) -> list[_Source]:
    if len(files) > 1:
        return [_Source(path, day, (END,), (str(path),)) for day, path in enumerate(files)]
    (path,) = files
    if blocks < 2:
        raise DataError(f"{path}: a single file cannot be {blocks} days; give --blocks 2 or more")
    rows = count_rows(path, meter.advance)
    stops = np.cumsum([rows // blocks + (block < rows % blocks) for block in range(blocks)]).tolist()
    origins = tuple(f"{path}, block {block} of {blocks}" for block in range(1, blocks + 1))
    return [_Source(path, 0, (*stops[:-1], END), origins)]


def _training_days(count: int, config: PrepareConfig) -> set[int]:
    """The days whose values a dictionary learns."""
    if config.ids == "dictionary" and config.split[:1].isdigit():
        raise DataError(
            f"--split {config.split}: cuts days, but --ids dictionary learns whole ones; name days"
        )
    return {day for day, _, _ in split([2] * count, config.split)[0]["train"]}


def _parts(
    sources: list[_Source], config: PrepareConfig, reject: Callable[..., None], meter: _Meter
) -> Iterator[tuple[int, Rows]]:
    """The log in order as (day, some of its rows), the ids as they are in the log."""
    for source in sources:
        meter.start()
        on_reject = partial(reject, source)
        for chunk in read_log(source.path, config.schema, bad_rows=config.bad_rows, on_reject=on_reject):
            meter.advance(chunk.position)
            ends = np.searchsorted(chunk.line, source.stops, side="right")
            for day, (start, stop) in enumerate(pairwise([0, *ends]), source.first):
                if start < stop:
                    rows = {"labels": chunk.label[:, None], "dense": chunk.dense, "sparse": chunk.ids}
                    yield day, {kind: array[start:stop] for kind, array in rows.items()}


def _write_day(
    folder: Path, day: int, parts: Iterable[Rows], encode: Callable[[np.ndarray], np.ndarray]
) -> tuple[int, dict[str, str]]:
    """Write the shards of a day, its ids encoded; returns the number of rows and the sha256 of each shard.

    How many rows there are is known only at the end, so the header is written last, into room left for it.
    """
    rows = 0
    columns = {}
    hashes = {kind: hashlib.sha256() for kind in KINDS}
    with ExitStack() as stack:
        files = {kind: stack.enter_context(open(folder / shard_name(day, kind), "wb")) for kind in KINDS}
        for file in files.values():
            file.write(bytes(HEADER_BYTES))
        for arrays in parts:
            arrays["sparse"] = encode(arrays["sparse"])
            for kind, array in arrays.items():
                files[kind].write(array)
                hashes[kind].update(array)
                columns[kind] = array.shape[1]
            rows += len(array)
        for kind, file in files.items():
            file.seek(0)
            header = {"descr": KINDS[kind].str, "fortran_order": False, "shape": (rows, columns[kind])}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == HEADER_BYTES
    return rows, {kind: digest.hexdigest() for kind, digest in hashes.items()}


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
