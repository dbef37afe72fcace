"""Folders of Parquet files, which may be partitioned as Hive does it: `date=2024-01-01/part-0.parquet`.

All files below a folder, in the order of their paths, are one log. What the names of folders say, `date`
here, are columns of it.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from data_pipeline.stores import Stored

NOTHING = "__HIVE_DEFAULT_PARTITION__"  # what Hive calls a missing value


def parts_of(path: Path) -> list[str]:
    """The absolute path without the suffixes of its name, cut at numbers: text, number, text, ..."""
    return re.split(r"(\d+)", re.sub(r"(\.[A-Za-z]+\d?)+$", "", os.path.abspath(path)))


def by_number(path: Path) -> list[int | str]:
    """What sorts paths by the numbers in them, in which text and number take turns."""
    return [int(part) if part.isdecimal() else part for part in parts_of(path)]


def files_of(path: Path) -> list[Path]:
    """The files of a log: the Parquet files below a folder, but for hidden ones; else the file itself."""
    if not path.is_dir():
        return [path]
    inside = path.objects if isinstance(path, Stored) else path.rglob("*.parquet")
    found = (
        file
        for file in inside
        if file.suffix == ".parquet"
        and not any(part[0] in "._" for part in file.relative_to(path).parts)
        and file.is_file()
    )
    return sorted(found, key=by_number)


def size_of(path: Path) -> int | None:
    """The bytes of a log; None where a store does not tell."""
    return None if isinstance(path, Stored) else sum(file.stat().st_size for file in files_of(path))


def is_partition(path: Path) -> bool:
    """Whether a path is that of a folder called `key=value`."""
    return "=" in path.name and path.is_dir()


def key_of(partition: Path) -> str:
    return partition.name.partition("=")[0]


def values_of(file: Path) -> dict[str, str | None]:
    """What the folders on the way to a file say of its rows, by key; None for a missing value."""
    pairs = (part.split("=", 1) for part in file.parts[:-1] if "=" in part)
    return {key: None if value == NOTHING else unquote(value) for key, value in pairs}
