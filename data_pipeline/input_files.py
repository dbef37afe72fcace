"""Which files a preparation reads, and in which order; the last one tests."""

import glob
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Literal

from data_pipeline.folders import DAY_FILE
from data_pipeline.schema import DataError

InputOrder = Literal["names", "given"]
KEEP = "or give --input-order given to keep the order as it is"
# How shells sort what a wildcard matches: by code points, or as most languages do, without punctuation.
SHELLS = (str, lambda name: re.sub(r"\W|_", "", name).casefold())


def input_files(inputs: tuple[Path, ...], order: InputOrder = "names") -> list[Path]:
    """The log files, oldest first.

    inputs: files, or one folder of day_0, day_1, ..., which are taken by number.
    order: of several files; see `in_order`. `given` takes them as they are.

    Raises DataError unless all are there, all are different, and the order is clear.
    """
    if not inputs:
        raise DataError("no input: name one log file per day, or one folder of day_0, day_1, ...")
    if len(inputs) == 1 and inputs[0].is_dir():
        inputs = tuple(_days_of(inputs[0]))
    seen: dict[tuple[int, int], Path] = {}
    for path in inputs:
        try:
            info = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check the path") from None
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name log files, or one folder alone")
        if not path.is_file():
            raise DataError(f"{path}: is not an ordinary file; write the log to one first")
        file = info.st_dev, info.st_ino
        if file in seen:
            raise DataError(f"{path}: is the same file as {seen[file]}; name each file once")
        seen[file] = path
    return in_order(list(inputs)) if order == "names" else list(inputs)


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

    A file of that very name is meant itself. Raises DataError for a pattern that nothing matches.
    """
    found: list[Path] = []
    for path in inputs:
        if path.exists() or not glob.has_magic(str(path)):
            found.append(path)
            continue
        matches = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not matches:
            raise DataError(f"{path}: no file matches; check the path")
        # Text and number take turns in the parts of a name.
        found += sorted(matches, key=lambda p: [int(s) if s.isdigit() else s for s in _parts(p)])
    return found


def _days_of(folder: Path) -> list[Path]:
    days = sorted((int(m[1]), path) for path in folder.iterdir() if (m := DAY_FILE.fullmatch(path.name)))
    if not days:
        raise DataError(f"{folder}: holds no day_0, day_1, ...; name the log files one by one")
    for (number, path), (next_number, twin) in pairwise(days):
        if number == next_number:
            raise DataError(f"{twin}: is the same day as {path}; name the log files one by one")
    return [path for _, path in days]


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


def _parts(path: Path) -> list[str]:
    """The absolute path without the suffixes of its name, cut at numbers: text, number, text, ..."""
    return re.split(r"(\d+)", re.sub(r"(\.[A-Za-z]+\d?)+$", "", os.path.abspath(path)))


def _name_without_numbers(path: Path) -> tuple[str, ...]:
    return tuple(_parts(path)[::2])


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in _parts(path)[1::2]]


def _says(path: Path, words: str) -> bool:
    return re.search(rf"(^|[^a-z])({words})([^a-z]|$)", path.name.lower()) is not None
