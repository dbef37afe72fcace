import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from plain_parser import lines, parse, write

from data_pipeline import parse_days, shard_files
from data_pipeline.appearing import appearing, partial_name
from data_pipeline.batches import raw_batches
from data_pipeline.dialects import DICTIONARY, Dictionary, encoder
from data_pipeline.folders import against_published, verify
from data_pipeline.logs import read_log
from data_pipeline.manifest import MANIFEST, Day, Ids, Manifest, shard_name
from data_pipeline.parse_days import REJECTED
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import CRITEO, DataError


def days(folder, sizes, suffix=""):
    """One file of valid lines per size; returns the files and their lines."""
    folder.mkdir(exist_ok=True)
    texts = [lines(size, seed=seed) for seed, size in enumerate(sizes)]
    return tuple(write(folder / f"day_{day}{suffix}", part) for day, part in enumerate(texts)), texts


def run(inputs, out, **options):
    return prepare(PrepareConfig(tuple(inputs), out, **options))


def shards(manifest, kind):
    """The shards of all days; mapped by plain NumPy, as other programs would."""
    return [np.load(manifest.folder / shard_name(d, kind), mmap_mode="r") for d in range(len(manifest.days))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def number(rows, training):
    """The ids of rows by dicts, learnt from the first `training` rows; and the dicts."""
    known = [{} for _ in CRITEO.categorical]
    for row in rows[:training]:
        for value, ids in zip(row, known, strict=True):
            ids.setdefault(value, len(ids) + 1)
    return [[ids.get(value, 0) for value, ids in zip(row, known, strict=True)] for row in rows], known


def assert_folder(manifest, texts, dialect):
    """Compare a folder with the plain parser: `texts` are the lines of each day."""
    rows = [parse(line) for line in chain(*texts)]
    label, dense, ids = (list(column) for column in zip(*rows, strict=True))
    sizes = [len(part) for part in texts]
    if dialect == "dictionary":
        ids, known = number(ids, training=sum(sizes[:-1]))
        assert manifest.ids.exact
        assert manifest.ids.cardinalities == tuple(len(values) + 1 for values in known)
    else:
        assert manifest.ids.exact == all(len(set(column)) < 4096 for column in zip(*ids, strict=True))
        for count, column in zip(manifest.ids.cardinalities, zip(*ids, strict=True), strict=True):
            distinct = len(set(column))
            assert count == distinct if distinct < 4096 else abs(count / distinct - 1) < 5 / 4094**0.5
    assert manifest.ids.dialect == dialect

    assert [day.rows for day in manifest.days] == sizes
    assert [shard.shape for shard in shards(manifest, "labels")] == [(size, 1) for size in sizes]
    found = {kind: np.concatenate(shards(manifest, kind)) for kind in ("labels", "dense", "sparse")}
    assert {kind: array.dtype for kind, array in found.items()} == {
        "labels": np.int32, "dense": np.float32, "sparse": np.int32
    }  # fmt: skip
    assert found["labels"][:, 0].tolist() == label
    assert found["dense"].tolist() == dense
    assert found["sparse"].view(np.uint32).tolist() == ids
    verify(manifest.folder)


@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_several_files(tmp_path, dialect, suffix):
    files, texts = days(tmp_path / "raw", [40, 30, 25], suffix)
    manifest = run(files, tmp_path / "out", ids=dialect)
    assert_folder(manifest, texts, dialect)
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.schema == CRITEO
    assert manifest.dense_transform == "log1p"
    assert [day.source for day in manifest.days] == [str(file) for file in files]
    assert manifest.synthetic is None
    assert manifest.split == {
        "train": ((0, 0, 40), (1, 0, 30)),
        "test": ((2, 0, 13),),
        "validation": ((2, 13, 25),),
    }
    assert "first half" in manifest.split_note
    names = {MANIFEST} | {shard_name(d, kind) for d in range(3) for kind in ("labels", "dense", "sparse")}
    assert contents(tmp_path / "out").keys() == names | ({DICTIONARY} if dialect == "dictionary" else set())


@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
def test_a_single_file_is_cut_into_days(tmp_path, dialect):
    texts = lines(45, seed=1)
    manifest = run([write(tmp_path / "log", texts)], tmp_path / "out", ids=dialect)
    starts = [0, 7, 14, 21, 27, 33, 39, 45]
    assert_folder(manifest, [texts[a:b] for a, b in pairwise(starts)], dialect)
    assert manifest.split["test"] == ((6, 0, 3),)
    assert manifest.days[1].source == f"{tmp_path / 'log'}, block 2 of 7"


def test_a_folder_is_taken_in_the_order_of_its_days(tmp_path):
    files, texts = days(tmp_path / "raw", [3] * 11)
    files[10].rename(tmp_path / "raw" / "day_10.txt")
    files[2].write_bytes(write(tmp_path / "raw" / "gone.gz", texts[2]).read_bytes())
    files[2].rename(tmp_path / "raw" / "day_2.gz")
    write(tmp_path / "raw" / "day_0_notes", [b"no log"])
    assert_folder(run([tmp_path / "raw"], tmp_path / "out"), texts, "hash")


@pytest.mark.skipif("ROBE_SAMPLE_DIR" not in os.environ, reason="ROBE_SAMPLE_DIR names no folder of samples")
@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
@pytest.mark.parametrize("name", ["criteo_kaggle_10k.txt", "criteo_tb_day_0_10k.txt"])
def test_real_rows(tmp_path, dialect, name):
    log = Path(os.environ["ROBE_SAMPLE_DIR"], name)
    texts = log.read_bytes().splitlines()
    manifest = run([log], tmp_path / "out", ids=dialect, blocks=4)
    assert_folder(manifest, [texts[a : a + 2500] for a in range(0, 10_000, 2500)], dialect)


@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
@pytest.mark.parametrize("block_bytes", [1, 3000])
def test_neither_blocks_nor_gzip_change_a_byte(tmp_path, monkeypatch, dialect, block_bytes):
    texts = lines(60, seed=2)
    log = write(tmp_path / "log", texts)
    run([log], tmp_path / "out", ids=dialect)
    run([log], tmp_path / "again", ids=dialect)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    monkeypatch.setattr(parse_days, "read_log", partial(read_log, block_bytes=block_bytes))
    run([log], tmp_path / "blocks", ids=dialect)
    assert contents(tmp_path / "blocks") == contents(tmp_path / "out")
    # With the same name, so that the manifests are equal too.
    log.write_bytes(write(tmp_path / "log.gz", texts).read_bytes())
    run([log], tmp_path / "gzip", ids=dialect)
    assert contents(tmp_path / "gzip") == contents(tmp_path / "out")


def test_progress_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(parse_days, "read_log", partial(read_log, block_bytes=1000))
    files, _ = days(tmp_path / "raw", [40, 30])
    calls = []
    for inputs, total in (
        (files, sum(file.stat().st_size for file in files)),
        (files[:1], 2 * files[0].stat().st_size),  # counted first
    ):
        calls.clear()
        prepare(PrepareConfig(inputs, tmp_path / f"out{len(inputs)}"), lambda *call: calls.append(call))
        assert len(calls) > 4
        assert calls == sorted(calls)
        assert {whole for _, whole in calls} == {total}
        assert calls[-1][0] == total


def test_the_dictionary_can_be_applied_to_raw_rows(tmp_path):
    files, texts = days(tmp_path / "raw", [40, 30])
    manifest = run(files, tmp_path / "out", ids="dictionary")
    dictionary = Dictionary.load(manifest)
    (chunk,) = read_log(files[1])
    np.testing.assert_array_equal(dictionary.encode(chunk.ids), shards(manifest, "sparse")[1])
    _, known = number([parse(line)[2] for line in texts[0]], training=40)
    saved = np.load(tmp_path / "out" / DICTIONARY)
    assert saved.dtype == np.uint32
    assert saved.tolist() == list(chain(*known))


def test_a_changed_or_missing_dictionary_is_refused(tmp_path):
    files, _ = days(tmp_path / "raw", [40, 30])
    with pytest.raises(DataError, match="has no dictionary; prepare it with --ids dictionary"):
        Dictionary.load(run(files, tmp_path / "hash"))
    manifest = run(files, tmp_path / "out", ids="dictionary")
    path = tmp_path / "out" / DICTIONARY
    values = np.load(path)
    np.save(path, values[::-1])
    for attempt in (lambda: Dictionary.load(manifest), lambda: verify(tmp_path / "out")):
        with pytest.raises(DataError, match=rf"{DICTIONARY}: is not the one the manifest describes"):
            attempt()
    for other in (values[:-1], values.astype(np.int32), np.uint32(7)):
        np.save(path, other)
        with pytest.raises(DataError, match=rf"{DICTIONARY}: (does not hold the .* values|damaged)"):
            Dictionary.load(manifest)
    # An array that no memory holds, and headers at which Python's own parser gives up.
    with path.open("wb") as file:
        header = {"descr": "<u4", "fortran_order": False, "shape": (1 << 40,)}
        np.lib.format.write_array_header_1_0(file, header)
    for content in (path.read_bytes(), *(b"\x93NUMPY\1\0\0\x20" + text * 8192 for text in (b"(", b"\n"))):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{DICTIONARY}: damaged .*; prepare the data again$"):
            Dictionary.load(manifest)
    path.unlink()
    with pytest.raises(DataError, match=rf"{DICTIONARY}: not found"):
        Dictionary.load(manifest)


@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
def test_bad_lines_are_left_out_and_listed(tmp_path, dialect):
    files, texts = days(tmp_path / "raw", [10, 12, 14])
    write(files[0], [b"one", *texts[0]])
    write(files[1], [*texts[1][:5], b"\xff\t\t", b"", *texts[1][5:]])
    manifest = run(files, tmp_path / "out", ids=dialect, bad_rows="skip")
    assert_folder(manifest, texts, dialect)
    assert [day.rejected for day in manifest.days] == [1, 2, 0]
    assert (tmp_path / "out" / REJECTED).read_bytes().splitlines() == [
        f"{files[0]}\t1\t1 columns instead of 40\tone".encode(),
        f"{files[1]}\t6\tnot UTF-8 text\t".encode() + b"\xff\t\t",
        f"{files[1]}\t7\tblank line\t".encode(),
    ]


def test_a_single_file_is_cut_by_lines_good_or_bad(tmp_path):
    texts = lines(20, seed=3)
    bad = {0, 4, 5, 19}
    log = write(tmp_path / "log", [b"bad" if i in bad else text for i, text in enumerate(texts)])
    manifest = run([log], tmp_path / "out", bad_rows="skip", blocks=4)
    good = [[texts[i] for i in range(start, start + 5) if i not in bad] for start in (0, 5, 10, 15)]
    assert_folder(manifest, good, "hash")
    assert [day.rejected for day in manifest.days] == [2, 1, 0, 1]


def fails(tmp_path, match, *inputs, error=DataError, progress=None, done=(), **options):
    """Preparing fails with one line and leaves nothing behind but these days that are done."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match) as raised:
        prepare(PrepareConfig(inputs, tmp_path / "out", **options), progress)
    work = tmp_path / ".out.partial"
    if done:
        assert {path.name for path in work.glob("*.done")} == {f"day_{day}.done" for day in done}
        assert not list(work.rglob("*.partial"))
        shutil.rmtree(work)
    assert sorted(tmp_path.iterdir()) == before
    assert error is not DataError or len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "blank line"),
        (b"1\t2", "2 columns instead of 40"),
        (b"\xff", "not UTF-8 text"),
        (b"1" + b"\t" * 38 + b"x\t", "41 columns instead|cat_24 is 'x', not a number of up to 8 hex digits"),
        (b"1\t0.5" + b"\t" * 38, "int_0 is '0.5', not an integer"),
        (b"3" + b"\t" * 39, "label is '3', not 0 or 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, dialect, suffix, bad, reason):
    files, texts = days(tmp_path / "raw", [10, 10], suffix)
    write(files[1], [*texts[1][:7], bad, *texts[1][7:]])
    match = rf"day_1{suffix}, line 8: ({reason}).*; .*--bad-rows skip$"
    fails(tmp_path, match, *files, ids=dialect, done=[0])
    fails(tmp_path, match, files[1], ids=dialect)


def test_a_damaged_gzip_is_named(tmp_path):
    files, _ = days(tmp_path / "raw", [10, 200], ".gz")
    files[1].write_bytes(files[1].read_bytes()[:-100])
    fails(tmp_path, r"day_1.gz: gzip damaged after line 0 ", *files, bad_rows="skip", done=[0])


def test_inputs_that_cannot_be_used(tmp_path):
    files, _ = days(tmp_path / "raw", [10, 10])
    empty, none = write(tmp_path / "empty", []), tmp_path / "none"
    none.mkdir()
    link = tmp_path / "link"
    link.symlink_to(files[0])
    fails(tmp_path, "no input: name one log file per day")
    fails(tmp_path, "missing: No such file or directory; check the path", files[0], tmp_path / "missing")
    fails(tmp_path, "missing: No such file or directory; check the path", tmp_path / "missing")
    fails(tmp_path, "raw: is a folder; name log files, or one folder alone", files[0], tmp_path / "raw")
    fails(tmp_path, "none: holds no day_0, day_1, ..., nor Parquet files; name the log files", none)
    fails(tmp_path, "empty: empty, there is no line 1", files[0], empty, done=[0])
    fails(tmp_path, "empty: empty, there is no line 1", empty)
    fails(tmp_path, "day_0: is the same file as .*day_0; name each file once", files[0], files[1], files[0])
    fails(tmp_path, "link: is the same file as .*day_0; name each file once", files[0], link)
    fails(tmp_path, "a single file cannot be 1 days; give --blocks 2 or more", files[0], blocks=1)
    (tmp_path / "raw" / "day_1.gz").write_bytes(files[1].read_bytes())
    fails(tmp_path, "day_1.gz: is the same day as .*day_1; name the log files", tmp_path / "raw")


def test_every_split_needs_rows(tmp_path):
    files, _ = days(tmp_path / "raw", [4, 1])
    fails(
        tmp_path, "day_1: 1 usable rows, but each day needs 1 and the last 2; give more", *files, done=[0, 1]
    )
    fails(tmp_path, "day_0, block 5 of 7: 0 usable rows, .* or cut the file into fewer --blocks", files[0])
    write(files[1], [b"bad"] * 5)
    given = {"input_order": "given", "bad_rows": "skip"}
    fails(tmp_path, "day_1: 0 usable rows", files[1], files[0], done=[1], **given)
    run(files[:1], tmp_path / "enough", blocks=2)


def test_a_folder_in_use_is_not_touched(tmp_path):
    files, texts = days(tmp_path / "raw", [3, 2])
    out = tmp_path / "out"
    out.mkdir()
    assert_folder(run(files, out), texts, "hash")
    before = contents(out)
    fails(tmp_path, "out: exists and is not an empty folder; remove it, or choose another", *files)
    assert contents(out) == before
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        run(files, files[0])


def test_a_folder_that_cannot_be_made(tmp_path):
    files, _ = days(tmp_path / "raw", [3, 2])
    with pytest.raises(DataError, match="Not a directory; choose another folder with --out"):
        run(files, files[0] / "out")


def test_an_interruption_leaves_nothing(tmp_path):
    files, _ = days(tmp_path / "raw", [3, 2])

    def interrupt(*_):
        assert (tmp_path / ".out.partial").exists()
        raise KeyboardInterrupt

    fails(tmp_path, None, *files, error=KeyboardInterrupt, progress=interrupt)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(tmp_path, monkeypatch):
    """Every write to /dev/full fails as on a full disk."""
    files, _ = days(tmp_path / "raw", [300, 300])

    def full(path):
        return Path("/dev/full") if "sparse" in path.name or "raw" in path.name else partial_name(path)

    monkeypatch.setattr(shard_files, "partial_name", full)
    # By the first error the first file has been read, and of the first day all but the ids are written.
    match = rf"out: {os.strerror(errno.ENOSPC)}; at least {{:,}} bytes are needed and [\d,]+ bytes were free"
    size, other = (file.stat().st_size for file in files)
    needed = (2 * 128 + 300 * 14 * 4) * (size + other) / size
    fails(tmp_path, match.format(round(needed)), *files)
    needed = 2 * 128 + 43 * 14 * 4  # the file is small: all of it has been read
    fails(tmp_path, match.format(needed), files[0], ids="dictionary")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    files, _ = days(tmp_path / "raw", [3, 2])

    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, "nobody listens")

    fails(tmp_path, "nobody listens", *files, error=BrokenPipeError, progress=closed)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (flip, "its bytes are not those that were written; prepare the data again"),
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    ],
)
@pytest.mark.parametrize("kind", ["labels", "dense", "sparse"])
def test_verify_names_the_broken_shard(tmp_path, kind, harm, match):
    files, _ = days(tmp_path / "raw", [3, 2])
    assert verify(run(files, tmp_path / "out").folder).folder == tmp_path / "out"
    harm(tmp_path / "out" / f"day_1_{kind}.npy")
    with pytest.raises(DataError, match=rf"day_1_{kind}\.npy: {match}"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "value", "options"),
    [
        ("labels", 2, {}),
        ("dense", np.float32("nan").view(np.int32), {}),
        ("sparse", 7, {"ids": "modulo", "max_ind_range": 7}),
        ("sparse", -1, {"ids": "dictionary"}),
    ],
)
def test_verify_looks_at_the_values(tmp_path, kind, value, options):
    files, _ = days(tmp_path / "raw", [300, 200])
    manifest = run(files, tmp_path / "out", **options)
    shard = np.load(tmp_path / "out" / shard_name(1, kind))
    shard.view(np.int32)[150, -1] = value
    np.save(tmp_path / "out" / shard_name(1, kind), shard)
    changed = Day(200, {**manifest.days[1].sha256, kind: hashlib.sha256(shard).hexdigest()}, "")
    dataclasses.replace(manifest, days=(manifest.days[0], changed)).save(tmp_path / "out")
    with pytest.raises(DataError, match=rf"day_1_{kind}\.npy: row 150 holds what no {kind} may be"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("modulus", [None, 1000])
@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("order", ["first", "count"])
def test_dictionaries_by_plain_python(tmp_path, monkeypatch, modulus, min_count, order):
    """Thresholds, ties, and values modulo something, from raw files to shards, in many pieces."""
    monkeypatch.setattr(shard_files, "PIECE", 29)
    files, texts = days(tmp_path / "raw", [40, 30, 25])
    options = {"max_ind_range": modulus, "min_count": min_count, "order": order}
    manifest = run(files, tmp_path / "out", ids="dictionary", **options)
    ids = [[value % (modulus or 2**32) for value in parse(line)[2]] for line in chain(*texts)]
    columns = []
    for column, report in zip(zip(*ids, strict=True), manifest.features, strict=True):
        counts = Counter(column[:70])
        kept = [value for value, count in counts.items() if count >= min_count]
        if order == "count":
            kept.sort(key=lambda value: (-counts[value], value))
        known = {value: number for number, value in enumerate(kept, 1)}
        columns.append([known.get(value, 0) for value in column])
        assert (report["distinct"], report["kept"]) == (len(counts), len(kept))
        assert report["rare_rows"] == sum(count for count in counts.values() if count < min_count)
    found = np.concatenate(shards(manifest, "sparse")).view(np.uint32)
    assert found.T.tolist() == columns
    assert manifest.ids == Ids(
        "dictionary", tuple(f["kept"] + 1 for f in manifest.features), True, modulus, min_count, order
    )
    (chunk,) = read_log(files[2])
    np.testing.assert_array_equal(encoder(manifest)(chunk.ids), shards(manifest, "sparse")[2])
    verify(manifest.folder)


def test_ids_modulo_and_dense_values_as_they_are(tmp_path):
    files, texts = days(tmp_path / "raw", [40, 30])
    manifest = run(files, tmp_path / "out", ids="modulo", max_ind_range=1000, dense="none")
    rows = [parse(line) for line in chain(*texts)]
    found = np.concatenate(shards(manifest, "sparse"))
    assert found.tolist() == [[value % 1000 for value in ids] for _, _, ids in rows]
    assert manifest.ids == Ids("modulo", (1000,) * 26, True, 1000)
    distinct = [{"distinct": len(set(column))} for column in found.T.tolist()]
    assert manifest.features == tuple(distinct)
    raw = [[np.float32(int(text or 0)) for text in line.decode().split("\t")[1:14]] for line in chain(*texts)]
    assert np.concatenate(shards(manifest, "dense")).tolist() == raw
    batch = next(raw_batches(files[0], manifest, 40))
    np.testing.assert_array_equal(batch.ids, shards(manifest, "sparse")[0])
    np.testing.assert_array_equal(batch.dense, shards(manifest, "dense")[0])


def test_what_values_mean_is_part_of_the_fingerprint(tmp_path):
    files, _ = days(tmp_path / "raw", [40, 30])
    dialects = [
        {},
        {"dense": "none"},
        {"ids": "modulo", "max_ind_range": 1000},
        {"ids": "modulo", "max_ind_range": 1001},
        {"ids": "dictionary"},
        {"ids": "dictionary", "order": "count"},
        # The same values, but what the dictionary is asked for is not the same.
        {"ids": "dictionary", "max_ind_range": 2**32 - 1, "order": "count"},
    ]
    found = [run(files, tmp_path / str(i), **options).fingerprint() for i, options in enumerate(dialects)]
    assert len(set(found)) == len(dialects)


def test_settings_that_do_not_go_together(tmp_path):
    files, _ = days(tmp_path / "raw", [4, 3])
    for match, options in (
        ("--ids modulo: needs --max-ind-range", {"ids": "modulo"}),
        ("--max-ind-range: not with --ids hash", {"max_ind_range": 9}),
        ("--max-ind-range 0: must be from 1 to 4294967295", {"ids": "modulo", "max_ind_range": 0}),
        ("--max-ind-range 4294967296: must be", {"ids": "dictionary", "max_ind_range": 2**32}),
        ("--min-count 0: must be at least 1", {"ids": "dictionary", "min_count": 0}),
        ("--min-count and --order: are of dictionaries", {"min_count": 2}),
        ("--min-count and --order: are of dictionaries", {"order": "count"}),
        ("--days 0-2: give days from 0 to 1, like", {"days": "0-2"}),
        ("--days 1-0: give days", {"days": "1-0"}),
        ("--days x: give days", {"days": "x"}),
    ):
        fails(tmp_path, match, *files, **options)


def test_lines_are_compared_with_those_published(tmp_path):
    files, _ = days(tmp_path / "raw", [4, 3])
    manifest = run(files, tmp_path / "out")
    assert against_published(manifest) is None
    whole = Day(195_841_980, {}, "/a/day_0.gz", 3), Day(199_563_535, {}, "/a/day_1.gz")
    assert "lines of 2 days: as published" in against_published(dataclasses.replace(manifest, days=whole))
    cut = dataclasses.replace(manifest, days=(whole[0], Day(199_563_534, {}, "day_1")))
    assert against_published(cut).startswith("day_1: 199,563,534 lines, but Criteo Terabyte has 199,563,535")


def test_what_the_generator_knows_is_kept(tmp_path):
    files, texts = days(tmp_path / "raw", [6, 5])

    def scores(number):
        return {"rows": number, "auc": number / 8, "log_loss": number / 9, "base_rate": 0.25}

    def describe():
        """What a generator that wrote the files as they are says of them."""
        parts = ("all", "first_half", "second_half")
        figures = {
            file.name: {"bytes": file.stat().st_size}
            | {part: scores(number + 3 * day) for number, part in enumerate(parts)}
            for day, file in enumerate(files)
        }
        (tmp_path / "raw" / "synthetic.json").write_text(json.dumps({"note": "made up", "files": figures}))

    describe()
    generator = {"note": "made up"}
    halves = {"test": scores(4), "validation": scores(5)}
    assert run(files, tmp_path / "all").synthetic == {"generator": generator, "bayes": halves}
    # The figures are those of files, not of the blocks of one file ...
    assert run(files[1:], tmp_path / "one", blocks=2).synthetic == {"generator": generator, "bayes": None}
    # ... nor of rows of which one was rejected, unless that is in a day of training.
    write(files[0], [b"bad", *texts[0]])
    describe()
    first = run(files, tmp_path / "train", bad_rows="skip")
    assert first.synthetic == {"generator": generator, "bayes": halves}
    write(files[1], [*texts[1], b"bad"])
    describe()
    last = run(files, tmp_path / "last", bad_rows="skip")
    assert last.synthetic == {"generator": generator, "bayes": None}


def test_what_the_generator_says_of_other_files_is_not_believed(tmp_path):
    files, texts = days(tmp_path / "raw", [6, 5])
    figures = {"day_0": {"bytes": files[0].stat().st_size}}
    (tmp_path / "raw" / "synthetic.json").write_text(json.dumps({"files": figures}))
    fails(tmp_path, "day_1: is not what .*synthetic.json describes; keep synthetic files apart", *files)
    real = files[1].rename(tmp_path / "raw" / "real")
    assert run([real], tmp_path / "one", blocks=2).synthetic is None
    write(files[0], texts[0][:5])
    fails(tmp_path, "day_0: is not what .*synthetic.json describes", files[0], blocks=2)


def test_a_broken_description_of_the_generator(tmp_path):
    files, _ = days(tmp_path / "raw", [6, 5])
    half = {"rows": 5, "auc": "high", "log_loss": 0.5, "base_rate": 0.2}
    figures = {f.name: {"bytes": f.stat().st_size, "first_half": half, "second_half": half} for f in files}
    for text in ("{", "[]", '{"files": {"day_0": {}, "day_1": {}}}', json.dumps({"files": figures})):
        (tmp_path / "raw" / "synthetic.json").write_text(text)
        fails(tmp_path, r"synthetic\.json: not what the generator writes", *files)


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(tmp_path, monkeypatch):
    files, _ = days(tmp_path / "raw", [6, 5])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(DataError, match="is a mount point or the working directory"):
        prepare(PrepareConfig(tuple(files), Path(".")))
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(DataError, match="mount point"):
        prepare(PrepareConfig(tuple(files), tmp_path / "mounted"))


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    files, _ = days(tmp_path / "raw", [6, 5])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(files, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Manifest.load(tmp_path / "real").rows("train") == 6


def test_what_a_killed_process_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [f".out.partial-{gone.pid}", f".out.partial-{os.getppid()}"]
    for name in names:
        (tmp_path / name).mkdir()
    with appearing(tmp_path / "out", lambda: 0.0):
        pass
    assert [(tmp_path / name).exists() for name in names] == [False, True]
