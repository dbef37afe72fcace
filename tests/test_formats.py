"""Files as people have them: read where that is simple, else refused by their right name with a way on."""

import bz2
import gzip
import io
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest
from backports import zstd
from plain_parser import lines, write

from data_pipeline.formats import format_of
from data_pipeline.logs import count_rows, has_rows, read_log
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.proposal import propose
from data_pipeline.schema import CRITEO, DataError, Schema

OWN = Schema("own", "click", (), ("user",), ("string",))
CSV = b"click,user\n1,ann\n0,bob\n"
JSON = b'{"click": 1, "user": "ann"}\n{"user": "bob", "click": 0}\n'
LOG = b"\n".join(lines(300, seed=1)) + b"\n"
UTF16 = "click,user\n1,ann\n0,bob\n".encode("utf-16-le")


def archive(members):
    """A zip archive, as bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return file.getvalue()


def tar(mode="w", name="train.txt"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as out:
        info = tarfile.TarInfo(name)
        info.size = len(LOG)
        out.addfile(info, io.BytesIO(LOG))
    return file.getvalue()


def saved(frame, how):
    file = io.BytesIO()
    getattr(frame, how)(file)
    return file.getvalue()


def ids(path, schema):
    return np.concatenate([chunk.ids for chunk in read_log(path, schema)]).tolist()


SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0\x09\0\0\0"
PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    # A frame to be skipped, as pzstd writes it, and two of data.
    ".zst": lambda data: SKIPPED + zstd.compress(data[:20]) + zstd.compress(data[20:]),
    ".zip": lambda data: archive({"inner.csv": data}),
}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_logs_and_tables_are_read(tmp_path, suffix):
    plain = write(tmp_path / "plain", LOG.splitlines())
    packed = tmp_path / f"train.txt{suffix}"
    packed.write_bytes(archive({"train.txt": LOG}) if suffix == ".zip" else PACKED[suffix](LOG))
    assert format_of(packed) == "raw"
    assert ids(packed, CRITEO) == ids(plain, CRITEO)
    assert count_rows(packed) == 300
    positions = [chunk.position for chunk in read_log(packed, block_bytes=2000)]
    assert positions == sorted(positions)
    assert 0 < positions[0] <= positions[-1] <= packed.stat().st_size

    table = tmp_path / f"click.csv{suffix}"
    table.write_bytes(PACKED[suffix](CSV))
    assert format_of(table) == "csv"
    assert count_rows(table, OWN) == 2
    (tmp_path / "click.csv").write_bytes(CSV)
    assert ids(table, OWN) == ids(tmp_path / "click.csv", OWN)
    assert propose(table, 10).splitlines()[1:] == propose(tmp_path / "click.csv", 10).splitlines()[1:]


def test_contents_tell_the_format_and_not_the_name(tmp_path):
    """What is called .csv or has no suffix, and is Parquet, Arrow or packed."""
    frame = pl.DataFrame({"click": [1, 0], "user": ["ann", "bob"]})
    expected = None
    for name, data in {
        "own.csv": CSV,
        "own.data": CSV,
        "own": CSV.replace(b"\n", b"\r\n"),
        "own.txt": b"\xef\xbb\xbf" + CSV.replace(b",", b"\t"),
        "parquet.csv": saved(frame, "write_parquet"),
        "parquet": saved(frame, "write_parquet"),
        "arrow.parquet": saved(frame, "write_ipc"),
        "packed.csv": gzip.compress(CSV),
        "packed": archive({"own.csv": CSV}),
        "mac": archive({"own.csv": CSV, "__MACOSX/._own.csv": b"?"}),
        "own.jsonl": JSON,
        "own.json": JSON.replace(b"\n", b"\r\n"),
        "marked": b"\xef\xbb\xbf" + JSON,
        "own.ndjson.gz": gzip.compress(JSON),
    }.items():
        (tmp_path / name).write_bytes(data)
        found = ids(tmp_path / name, OWN)
        expected = expected or found
        assert found == expected, name
        assert count_rows(tmp_path / name, OWN) == 2, name
        assert "user" in propose(tmp_path / name, 10)


def test_a_mark_before_utf8_belongs_to_no_value(tmp_path):
    (tmp_path / "log").write_bytes(b"\xef\xbb\xbf" + LOG)
    (tmp_path / "plain").write_bytes(LOG)
    assert ids(tmp_path / "log", CRITEO) == ids(tmp_path / "plain", CRITEO)


REFUSED = {
    "dac.tar.gz": (tar("w:gz"), r"a tar archive in gzip; unpack it with `tar xf {}`"),
    "dac.tar.bz2": (tar("w:bz2"), r"a tar archive in bzip2; unpack it with `tar xf"),
    "dac.tar.xz": (tar("w:xz"), r"a tar archive in xz; unpack it with `tar xf"),
    "dac.tgz": (tar("w:gz"), r"a tar archive in gzip; unpack it with `tar xf"),
    "dac.tar": (tar(), r"a tar archive; unpack it with `tar xf"),
    "parquet.zst": (zstd.compress(b"PAR1" + bytes(99)), r"parquet in zstd; .* `zstd -dc {} > \S*parquet`"),
    "train.lz4": (b"\x04\x22\x4d\x18" + bytes(9), r"packed with LZ4; unpack it with `lz4 -dc {} > \S*train`"),
    "train.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(9), r"a 7-Zip archive; unpack it with `7z x"),
    "train.rar": (b"Rar!\x1a\x07\x01\0", r"a RAR archive; "),
    "train.Z": (b"\x1f\x9d\x90" + bytes(9), r"packed with compress; "),
    "two.zip": (archive({"a.txt": LOG, "b.txt": LOG}), r"a zip archive of 2 files \(a.txt, b.txt\); "),
    "none.zip": (archive({}), r"a zip archive of 0 files"),
    "sheet.xlsx": (archive({"[Content_Types].xml": b"", "xl/a.xml": b""}), r"an Excel workbook"),
    "sheet.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"an Excel workbook; save its sheet as CSV"),
    "a.npz": (archive({"ids.npy": b"\x93NUMPY"}), r"an archive of NumPy arrays"),
    "a.npy": (b"\x93NUMPY\x01\0", r"an array of NumPy; write it as Parquet"),
    "page.csv": (b"\n<!DOCTYPE html><html>", r"a web page, not data; the download failed, so fetch it again"),
    "page.parquet": (b"<html>\n", r"a web page, not data"),
    "page.gz": (gzip.compress(b"<html>\n"), r"a web page, not data in gzip; the download failed"),
    "error.csv": (b"<?xml version='1.0'?><Error><Code>AccessDenied", r"XML; if it tells of an error, "),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\n", r"a pointer of Git LFS.*`git lfs"),
    "pretty.jsonl": (b'{\n  "click": 1\n}\n', r"JSON; write it as Parquet"),
    "a.json.gz": (gzip.compress(b'[{"click": 1}]\n'), r"JSON in gzip; unpack it .* `gzip -dc {} >"),
    "a.json": (b'[{"click": 1}]\n', r"JSON; write it as Parquet"),
    "a.sqlite": (b"SQLite format 3\0" + bytes(99), r"an SQLite database; .*sqlite3"),
    "a.h5": (b"\x89HDF\r\n\x1a\n" + bytes(9), r"HDF5; write it as Parquet"),
    "a.pkl": (b"\x80\x04\x95\x0f\0", r"a Python pickle; .* if you trust it"),
    "a.arrows": (saved(pl.DataFrame({"a": [1]}), "write_ipc_stream"), r"a stream of Arrow; write it"),
    "a.avro": (b"Obj\x01\x04", r"Avro; "),
    "a.arff": (b"% iris\n@RELATION iris\n", r"ARFF; write it as CSV"),
    "parquet.gz": (gzip.compress(b"PAR1" + bytes(99)), r"parquet in gzip; unpack it .* `gzip -dc {}"),
    "twice.zip": (archive({"a.gz": gzip.compress(LOG)}), r"gzip in zip; unpack it first, with `unzip {}`"),
    "utf16.csv": (b"\xff\xfe" + UTF16, r"text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8 {}"),
    "big.csv": (b"\xfe\xff" + "click".encode("utf-16-be"), r"text in UTF-16"),
    "bare.csv": (UTF16, r"text in UTF-16"),
    "mac.csv": (CSV.replace(b"\n", b"\r"), r"text whose lines end as on old Macs; .*`tr '\\r' '\\n' < {}"),
    "mac.log": (LOG.replace(b"\n", b"\r"), r"text whose lines end as on old Macs"),
    "a.svm": (b"1 1:0.5 7:2 12:1e-3\n", r"in the format of libsvm; write it as a table"),
    "rank.svm": (b"2 qid:3 1:0.5 2:1 # doc\n", r"in the format of libsvm"),
    "a.ffm": (b"0 1:2:0.5 3:4:1\n", r"in the format of libffm; write it as a table"),
    "binary": (bytes(range(256)) + bytes(200), r"neither text nor of a known kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_called_by_its_name(tmp_path, name):
    data, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    match = f"^{re.escape(str(path))}: is " + message.replace("{}", re.escape(str(path)))
    for attempt in (
        lambda: next(read_log(path, OWN, bad_rows="skip")),
        lambda: next(read_log(path)),
        lambda: count_rows(path),
        lambda: propose(path, 10),
    ):
        with pytest.raises(DataError, match=match) as error:
            attempt()
        assert len(str(error.value).splitlines()) == 1
        assert "--bad-rows" not in str(error.value)


def test_the_first_lines_of_logs_and_tables_are_taken_for_nothing_else(tmp_path):
    for data in (
        LOG,
        CSV,
        b"0" + b"\t" * 39,
        b"1:2,3\n",
        b"BZh,b\n1,2\n",
        b"PK,b\n1,2\n",
        b"version,b\n1,2\n",
    ):
        (tmp_path / "a.csv").write_bytes(data)
        assert format_of(tmp_path / "a.csv") == "csv"


@pytest.mark.parametrize("name", ["a.json", "a.arrows", "utf16.csv", "mac.csv"])
def test_the_way_on_leads_to_a_table(tmp_path, name):
    """The command of the message is run; then the rows can be read."""
    path = tmp_path / name
    path.write_bytes(
        saved(pl.DataFrame({"click": [1, 0], "user": ["ann", "bob"]}), "write_ipc_stream")
        if name == "a.arrows"
        else b'[{"click": 1, "user": "ann"}]'
        if name == "a.json"
        else REFUSED[name][0]
    )
    with pytest.raises(DataError) as error:
        next(read_log(path, OWN))
    (command,) = re.findall(r"`([^`]*)`", str(error.value))
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment, cwd=tmp_path)
    (made,) = [other for other in tmp_path.iterdir() if other != path]
    assert ids(made, OWN)[0] == ids_of_ann(tmp_path)


def ids_of_ann(folder):
    (folder / "ann.csv").write_bytes(CSV)
    return ids(folder / "ann.csv", OWN)[0]


def test_a_damaged_packing_is_named(tmp_path):
    for suffix, name in (
        (".gz", "gzip"),
        (".xz", "xz"),
        (".zip", "zip"),
        (".bz2", "bzip2"),
        (".zst", "zstd"),
    ):
        whole = PACKED[suffix](LOG)
        path = tmp_path / f"log{suffix}"
        for data in (whole[: len(whole) // 2], whole[:60] + bytes(40) + whole[100:]):
            path.write_bytes(data)
            with pytest.raises(
                DataError, match=r"damaged after line \d+|unreadable after line \d+ \(Inv"
            ) as error:
                list(read_log(path))
            assert name in str(error.value) or suffix == ".bz2"
            assert len(str(error.value).splitlines()) == 1


def test_an_encrypted_archive_is_left_to_unzip(tmp_path):
    data = bytearray(archive({"train.txt": LOG}))
    for start in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[start] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"encrypted or packed in a rare way; unpack it with `unzip"):
        next(read_log(tmp_path / "a.zip"))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(DataError, match=rf"^{name}: is not an ordinary file; write the log to one first"):
            next(read_log(name, labelled=None))


def test_empty_parts_are_left_out_with_a_line(tmp_path, capsys):
    texts = lines(40, seed=3)
    files = [write(tmp_path / f"day_{day}", texts[20 * day :][:20]) for day in range(2)]
    empties = [tmp_path / name for name in ("a", "b.gz", "c.csv", "d.parquet", "e.bz2")]
    packed = [b"", gzip.compress(b""), b"label,int_0", b"", bz2.compress(b"")]
    for path, data in zip(empties, packed, strict=True):
        path.write_bytes(data)
    pl.DataFrame({"label": []}).write_parquet(empties[3])
    assert not any(has_rows(path, CRITEO) for path in empties)
    assert all(has_rows(path, CRITEO) for path in files)
    mixed = [empties[0], files[0], *empties[1:4], files[1], empties[4]]
    manifest = prepare(PrepareConfig(tuple(mixed), tmp_path / "out"))
    assert [day.rows for day in manifest.days] == [20, 20]
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == sorted(f"{path}: empty, so it is left out and is no day" for path in empties)
    plain = prepare(PrepareConfig(tuple(files), tmp_path / "plain"))
    assert [day.sha256 for day in plain.days] == [day.sha256 for day in manifest.days]


def test_text_that_is_not_utf8_says_what_it_may_be(tmp_path):
    (tmp_path / "own.csv").write_bytes("click,user\n1,张三\n".encode("gbk"))
    with pytest.raises(DataError, match=r"row 1 \(line 2\): not UTF-8 text; if it is GBK, `iconv -f GBK"):
        next(read_log(tmp_path / "own.csv", OWN))
    (tmp_path / "own.csv").write_bytes("click,名\n1,a\n".encode("gbk"))
    with pytest.raises(DataError, match=r"own.csv, line 1: not UTF-8 text; if it is GBK, `iconv -f GBK"):
        next(read_log(tmp_path / "own.csv", OWN))


def test_a_table_that_was_taken_for_a_raw_log(tmp_path):
    (tmp_path / "train.txt").write_bytes(CSV)
    with pytest.raises(DataError, match=r"line 1: .*if it is the header of a table, give .* --schema"):
        next(read_log(tmp_path / "train.txt"))
