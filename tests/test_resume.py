"""Preparing that is ended by whatever means goes on and ends in the same bytes; alone, or with others."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from plain_parser import lines, write

from data_pipeline import appearing, parse_days
from data_pipeline.appearing import resuming
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import DataError

ROOT = Path(__file__).parents[1]
KINDS = {
    "plain": {},
    "gz": {},
    "dictionary": {"ids": "dictionary", "min_count": 2, "dense": "quantile"},
    "single": {"bad_rows": "skip", "blocks": 4},
}

# Prepares, and kills itself at the moment given: at the n-th file opened, renamed or removed in its folder,
# or block read. Prints how many there were.
CHILD = """
import json, os, signal, sys
from functools import partial
from pathlib import Path
from data_pipeline import parse_days, prepare as module

inputs, out, options, moment = json.loads(sys.argv[1])
moments = 0

def tick(*_):
    global moments
    moments += 1
    if moments == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def audit(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.rmdir") and f"{out}." in str(arguments[0]):
        tick()

out_name = Path(out).name
out = str(Path(out).with_name(f".{out_name}"))
sys.addaudithook(audit)
parse_days.read_log = partial(parse_days.read_log, block_bytes=3000)
config = module.PrepareConfig(tuple(map(Path, inputs)), Path(out).with_name(out_name), **options)
module.prepare(config, tick)
print(moments)
"""


def child(inputs, out, options, moment=0):
    arguments = json.dumps([[str(path) for path in inputs], str(out), options, moment])
    command = [sys.executable, "-c", CHILD, arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logs(folder, kind="plain"):
    """Four days, or one file with a few bad lines."""
    folder.mkdir()
    if kind == "single":
        texts = lines(200, seed=1)
        for place in (3, 60, 149, 150):
            texts.insert(place, b"bad")
        return (write(folder / "log", texts),)
    suffix = ".gz" if kind == "gz" else ""
    return tuple(write(folder / f"day_{day}{suffix}", lines(60, seed=day)) for day in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_ten_moments(tmp_path, kind):
    inputs, options = logs(tmp_path / "raw", kind), KINDS[kind]
    whole = child(inputs, tmp_path / "whole", options)
    moments = int(whole.communicate()[0])
    assert moments > 50
    draw = random.Random(kind)
    outs = [tmp_path / f"out{n}" for n in range(4 if kind == "single" else 10)]
    killed = [child(inputs, out, options, draw.randint(1, moments)) for out in outs]
    for process in killed:
        process.communicate()
        assert process.returncode == -9
    expected = contents(tmp_path / "whole")
    going_on = 0
    for out in outs:
        if not out.exists():
            going_on += any((tmp_path / f".{out.name}.partial").glob("day_*.done"))
            prepare(PrepareConfig(inputs, out, **options))
        assert contents(out) == expected
    assert going_on >= len(outs) // 3, "hardly any moment at which a day was done: nothing is tested"


def test_a_day_that_is_done_is_not_read_again(tmp_path):
    inputs = logs(tmp_path / "raw")
    prepare(PrepareConfig(inputs, tmp_path / "whole"))
    write(inputs[2], [*lines(60, seed=2), b"bad"])
    with pytest.raises(DataError, match="day_2, line 61"):
        prepare(PrepareConfig(inputs, tmp_path / "out"))
    write(inputs[2], lines(60, seed=2))
    (tmp_path / ".out.partial" / "data" / "day_0_dense.npy").write_bytes(b"")  # but this one is
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial" / "data").iterdir()}
    prepare(PrepareConfig(inputs, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for name, written in shards.items():
        if name.startswith(("day_0", "day_1")):
            same = (tmp_path / "out" / name).stat().st_mtime_ns == written
            assert same == name.startswith("day_1"), name


def stopped(tmp_path, inputs, **options):
    """A preparation that has done two days and has met a bad line."""
    text = inputs[2].read_bytes()
    inputs[2].write_bytes(text + b"bad\n")
    with pytest.raises(DataError, match="day_2, line 61"):
        prepare(PrepareConfig(inputs, tmp_path / "out", **options))
    inputs[2].write_bytes(text)


def test_other_settings_do_not_go_on(tmp_path):
    inputs = logs(tmp_path / "raw")
    stopped(tmp_path, inputs)
    for options, match in (
        (
            {"ids": "dictionary"},
            r"out\.partial: was begun with ids hash, not dictionary; .*remove this folder",
        ),
        ({"dense": "none"}, "dense log1p, not none"),
        ({"inputs": inputs[::-1], "input_order": "given"}, "was begun with inputs"),
    ):
        with pytest.raises(DataError, match=match):
            prepare(PrepareConfig(**{"inputs": inputs, "out": tmp_path / "out", **options}))
    # What to do with bad lines may change.
    prepare(PrepareConfig(inputs, tmp_path / "out", bad_rows="skip"))


def test_days_with_lines_left_out_are_not_taken_over(tmp_path):
    inputs = logs(tmp_path / "raw")
    write(inputs[0], [b"bad", *lines(60, seed=0)])
    (tmp_path / "raw" / "gone").write_bytes(inputs[3].read_bytes())
    inputs[3].write_bytes(b"bad\n")
    with pytest.raises(DataError, match="day_3: 0 usable rows"):
        prepare(PrepareConfig(inputs, tmp_path / "out", bad_rows="skip"))
    with pytest.raises(DataError, match=r"day_0, line 1: .*--bad-rows skip"):
        prepare(PrepareConfig(inputs, tmp_path / "out"))
    write(inputs[3], lines(60, seed=3))
    manifest = prepare(PrepareConfig(inputs, tmp_path / "out", bad_rows="skip"))
    assert [day.rejected for day in manifest.days] == [1, 0, 0, 0]


def test_a_changed_source_is_refused(tmp_path):
    inputs = logs(tmp_path / "raw")
    stopped(tmp_path, inputs)
    write(inputs[1], lines(59, seed=1))
    with pytest.raises(
        DataError, match=r"day_1: has changed since day 1 was .*remove .*out\.partial to begin"
    ):
        prepare(PrepareConfig(inputs, tmp_path / "out"))
    shutil.rmtree(tmp_path / ".out.partial")
    prepare(PrepareConfig(inputs, tmp_path / "out"))


def test_a_changed_source_of_the_same_size_is_refused(tmp_path):
    inputs = logs(tmp_path / "raw")
    stopped(tmp_path, inputs)
    text = inputs[1].read_bytes()
    write(inputs[1], text.splitlines()[::-1])
    assert inputs[1].stat().st_size == len(text)
    with pytest.raises(DataError, match="day_1: has changed since day 1"):
        prepare(PrepareConfig(inputs, tmp_path / "out"))


def test_a_shard_has_its_name_once_it_is_whole(tmp_path, monkeypatch):
    inputs, seen = logs(tmp_path / "raw"), []
    monkeypatch.setattr(parse_days, "read_log", partial(parse_days.read_log, block_bytes=3000))

    def look(*_):
        for path in (tmp_path / ".out.partial").rglob("day_*.np*"):
            seen.append(path.suffix)
            assert path.suffix == ".partial" or len(np.load(path))

    prepare(PrepareConfig(inputs, tmp_path / "out"), look)
    assert {".npy", ".partial"} <= set(seen)


def test_the_remedy_for_too_few_rows_works_beside_what_they_left(tmp_path):
    log = write(tmp_path / "log", lines(4, seed=1))
    few = PrepareConfig((log,), tmp_path / "out")
    for mend in ("fewer blocks", "more rows"):
        with pytest.raises(DataError, match="give more rows, or cut the file into fewer --blocks"):
            prepare(few)
        if mend == "fewer blocks":
            prepare(PrepareConfig((log,), tmp_path / "out", blocks=2))
            shutil.rmtree(tmp_path / "out")
    write(log, lines(14, seed=1))
    assert len(prepare(few).days) == 7

    days = write(tmp_path / "day_0", lines(4, seed=1)), write(tmp_path / "day_1", lines(1, seed=2))
    with pytest.raises(DataError, match=r"day_1: 1 usable rows, .* give more rows$"):
        prepare(PrepareConfig(days, tmp_path / "days"))
    write(days[1], lines(2, seed=2))
    assert [day.rows for day in prepare(PrepareConfig(days, tmp_path / "days")).days] == [4, 2]


@pytest.mark.parametrize("ids", ["hash", "dictionary"])
def test_what_only_numbering_needs_may_change_until_it_begins(ids, tmp_path):
    inputs = logs(tmp_path / "raw")
    stopped(tmp_path, inputs, ids=ids)
    parsed = (tmp_path / ".out.partial" / "day_0.done").stat().st_mtime_ns
    changed = {"ids": ids, "split": "torchrec"} | ({"min_count": 2} if ids == "dictionary" else {})
    write(inputs[3], [b"bad"])
    with pytest.raises(DataError, match="day_3, line 1"):
        prepare(PrepareConfig(inputs, tmp_path / "out", **changed))
    assert (tmp_path / ".out.partial" / "day_0.done").stat().st_mtime_ns == parsed
    write(inputs[3], lines(60, seed=3))
    prepare(PrepareConfig(inputs, tmp_path / "out", **changed))
    prepare(PrepareConfig(inputs, tmp_path / "whole", **changed))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_which_rows_train_is_settled_once_dense_columns_are_measured(tmp_path, monkeypatch):
    inputs = logs(tmp_path / "raw")

    def killed(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("data_pipeline.prepare.scale_days", killed)
    with pytest.raises(OSError, match="Input/output"):
        prepare(PrepareConfig(inputs, tmp_path / "out", dense="zscore"))
    with pytest.raises(DataError, match="was begun with split mlperf, not torchrec"):
        prepare(PrepareConfig(inputs, tmp_path / "out", dense="zscore", split="torchrec"))


def test_other_settings_begin_anew_where_a_kill_left_nothing_done(tmp_path):
    inputs = logs(tmp_path / "raw")
    with resuming(tmp_path / "out", {"inputs": "others"}, lambda: 0.0) as work:
        (work / "data" / "day_9_dense.npy").write_bytes(b"of others")
    prepare(PrepareConfig(inputs, tmp_path / "out"))
    prepare(PrepareConfig(inputs, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_left_of_a_finished_preparation_is_not_gone_on_with(tmp_path, monkeypatch):
    """It lacks the shards that the folder took along."""
    inputs, config = logs(tmp_path / "raw"), {"ids": "dictionary"}
    monkeypatch.setattr(appearing.shutil, "rmtree", lambda *_, **__: None)
    prepare(PrepareConfig(inputs, tmp_path / "out", **config))
    monkeypatch.undo()
    assert list((tmp_path / ".out.partial").glob("joined_*.done"))
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    prepare(PrepareConfig(inputs, tmp_path / "out", **config))
    assert contents(tmp_path / "out") == expected
    assert not (tmp_path / ".out.partial").exists()


def test_a_folder_whose_name_cannot_be_synced_has_not_appeared(tmp_path, monkeypatch):
    inputs = logs(tmp_path / "raw")

    def fails(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(appearing, "sync", fails)
    with pytest.raises(OSError, match="Input/output"):
        prepare(PrepareConfig(inputs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    prepare(PrepareConfig(inputs, tmp_path / "out"))


def test_damaged_notes_are_told_in_a_line(tmp_path):
    inputs = logs(tmp_path / "raw")
    stopped(tmp_path, inputs)
    work = tmp_path / ".out.partial"
    for note in ("settings.json", "day_0.done"):
        whole = (work / note).read_bytes()
        for text in (whole[:-3], b"[1]", b"\xff"):
            (work / note).write_bytes(text)
            with pytest.raises(DataError, match=rf"{note}: damaged \(.*\); remove .*out\.partial to begin"):
                prepare(PrepareConfig(inputs, tmp_path / "out"))
        (work / note).write_bytes(whole)
    prepare(PrepareConfig(inputs, tmp_path / "out"))


def test_two_on_one_folder(tmp_path):
    inputs = logs(tmp_path / "raw")
    config = PrepareConfig(inputs, tmp_path / "out")
    match = "out: another process is preparing it; wait, or choose another --out"
    # A lock belongs to the open file, so the same process is refused as another would be.
    for held, refused in ((None, (None, "0", "0-3")), (["day_1"], (None, "0-1"))):
        with resuming(tmp_path / "out", {}, lambda: 0.0, held):
            for days in refused:
                with pytest.raises(DataError, match=match):
                    prepare(PrepareConfig(inputs, tmp_path / "out", days=days))
        shutil.rmtree(tmp_path / ".out.partial")
    prepare(config)


def test_a_lock_on_a_folder_that_was_finished_is_no_lock(tmp_path, monkeypatch):
    """It is given to whoever opened the file before it was removed with the folder."""
    import fcntl

    def finished_meanwhile(file, kind):
        shutil.rmtree(tmp_path / ".out.partial")

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    with pytest.raises(DataError, match="another process"), resuming(tmp_path / "out", {}, lambda: 0.0):
        raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
def test_days_by_several_processes(tmp_path, kind):
    inputs, options = logs(tmp_path / "raw", kind), KINDS[kind]
    prepare(PrepareConfig(inputs, tmp_path / "whole", **options))
    both = [child(inputs, tmp_path / "out", options | {"days": days}) for days in ("0,3", "1-2")]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.partial").glob("day_*.done"))) == 4
    prepare(PrepareConfig(inputs, tmp_path / "out", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# What Open MPI wants to be told of a container, and of more processes than cores.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def require_mpiexec():
    """The command that starts processes; the test is skipped where there is none."""
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).with_name("mpiexec")
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    if command is None:
        pytest.skip("no mpiexec")
    return command


def mpiexec(ranks, *arguments, program=(ROOT / "run.py",), **environment):
    command = [require_mpiexec(), "-n", ranks, sys.executable, *program, *arguments]
    environment = os.environ | OPEN_MPI | {name: str(value) for name, value in environment.items()}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kind", ["plain", "dictionary", "single"])
def test_ranks(tmp_path, kind):
    inputs = logs(tmp_path / "raw", kind)
    prepare(PrepareConfig(inputs, tmp_path / "whole", **KINDS[kind]))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in KINDS[kind].items()]
    done = mpiexec(2, "prepare", *inputs, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("criteo data; rows:") == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert Manifest.load(tmp_path / "out").rows("train") > 100


def test_what_stops_one_rank_stops_all(tmp_path):
    inputs = logs(tmp_path / "raw")
    write(inputs[3], [b"bad"])
    done = mpiexec(2, "prepare", *inputs, "--out", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "day_3, line 1" in done.stderr
