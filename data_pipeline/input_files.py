"""Which files a preparation reads, and in which order; the last one tests."""

import glob
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data_pipeline.folders import DAY_FILE
from data_pipeline.partitions import NOTHING, by_number, files_of, is_partition, key_of, parts_of
from data_pipeline.schema import DataError
from data_pipeline.stores import Stored, located, matching

InputOrder = Literal["names", "given"]
KEEP = "or give --input-order given to keep the order as it is"
# How shells sort what a wildcard matches: by code points, or as most languages do, without punctuation.
SHELLS = (str, lambda name: re.sub(r"\W|_", "", name).casefold())


def input_files(inputs: tuple[Path, ...], order: InputOrder = "names") -> list[Path]:
    """The log files, oldest first; a folder stands for the Parquet files below it, those of a day.

    inputs: files, patterns, or folders of one day's Parquet files; or one folder of day_0, day_1, ..., which
        are taken by number, of Parquet files, or of partitions (`date=2024-01-01`), each a day.
    order: of several files; see `in_order`. `given` takes them as they are.

    Raises DataError unless all are there, all are different, and the order is clear.
    """
    if not inputs:
        raise DataError("no input: name one log file per day, or one folder of day_0, day_1, ...")
    inputs = tuple(map(located, inputs))
    if len(inputs) == 1 and inputs[0].is_dir():
        inputs = tuple(_days_of(inputs[0]))
    else:
        inputs = tuple(matched(inputs))
        _require_whole_partitions(inputs)
    seen: dict[Any, Path] = {}
    for path in inputs:
        file = _identity(path)
        if path.is_dir() and not files_of(path):
            raise DataError(f"{path}: is a folder; name log files, or one folder alone")
        if not (path.is_dir() or path.is_file()):
            raise DataError(f"{path}: is not an ordinary file; write the log to one first")
        if file in seen:
            raise DataError(f"{path}: is the same file as {seen[file]}; name each file once")
        seen[file] = path
    return in_order(list(inputs)) if order == "names" else list(inputs)


def _identity(path: Path) -> Any:
    """What two names of one file have in common; raises DataError if there is no such file."""
    if isinstance(path, Stored):
        if not path.exists():
            raise DataError(f"{path}: not found; check the path")
        return path
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from None
    return info.st_dev, info.st_ino


@contextmanager
def standard_input() -> Iterator[Path]:
    """A file that holds what comes from standard input, as long as it is needed: a format takes two looks."""
    with tempfile.TemporaryDirectory(prefix="robe-") as folder:
        path = Path(folder) / "standard input"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def matched(inputs: tuple[Path, ...]) -> list[Path]:
    """The files; instead of a pattern such as `day_*` those that match it, by the numbers in their names.

    A file of that very name is meant itself, but for a store. Raises DataError for a pattern that nothing
    matches.
    """
    found: list[Path] = []
    for path in map(located, inputs):
        if not glob.has_magic(str(path)) or (not isinstance(path, Stored) and path.exists()):
            found.append(path)
            continue
        matches: Sequence[Path] = (
            matching(path) if isinstance(path, Stored) else [*map(Path, glob.glob(str(path), recursive=True))]
        )
        if not matches:
            raise DataError(f"{path}: no file matches; check the path")
        found += sorted(matches, key=by_number)
    return found


def _days_of(folder: Path) -> list[Path]:
    days = sorted((int(m[1]), path) for path in folder.iterdir() if (m := DAY_FILE.fullmatch(path.name)))
    if not days:
        return _parquet_days(folder)
    for (number, path), (next_number, twin) in pairwise(days):
        if number == next_number:
            raise DataError(f"{twin}: is the same day as {path}; name the log files one by one")
    return [path for _, path in days]


def _parquet_days(folder: Path) -> list[Path]:
    """The partitions of a folder, or its Parquet files, by the numbers in their names.

    Where partitions of a year hold those of its months, and these those of their days, the last are the days.
    """
    inside = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]
    days = [path for path in inside if is_partition(path) and files_of(path)]
    files = [path for path in inside if path.is_file() and path.suffix == ".parquet"]
    if days and files:
        raise DataError(
            f"{folder}: holds a partition, {days[0].name}, beside a file, {files[0].name}; name the days one "
            "by one"
        )
    while days:
        if odd := [day for day in days if key_of(day) != key_of(days[0]) or day.name.endswith(f"={NOTHING}")]:
            raise DataError(
                f"{odd[0]}: does not say which day it is as {days[0].name} does; name the days one by one"
            )
        below = [path for day in days for path in day.iterdir() if is_partition(path) and files_of(path)]
        if not below or any(key_of(path) not in ("month", "day") for path in below):
            break
        days = below
    if not (days or files):
        raise DataError(
            f"{folder}: holds no day_0, day_1, ..., nor Parquet files; name the log files one by one"
        )
    return sorted(days or files, key=by_number)


def _require_whole_partitions(inputs: tuple[Path, ...]) -> None:
    """Raise DataError for several files of one of many partitions, as they are of one day."""
    seen: dict[Path, Path] = {}
    for path in inputs if len({path.parent for path in inputs}) > 1 else ():
        if is_partition(path.parent) and path.is_file() and seen.setdefault(path.parent, path) != path:
            raise DataError(
                f"{path}: is in one partition with {seen[path.parent].name}, so both are of one day; name "
                f"{path.parent} instead"
            )


def in_order(files: list[Path]) -> list[Path]:
    """The files with those whose names differ in numbers alone sorted by these.

    A shell's wildcard puts day_10 before day_2; such a list is sorted. Raises DataError for any other list
    that contradicts the numbers, and for one that has files called test or validation before those called
    train: it may be meant.
    """
    numbered = defaultdict(list)
    for position, path in enumerate(files):
        numbered[_name_without_numbers(path)].append(position)
    ordered = list(files)
    for positions in numbered.values():
        by_number = sorted((files[position] for position in positions), key=_numbers)
        for position, path in zip(positions, by_number, strict=True):
            ordered[position] = path
    if ordered != files and not any(files == sorted(files, key=lambda p: key(str(p))) for key in SHELLS):
        late, early = next((a, b) for a, b in zip(files, ordered, strict=True) if a != b)
        raise DataError(
            f"{late}: comes before {early}, against the numbers in their names; name the oldest first, {KEEP}"
        )
    held_out = None
    for path in ordered:
        if held_out and _says(path, "train|training"):
            raise DataError(
                f"{held_out}: comes before {path}, but the last file tests; name what trains first, {KEEP}"
            )
        if not held_out and _says(path, "test|valid|validation|val"):
            held_out = path
    return ordered


def _name_without_numbers(path: Path) -> tuple[str, ...]:
    return tuple(parts_of(path)[::2])


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in parts_of(path)[1::2]]


def _says(path: Path, words: str) -> bool:
    return re.search(rf"(^|[^a-z])({words})([^a-z]|$)", path.name.lower()) is not None
