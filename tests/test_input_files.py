"""Which files a preparation reads, in which order, and that they may not change meanwhile."""

import os
import random
from pathlib import Path

import pytest
from plain_parser import lines, write

from data_pipeline.input_files import in_order, input_files
from data_pipeline.job import PrepareConfig
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.schema import DataError


def paths(text):
    return [Path(name) for name in text.split()]


@pytest.mark.parametrize(
    ("listed", "meant"),
    [
        ("day_0 day_1 day_10 day_11 day_2 day_9", "day_0 day_1 day_2 day_9 day_10 day_11"),
        # As shells sort in most languages, which pass over punctuation.
        ("day_10.gz day_1.gz day_2.gz", "day_1.gz day_2.gz day_10.gz"),
        ("log.1.txt log.10.txt log.2.txt", "log.1.txt log.2.txt log.10.txt"),
        ("1/log 10/log 2/log", "1/log 2/log 10/log"),
        ("2026-1-10.csv 2026-1-9.csv 2026-10-1.csv 2026-2-1.csv",
         "2026-1-9.csv 2026-1-10.csv 2026-2-1.csv 2026-10-1.csv"),
        ("day_10.gz day_11 day_9", "day_9 day_10.gz day_11"),
        ("extra part10.csv part2.csv", "extra part2.csv part10.csv"),
        ("part-00000.parquet part-00001.parquet", "part-00000.parquet part-00001.parquet"),
        ("monday tuesday friday", "monday tuesday friday"),
        ("b2.csv a1.csv", "b2.csv a1.csv"),
        ("train.csv test.csv", "train.csv test.csv"),
        ("test_10.csv test_9.csv", "test_9.csv test_10.csv"),
    ],
)  # fmt: skip
def test_files_are_sorted_by_the_numbers_in_their_names(listed, meant):
    assert in_order(paths(listed)) == paths(meant)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("day_2 day_1 day_0", "day_2: comes before day_0, against the numbers in their names"),
        ("day_0 day_2 day_10 day_1", "day_2: comes before day_1, against"),
        ("extra part_2 part_1", "part_2: comes before part_1, against"),
        ("test.csv train.csv", "test.csv: comes before train.csv, but the last file tests"),
        ("a_train.csv b_valid.csv c_train.csv", "b_valid.csv: comes before c_train.csv"),
    ],
)
def test_an_order_that_names_contradict_is_refused(listed, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = tuple(paths(listed))
    for number, path in enumerate(files):
        path.write_text(str(number))
    with pytest.raises(DataError, match=words) as refused:
        input_files(files)
    assert "--input-order given" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert input_files(files, "given") == list(files)


def test_the_file_that_tests_is_told(tmp_path):
    files = [write(tmp_path / f"day_{day}", lines(8, seed=day)) for day in range(12)]
    listed = tuple(sorted(files))
    assert listed[-1].name == "day_9"
    manifest = prepare(PrepareConfig(listed, tmp_path / "out"))
    assert [Path(day.source).name for day in manifest.days] == [f"day_{day}" for day in range(12)]
    told = f"; test: rows 1 to 4 of {files[11]}, validation: rows 5 to 8 of {files[11]}"
    assert manifest.describe().endswith(told)
    days = prepare(PrepareConfig(listed, tmp_path / "days", split="test=4-9,validation=10-11"))
    told = f"; test: {files[4]} and 4 more days and {files[9]}, validation: {files[10]} and {files[11]}"
    assert days.describe().endswith(told)


def appended(path):
    with open(path, "ab") as file:
        file.write(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def rewritten(path):
    """Other bytes, as many of them; the clock of a file system may be coarse, so the time is set."""
    info, text = path.stat(), path.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(text)
    with open(path, "r+b") as file:
        file.write(b"".join(text))
    assert path.stat().st_size == info.st_size
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [appended, cut_short, rewritten])
@pytest.mark.parametrize("count", [1, 3])
def test_a_file_that_changes_while_it_is_read_is_refused(change, count, tmp_path):
    files = tuple(write(tmp_path / f"day_{day}", lines(60, seed=day)) for day in range(count))
    config = PrepareConfig(files, tmp_path / "out", blocks=4)
    changed = []

    def progress(done, total):
        # Of one file, once its rows were counted; of several, while the first is read.
        if not changed and done >= (files[0].stat().st_size if count == 1 else 1):
            changed.append(change(files[0]))

    with pytest.raises(DataError, match=r"day_0: has changed while it was read; give the same command again"):
        prepare(config, progress)
    assert changed
    assert not (tmp_path / "out").exists()
    # What the file holds now, without a line that was cut, is prepared by the same command.
    files[0].write_bytes(files[0].read_bytes().rpartition(b"\n")[0] + b"\n")
    prepare(config)
    rows = len(files[0].read_bytes().splitlines())
    assert sum(day.rows for day in Manifest.load(tmp_path / "out").days) == rows + 60 * (count - 1)
