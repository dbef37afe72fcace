"""Folders that one process uses at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.whole_files import make_folder, naming
from robe.errors import RobeError


class FileError(RobeError):
    """A file or folder that cannot be written."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder; raises FileError if another process does. A process that dies lets go."""
    make_folder(folder)
    with (lock := folder / ".lock").open("w") as file:
        try:
            with naming(lock):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(
                f"{folder}: another process is training in it; wait, or choose another --out"
            ) from None
        yield
