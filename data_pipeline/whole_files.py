"""Files that appear whole, and that the disk holds before anything relies on them.

A file is written under another name, synced and renamed; then its folder, which holds the name, is synced.
So nobody finds half a file under its name, neither a reader nor who comes after a kill or a loss of power.
This module imports nothing of the project, so that every room can write by it.
"""

import errno
import glob
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room, or raise the limit on the size of files (`ulimit -f`)",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "wait until fewer files are open on this machine",
    errno.EACCES: "check the rights",
    errno.EPERM: "check the rights",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.EIO: "check the disk and its connection",
    errno.ESTALE: "check the disk and its connection",
}


def told(error: OSError) -> str:
    """What failed, why, and what to do, in one line."""
    return f"{error.filename or 'the output'}: {error.strerror or error}; {remedy(error)}"


def remedy(error: OSError) -> str:
    """What to do about an error of the system; it never says that a file is damaged."""
    return REMEDIES.get(error.errno or 0, "check the path, the rights and the space")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of reading, writing and syncing the name of the file; the system does not name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8; errors of the system name it. errors: of decoding, as `open` takes it."""
    with naming(path):
        if path.is_fifo():  # would be waited for without end
            raise OSError(errno.EINVAL, "a pipe, not a file")
        return path.read_text(encoding="utf-8", errors=errors)


def sync(path: Path) -> None:
    """Have the disk hold what a file contains, or the names in a folder."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, and one may write in a folder that one may not read.
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, and have the disk hold them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and all that lies in it, before it gets the name under which others look for it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def new_file(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which is synced and gets its name if all goes well.

    partial: its name until then; who gives one removes what a failure leaves there. By default nothing stays.

    The name is safe once the folder is synced, which is left to the caller, who may write more files.
    """
    unfinished = partial or path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if partial is None:
            remove_leftovers(path)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        if partial is None:
            with suppress(OSError):
                unfinished.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
            error.filename, error.filename2 = str(path), None
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole, and that the disk holds when this returns."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """`write_whole` of JSON as a person can read it."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """`write_whole` of a figure of Matplotlib, as PNG."""
    # Drawn in memory first: what draws straight to a file hides why a write failed.
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    write_whole(path, drawn.getvalue())


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file to one that appears whole."""
    with source.open("rb") as file, new_file(target) as copy:
        read = naming(source)(file.read)
        while piece := read(1 << 24):
            copy.write(piece)
    sync(target.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of a file or folder that they had not finished."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except (ValueError, PermissionError):
            pass  # not made here; or alive, and someone else's
        except ProcessLookupError:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with suppress(OSError):
                    leftover.unlink()
