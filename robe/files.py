"""Files that appear whole, and folders that one process uses at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robe.errors import RobeError


class FileError(RobeError):
    """A file or folder that cannot be written."""


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder; raises FileError if another process does. A process that dies lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(
                f"{folder}: another process is training in it; wait, or choose another --out"
            ) from None
        yield
