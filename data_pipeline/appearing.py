"""New folders that appear only when they are whole, whether they are made at once or in several attempts."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.schema import DataError
from data_pipeline.stores import require_disk
from data_pipeline.whole_files import (
    FULL,
    make_folder,
    naming,
    read_text,
    remedy,
    remove_leftovers,
    sync,
    sync_tree,
    write_json,
)

SETTINGS = "settings.json"


def check_free(out: Path) -> None:
    """Raise DataError if `out` cannot become a new folder: it must not exist, or be an empty folder."""
    require_disk(out, "folders are written")
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
    remove_leftovers(out)
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
    out: Path,
    settings: dict,
    share_done: Callable[[], float],
    parts: list[str] | None = None,
    late: Collection[str] = (),
) -> Iterator[Path]:
    """The folder `.OUT.partial` beside `out`, in which `out` is made bit by bit; `finish` makes `out` of it.

    It stays if this process ends early, so that another can go on. What belongs to `out` goes to `data/` in
    it. What is done is noted in `*.done` files, and files that are not whole yet are called by their
    `partial_name`. If an error ends the `with` block and nothing is done yet, the folder is removed. Locks,
    which end with their process, keep other processes out.

    settings: must be those that the folder was begun with; others begin anew where nothing is done yet.
    late: names of those settings that matter only once a feature is numbered, or dense columns are measured,
        and may change until then.
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
                _settle(work, settings, late, exclusive=parts is None)
                yield work
        except BaseException:
            for part in ["*"] if parts is None else parts:
                for begun in work.rglob(f"{part}_*.partial"):
                    begun.unlink(missing_ok=True)
            if parts is None and not any(work.glob("*.done")):
                shutil.rmtree(work, ignore_errors=True)
            raise


def work_folder(out: Path) -> Path:
    """The folder in which `resuming` makes `out`."""
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def finish(work: Path, out: Path) -> None:
    """Make `out` appear, and remove the rest of `work`."""
    _rename(work / "data", out.resolve())
    # What an error or a kill leaves of it does no harm: without `data`, the next preparation clears it.
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        sync(work.parent)


def read_note(path: Path) -> dict[str, Any] | None:
    """What is noted in a file of a work folder; None if there is none. Raises DataError if it is damaged."""
    try:
        found = json.loads(read_text(path)) if path.exists() else None
        if not isinstance(found, dict | None):
            raise ValueError("no object")
        return found
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} to begin again") from None


def partial_name(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f"{path.name}.partial")


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
                with naming(path):
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                # Another process may have removed the folder after the file was opened.
                mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except (BlockingIOError, FileNotFoundError):
                mine = False
            if not mine:
                raise DataError(f"{out}: another process is preparing it; wait, or choose another --out")
        yield


def _settle(work: Path, settings: dict, late: Collection[str], exclusive: bool) -> None:
    """Note these settings; raise DataError if what is done in the folder was done with others.

    exclusive: no other process can be at work in it, so what is of no use there may be removed.
    """
    path, settings = work / SETTINGS, json.loads(json.dumps(settings))
    with (lock := work / "settings.lock").open("a") as file:
        with naming(lock):
            fcntl.flock(file, fcntl.LOCK_EX)
        begun = read_note(path) or {}
        numbered = any((*work.glob("feature_*.done"), *work.glob("measured.done")))
        changed = [name for name, value in settings.items() if begun.get(name) != value]
        wrong = [name for name in changed if begun and (numbered or name not in late)]
        # What a finished preparation no longer needed, or what was begun with other settings and not done.
        useless = not (work / "data").exists() or (wrong and not any(work.glob("*.done")))
        if exclusive and useless:
            _clear(work)
        elif wrong:
            raise DataError(
                f"{work}: was begun with {wrong[0]} {begun.get(wrong[0])}, not {settings[wrong[0]]}; go on "
                "with the same settings, remove this folder, or choose another --out"
            )
        (work / "data").mkdir(exist_ok=True)
        if changed or not path.exists():
            write_json(path, settings)


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()


def _make(folder: Path, out: Path) -> None:
    try:
        make_folder(folder)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None


def _rename(folder: Path, out: Path) -> None:
    sync_tree(folder)
    try:
        folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; choose another folder with --out") from None
    try:
        sync(out.parent)
    except OSError:
        out.rename(folder)  # the command fails, so nothing may have appeared
        raise


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
            f"{out}: {error.strerror}; {needed} needed and {free:,} bytes were free; {remedy(error)}, or "
            "choose another folder with --out"
        ) from None
