"""What gets a name is whole, and the disk holds it by then; errors of the system are told as they are."""

import errno
import os
import stat
from pathlib import Path

import pytest

from data_pipeline import synthetic
from data_pipeline.whole_files import copy_whole, new_file, remedy, sync, told, write_whole
from robe import cli

TINY = "--bottom 4 --width 2 --top 4 --batch 8"


class Disk:
    """Notes what is synced, and finds fault with names that are given too early."""

    def __init__(self, monkeypatch):
        self.held, self.unsafe, self.renamed = {}, set(), 0
        real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

        def fsync(descriptor):
            real["fsync"](descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.held[path.stat().st_ino] = self.state(path)
            self.unsafe.discard(path)

        def renaming(name):
            def rename(source, target):
                self.check(Path(source), Path(target))
                real[name](source, target)
                if not Path(target).name.startswith("."):
                    self.unsafe.add(Path(target).resolve().parent)

            return rename

        monkeypatch.setattr(os, "fsync", fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, renaming(name))

    @staticmethod
    def state(path):
        """What a sync has to see: the names of finished files in a folder, or what a file contains."""
        if path.is_dir():
            return sorted(
                p.name for p in path.iterdir() if not p.name.startswith(".") and "partial" not in p.name
            )
        return path.stat().st_size, path.stat().st_mtime_ns

    def check(self, source, target):
        self.renamed += 1
        needed = [source, *source.rglob("*")]
        if target.suffix == ".done":  # relies on the shards and columns beside it
            needed += [p for p in target.parent.rglob("*") if p.suffix not in (".partial", ".lock")]
            needed += [target.parent]
        log = target.parents[1] / "metrics.jsonl"
        if target.name.startswith("step_") and log.exists():
            needed.append(log)
        for path in needed:
            assert self.held.get(path.stat().st_ino) == self.state(path), (
                f"{target} relies on {path}, not synced"
            )


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to ask for names of open files")
def test_what_gets_a_name_is_synced_before_and_its_name_after(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SAMPLE_CHUNKS", 1)
    monkeypatch.chdir(tmp_path)
    disk = Disk(monkeypatch)
    for command, least in (
        ("synth --rows 60 --days 2 --out raw", 4),
        ("synth --rows 60 --days 2 --gzip --out packed", 4),
        ("prepare raw --out hash", 2 * 5 + 2),
        ("prepare raw --ids dictionary --out dictionary", 2 * (2 + 26 + 1) + 26 * 4 + 2 * 2 + 3),
        (f"train --data hash --block 2 {TINY} --baseline --out run", 20),
        (f"train --data dictionary --method full {TINY} --out run_full", 10),
        ("convert run_full --to int8 --out small", 4),
        ("predict run raw/day_0 --out predicted", 1),
    ):
        before = disk.renamed
        cli.main(command.split())
        assert disk.renamed - before >= least, command
        assert {path for path in disk.unsafe if path.exists()} == set(), command


def test_a_file_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "before")

    def fails(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="quota") as raised:
        write_whole(path, "after")
    assert told(raised.value) == f"{path}: Disk quota exceeded; make room"

    def interrupted():
        with new_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    for pid in (2**22 + 1, os.getppid(), "x"):
        (tmp_path / f".file.partial-{pid}").touch()
    write_whole(tmp_path / "file", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("file", f".file.partial-{os.getppid()}", ".file.partial-x")
    }


def test_a_copy_names_the_file_that_failed(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)))
    copy_whole(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
    for one, other, named in ((tmp_path, "a", tmp_path), (source, "none/a", tmp_path / "none" / "a")):
        with pytest.raises(OSError, match="directory") as raised:
            copy_whole(one, tmp_path / other)
        assert Path(raised.value.filename) == named


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_a_folder_need_not_be_able_to_sync(number, tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(number, "no")

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no"):
        sync(tmp_path / "file")
    if number == errno.EINVAL:
        sync(tmp_path)
    else:
        with pytest.raises(OSError, match="no"):
            sync(tmp_path)


def test_no_remedy_calls_a_file_damaged():
    for number in errno.errorcode:
        assert "damaged" not in remedy(OSError(number, "x"))
    assert told(OSError(errno.EMFILE, "Too many open files", "x")).startswith(
        "x: Too many open files; raise the"
    )
    assert told(OSError("1 requested and 0 written")) == (
        "the output: 1 requested and 0 written; check the path, the rights and the space"
    )
