"""New folders that appear only when they are whole, whether they are made at once or in several attempts."""

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.schema import DataError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SETTINGS = "settings.json"


def check_free(out: Path) -> None:
    """Raise DataError if `out` cannot become a new folder: it must not exist, or be an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; remove it, or choose another with --out")
    if out.exists() and (os.path.ismount(out) or out.samefile(".")):
        raise DataError(f"{out}: is a mount point or the working directory; choose a folder in it with --out")


@contextmanager
def appearing(out: Path, share_done: Callable[[], float]) -> Iterator[Path]:
    """A folder to write, which becomes `out` if all goes well, and else is removed.

    share_done: returns the share of the work done so far, from 0 to 1; if the disk is full, the error tells
        from it how much space the whole would need.

    Raises DataError if the folder cannot be made or the disk is full.
    """
    check_free(out)
    out = out.resolve()
    _remove_leftovers(out)
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    _make(temporary, out)
    try:
        with _told_if_full(out, temporary, share_done):
            yield temporary
            _rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def resuming(
    out: Path, settings: dict, share_done: Callable[[], float], parts: list[str] | None = None
) -> Iterator[Path]:
    """The folder `.OUT.partial` beside `out`, in which `out` is made bit by bit; `finish` makes `out` of it.

    It stays if this process ends early, so that another can go on. What belongs to `out` goes to `data/` in
    it. What is done is noted in `*.done` files, and files that are not whole yet are called by their
    `partial_name`. If an error ends the `with` block and nothing is done yet, the folder is removed. Locks,
    which end with their process, keep other processes out.

    settings: must be those that the folder was begun with.
    share_done: as in `appearing`.
    parts: names of the parts of the work that this process does; others may do others at the same time.

    Raises DataError if the settings differ, another process is at work, the folder cannot be made, or the
    disk is full.
    """
    check_free(out)
    out = out.resolve()
    work = work_folder(out)
    with _locked(work, out, parts):
        check_free(out)
        try:
            with _told_if_full(out, work, share_done):
                (work / "data").mkdir(exist_ok=True)
                _settle(work, settings)
                yield work
        except BaseException:
            for part in ["*"] if parts is None else parts:
                for begun in work.rglob(f"{part}_*.partial"):
                    begun.unlink()
            if parts is None and not any(work.glob("*.done")):
                shutil.rmtree(work)
            raise


def work_folder(out: Path) -> Path:
    """The folder in which `resuming` makes `out`."""
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def finish(work: Path, out: Path) -> None:
    """Make `out` appear, and remove the rest of `work`."""
    _rename(work / "data", out.resolve())
    shutil.rmtree(work)


def partial_name(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f"{path.name}.partial")


def write_whole(path: Path, data: dict) -> None:
    """Write JSON to a file that appears when it is whole."""
    partial = partial_name(path.with_name(f"{path.name}.{os.getpid()}"))
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


@contextmanager
def _locked(work: Path, out: Path, parts: list[str] | None) -> Iterator[None]:
    locks = [("all", fcntl.LOCK_EX)]
    if parts is not None:
        locks = [("all", fcntl.LOCK_SH), *((part, fcntl.LOCK_EX) for part in parts)]
    with ExitStack() as stack:
        _make(work, out)
        for name, kind in locks:
            try:
                path = work / f"{name}.lock"
                file = stack.enter_context(path.open("a"))
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                # Another process may have removed the folder after the file was opened.
                mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except (BlockingIOError, FileNotFoundError):
                mine = False
            if not mine:
                raise DataError(f"{out}: another process is preparing it; wait, or choose another --out")
        yield


def _settle(work: Path, settings: dict) -> None:
    """Note these settings in a new folder; raise DataError if one was begun with others."""
    path, settings = work / SETTINGS, json.loads(json.dumps(settings))
    with (work / "settings.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            write_whole(path, settings)
    begun = json.loads(path.read_text())
    for name, value in settings.items():
        if begun.get(name) != value:
            raise DataError(
                f"{work}: was begun with {name} {begun.get(name)}, not {value}; go on with the same "
                "settings, remove this folder, or choose another --out"
            )


def _make(folder: Path, out: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None


def _rename(folder: Path, out: Path) -> None:
    try:
        folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None


@contextmanager
def _told_if_full(out: Path, folder: Path, share_done: Callable[[], float]) -> Iterator[None]:
    """Raise DataError instead of the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        written = sum(path.stat().st_size for path in folder.rglob("day_*"))
        free = shutil.disk_usage(out.parent).free + written
        # Some of what was read is not written yet, so more may be needed than this estimate.
        share = share_done()
        needed = f"at least {written / share:,.0f} bytes are" if share > 0 else "more space is"
        raise DataError(
            f"{out}: {error.strerror}; {needed} needed and {free:,} bytes were free; make room, or choose "
            "another folder with --out"
        ) from None


def _remove_leftovers(out: Path) -> None:
    """Remove the unfinished folders that killed processes left."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        pid = int(leftover.name.rpartition("-")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            pass  # alive, and someone else's
