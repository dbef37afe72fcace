"""Folders that appear whole or not at all."""

import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.schema import DataError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_free(out: Path) -> None:
    """Raise DataError if `out` cannot become a new folder: it must not exist, or be an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; remove it, or choose another with --out")
    if out.exists() and (os.path.ismount(out) or out.samefile(".")):
        raise DataError(f"{out}: is a mount point or the working directory; choose a folder in it with --out")


@contextmanager
def appearing(out: Path, share_done: Callable[[], float]) -> Iterator[Path]:
    """A folder to write, which becomes `out` if all goes well, and else is removed.

    share_done: the share of the work done so far, to tell how much room the whole would need. Raises
    DataError if the folder cannot be made or the disk is full.
    """
    check_free(out)
    out = out.resolve()
    _remove_leftovers(out)
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None
    try:
        yield temporary
        try:
            temporary.rename(out)
        except OSError as error:
            raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        written = sum(path.stat().st_size for path in temporary.glob("*"))
        free = shutil.disk_usage(out.parent).free + written
        # Some of what was read is not written yet, so more may be needed.
        share = share_done()
        needed = f"at least {written / share:,.0f} bytes are" if share > 0 else "more space is"
        raise DataError(
            f"{out}: {error.strerror}; {needed} needed and {free:,} bytes were free; make room, or choose "
            "another folder with --out"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what processes that were killed left of this folder."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        pid = int(leftover.name.rpartition("-")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            pass  # alive, and someone else's
