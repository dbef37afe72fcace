"""Folders that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.schema import DataError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_free(out: Path) -> None:
    """Raise DataError if `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; remove it, or choose another with --out")


@contextmanager
def appearing(out: Path, share_done: Callable[[], float]) -> Iterator[Path]:
    """A folder to write, which becomes `out` if all goes well, and else is removed.

    share_done: the share of the work done so far, to tell how much room the whole would need. Raises
    DataError if the disk is full or the folder cannot be written.
    """
    check_free(out)
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None
    try:
        yield temporary
        temporary.rename(out)
    except OSError as error:
        if error.errno not in FULL:
            raise
        written = sum(path.stat().st_size for path in temporary.glob("*"))
        free = shutil.disk_usage(out.parent).free + written
        share = share_done()
        needed = f"about {written / share:,.0f} bytes are" if share > 0 else "more space is"
        raise DataError(
            f"{out}: {error.strerror}; {needed} needed and {free:,} bytes were free; make room, or choose "
            "another folder with --out"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
