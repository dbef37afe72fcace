import gzip
import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_parser import lines, parse, write

from data_pipeline.formats import BINARY, BOM, _unreadable
from data_pipeline.logs import count_rows, read_log
from data_pipeline.raw import _Layout
from data_pipeline.schema import DataError, Schema

SMALL = Schema("small", "label", ("d0", "d1"), ("c0", "c1"))
NAMES = ["log", "log.gz"]


def read(path, *args, **options):
    """All chunks of a file joined: (line, label, dense, ids)."""
    chunks = list(read_log(path, *args, **options))
    return tuple(
        None if parts[0] is None else np.concatenate(parts)
        for parts in ([getattr(c, name) for c in chunks] for name in ("line", "label", "dense", "ids"))
    )


def assert_rows(found, expected):
    """Compare (line, label, dense, ids) with the oracle's rows [(line, (label, logs, ids)), ...] exactly."""
    line, label, dense, ids = found
    assert line.tolist() == [number for number, _ in expected]
    if label is None:
        assert all(row[0] is None for _, row in expected)
    else:
        assert label.dtype == np.int32
        assert label.tolist() == [row[0] for _, row in expected]
    assert dense.dtype == np.float32
    assert dense.tolist() == [row[1] for _, row in expected]
    assert ids.dtype == np.uint32
    assert ids.tolist() == [row[2] for _, row in expected]


def oracle(texts, *args):
    return [(number, parse(text, *args)) for number, text in enumerate(texts, 1)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_bytes", [1, 250, 5000, 1 << 24])
def test_rows_are_those_of_the_plain_parser(tmp_path, name, block_bytes):
    texts = lines(150, seed=1)
    path = write(tmp_path / name, texts)
    assert_rows(read(path, block_bytes=block_bytes), oracle(texts))
    assert count_rows(path) == 150


def test_arrays_are_laid_out_row_by_row(tmp_path):
    (chunk,) = read_log(write(tmp_path / "log", lines(5, seed=2)))
    assert chunk.dense.flags.c_contiguous
    assert chunk.ids.flags.c_contiguous


def test_a_chunk_holds_about_a_block(tmp_path):
    path = write(tmp_path / "log", texts := lines(200, seed=3))
    longest = max(map(len, texts)) + 1
    chunks = list(read_log(path, block_bytes=4000))
    assert sum(len(chunk.line) for chunk in chunks) == 200
    assert all(sum(len(texts[n - 1]) + 1 for n in chunk.line) < 4000 + longest for chunk in chunks)
    positions = [chunk.position for chunk in chunks]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_line_ends(tmp_path, end, last_end):
    texts = lines(20, seed=4)
    path = tmp_path / "log"
    path.write_bytes(end.join(texts) + end * last_end)
    assert_rows(read(path, block_bytes=1000), oracle(texts))
    assert count_rows(path) == 20


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("digits", range(9))
@pytest.mark.parametrize("end", [b"", b"\r", b"\n"])
def test_a_log_that_ends_within_a_value(tmp_path, digits, end, block_bytes):
    """What lacks digits and the newline may have been cut short; a missing value is as good as any."""
    texts = [text.rpartition(b"\t")[0] + b"\t0123abcd" for text in lines(3, seed=4)]
    texts[-1] = texts[-1][: len(texts[-1]) - 8 + digits]
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(texts) + end)
    if digits in (0, 8) or end == b"\n":
        assert_rows(read(path, block_bytes=block_bytes), oracle(texts))
        return
    assert_rows(read(path, bad_rows="skip", block_bytes=block_bytes), oracle(texts[:-1]))
    with pytest.raises(DataError, match=rf"log, line 3: .*'{'0123abcd'[:digits]}'; .* end it with a newline"):
        read(path, block_bytes=block_bytes)


def test_gzip_of_several_members(tmp_path):
    texts = lines(20, seed=5)
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(b"\n".join(texts[:10])) + gzip.compress(b"\n" + b"\n".join(texts[10:])))
    assert_rows(read(path), oracle(texts))


def test_a_log_without_labels(tmp_path):
    texts = [text[2:] for text in lines(20, seed=6)]
    path = write(tmp_path / "log", texts)
    expected = oracle(texts, 13, 26, False)
    assert_rows(read(path, labelled=False), expected)
    assert_rows(read(path, labelled=None), expected)
    with pytest.raises(DataError, match=r"log, line 1: 39 columns instead of 40; .*--bad-rows skip"):
        read(path)


def test_the_first_line_tells_whether_there_are_labels(tmp_path):
    texts = lines(20, seed=7)
    unlabelled = [text.partition(b"\t")[2] for text in texts]
    for written in (texts, unlabelled):
        found = read(write(tmp_path / "log", written), labelled=None)
        assert_rows(found, oracle(unlabelled, 13, 26, False))
    with pytest.raises(DataError, match=r"wide, line 1: 41 columns; give 40, or 39 if there is no label"):
        read(write(tmp_path / "wide", [texts[0] + b"\t"]), labelled=None)


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_a_label_that_is_not_needed_may_be_anything(tmp_path, block_bytes):
    labels = [b"", b"2", b"-1", b"0.5", b"True", b"?", b"\x0b~\x7f", b"not one", b"1"]
    texts = [text.partition(b"\t")[2] for text in lines(len(labels), seed=8)]
    path = write(tmp_path / "log", [b"\t".join(pair) for pair in zip(labels, texts, strict=True)])
    expected = oracle(texts, 13, 26, False)
    del expected[labels.index(b"not one")]
    assert_rows(read(path, labelled=None, bad_rows="skip", block_bytes=block_bytes), expected)
    with pytest.raises(DataError, match=r"line 8: label is 'not one', .*such lines with --bad-rows skip$"):
        read(path, labelled=None)


# Separated by commas; \u0661 is a digit, but not of ours.
DENSE_TEXTS = ',0,-1,+1,007,-0,--1,-,1-,1e3,1.0,1., 1,1 ,1_0,0x1,a,"1",\u0661'.split(",")
DENSE_TEXTS += ["9223372036854775807", "9" * 18, "1" + "0" * 18, "-" + "9" * 19, "0" * 40 + "5"]
ID_TEXTS = ',0,ff,FFffFFff,100000000,00000000f,-1,-0,+1,0x1,1_0,g, a,"a",a\r,\x00,é,NA'.split(",")
fields = {
    "label": st.sampled_from(["0", "1"] * 8 + ["", "2", "00", "-0", "+1", "01", "1.0", "a", "\ufeff1"]),
    "dense": st.sampled_from(DENSE_TEXTS) | st.integers(-(2**70), 2**70).map(str) | st.just("5"),
    "id": st.sampled_from(ID_TEXTS) | st.text("0123456789abcdefABCDEF", max_size=9) | st.just("5"),
}
rows = st.tuples(*(fields[kind] for kind in ("label", "dense", "dense", "id", "id")))
good_rows = st.sampled_from(["0\t1\t\tff\t", "1\t-2\t3\t0\tABCDEF01"])
nasty_lines = (
    rows.map("\t".join).map(str.encode)
    | good_rows.map(str.encode)
    | st.text("01-+af\t\r \"'#,;", max_size=12).map(str.encode)
    | st.binary(max_size=8).map(lambda line: line.replace(b"\n", b""))
    | good_rows.map(lambda line: line.encode() + b"\xff")
)


@settings(deadline=None)
@given(st.lists(nasty_lines, min_size=1, max_size=5))
def test_exactly_the_lines_of_the_plain_parser_are_accepted(tmp_path_factory, texts):
    assume(not texts[0].startswith((b"\x1f\x8b", *BINARY)))  # that is gzip, or a table
    assume(_unreadable(b"\n".join([*texts, b""])) is None)  # such as JSON, which is refused as a whole
    path = write(tmp_path_factory.getbasetemp() / "nasty", texts)
    # A carriage return before the newline belongs to the end of the line; a mark at the beginning to no line.
    texts = [texts[0].removeprefix(BOM), *texts[1:]]
    texts = [text.removesuffix(b"\r") for text in texts]
    expected = oracle(texts, 2, 2)
    rejected = []
    found = read(path, SMALL, bad_rows="skip", on_reject=lambda *line: rejected.append(line))
    assert_rows(found, [(number, row) for number, row in expected if row is not None])
    bad = [number for number, row in expected if row is None]
    assert [(number, text) for number, _, text in rejected] == [(number, texts[number - 1]) for number in bad]
    if bad:
        with pytest.raises(DataError) as error:
            read(path, SMALL)
        assert str(error.value).startswith(f"{path}, line {bad[0]}: ")
        assert len(str(error.value).splitlines()) == 1
    else:
        read(path, SMALL)


def test_each_byte_in_each_place():
    """A block is checked for a few bytes only; Polars must mind all others that no field may hold."""
    layout = _Layout(SMALL, True, "log1p")
    fields = [b"1", b"23", b"-4", b"ab", b"0f"]
    for column in range(5):
        for byte in (bytes([code]) for code in range(256) if code not in b"\t\n"):
            value = fields[column]
            for text in (byte, byte + value, value + byte, value[:1] + byte + value[1:], byte + byte):
                line = b"\t".join([*fields[:column], text, *fields[column + 1 :]])
                found, expected = layout.parse(line + b"\n", 1), parse(line, 2, 2)
                assert (found is None) == (expected is None), line
                if found is not None:
                    label, dense, _, ids = found
                    assert (label[0], dense[0].tolist(), ids[0].tolist()) == expected


@pytest.mark.parametrize("dense", [(), ("d0", "d1")])
def test_each_separator_in_each_position(dense):
    """With dense columns Polars minds too; without, it is not asked."""
    layout = _Layout(Schema("small", "label", dense, ("c0", "c1")), True, "log1p")
    numbers = b"\t7" * len(dense)
    text = b"1" + numbers + b"\tab\t0f\n0" + numbers + b"\tc\td\n"
    assert layout.parse(text, 2).ids.tolist() == [[0xAB, 0x0F], [0xC, 0xD]]
    separators = [i for i, byte in enumerate(text) if byte in b"\t\n"]
    for i in separators:
        for byte in range(11):
            changed = text[:i] + bytes([byte]) + text[i + 1 :]
            assert (layout.parse(changed, changed.count(b"\n")) is not None) == (changed == text), changed
    # As many of each as there should be, but not where they belong.
    end = text.index(b"\n")
    for i in set(separators[:-1]) - {end}:
        moved = bytearray(text)
        moved[i], moved[end] = b"\n\t"
        assert layout.parse(bytes(moved), 2) is None


@st.composite
def damaged_files(draw):
    """Numbers of columns, and bytes that were such a log before they were changed here and there."""
    dense, categorical = draw(st.sampled_from([(13, 26), (2, 2), (0, 1), (1, 0), (3, 5)]))
    labelled = draw(st.booleans())
    texts = [text.split(b"\t") for text in lines(draw(st.integers(1, 6)), draw(st.integers(0, 99)))]
    picked = [row[:labelled] + row[1 : 1 + dense] + row[14 : 14 + categorical] for row in texts]
    data = b"".join(b"\t".join(row) + draw(st.sampled_from([b"\n", b"\r\n"])) for row in picked)
    inserts = st.sampled_from(
        [b"\n", b"\r", b"\t", b"-", b"+", b" ", b"0", b'"', b"\0", b"\xef\xbb\xbf", b"\xff", b"g"]
    )
    for _ in range(draw(st.integers(0, 3))):
        start, gone = draw(st.integers(0, len(data))), draw(st.integers(0, 2))
        data = data[:start] + draw(inserts | st.binary(max_size=2)) + data[start + gone :]
    return dense, categorical, labelled, data


@settings(deadline=None, max_examples=200)
@given(damaged_files(), st.sampled_from([1, 40, 1 << 20]), st.sampled_from(["damaged", "damaged.gz"]))
def test_whatever_the_bytes_a_log_is_read_as_the_plain_parser_does_or_refused(
    tmp_path_factory, damaged, block_bytes, name
):
    """All of a file: values, numbers of lines, and the line that an error names, however the blocks fall."""
    dense, categorical, labelled, data = damaged
    schema = Schema(
        "any", "label", tuple(f"d{i}" for i in range(dense)), tuple(f"c{i}" for i in range(categorical))
    )
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    options = {"labelled": labelled, "block_bytes": block_bytes}
    assume(b"\n" in data or b"\r" not in data.rstrip(b"\r"))  # an old Mac's, which is refused
    if data in (b"", BOM) or (data[:2] == b"\x1f\x8b" and not name.endswith(".gz")):
        with pytest.raises(DataError, match=r"(empty, there is no|gzip damaged after) line"):
            read(path, schema, **options)
        return
    texts = [text.removesuffix(b"\r") for text in data.removeprefix(BOM).removesuffix(b"\n").split(b"\n")]
    expected = oracle(texts, dense, categorical, labelled)
    number, last = expected[-1]
    if last is not None and categorical and not data.endswith(b"\n"):
        if 0 < len(texts[-1].split(b"\t")[-1]) < 8:  # perhaps cut short within its last value
            expected[-1] = number, None
    rejected = []
    note = lambda *line: rejected.append(line)  # noqa: E731
    found = read(path, schema, bad_rows="skip", on_reject=note, **options)
    assert_rows(found, [(number, row) for number, row in expected if row is not None])
    assert [(line, text) for line, _, text in rejected] == [
        (number, texts[number - 1]) for number, row in expected if row is None
    ]
    assert count_rows(path) == len(texts)
    if rejected:
        with pytest.raises(DataError) as error:
            read(path, schema, **options)
        assert str(error.value).startswith(f"{path}, line {rejected[0][0]}: {rejected[0][1]}; ")
        assert len(str(error.value).splitlines()) == 1


GOOD = "1\t5\t-2\tff\t0"
BAD = {
    "too few columns": ("1\t5\t-2\tff", "4 columns instead of 5"),
    "too many columns": ("1\t5\t-2\tff\t0\t", "6 columns instead of 5"),
    "blank": ("", "blank line"),
    "label": ("2\t5\t-2\tff\t0", "label is '2', not 0 or 1"),
    "no label": ("\t5\t-2\tff\t0", "label is '', not 0 or 1"),
    "fraction": ("1\t5.5\t-2\tff\t0", "d0 is '5.5', not an integer below 10^18"),
    "large integer": ("1\t5\t1000000000000000000\tff\t0", "d1 is '1000000000000000000', not an"),
    "not hex": ("1\t5\t-2\tfg\t0", "c0 is 'fg', not a number of up to 8 hex digits"),
    "33 bits": ("1\t5\t-2\tff\t100000000", "c1 is '100000000', not a number of up to 8 hex digits"),
    "9 digits": ("1\t5\t-2\t00000000f\t0", "c0 is '00000000f', not a number"),
    "minus": ("1\t5\t-2\tff\t-0", "c1 is '-0', not a number"),
    "plus": ("1\t5\t-2\t+f\t0", "c0 is '+f', not a number"),
    "prefix": ("1\t5\t-2\t0xf\t0", "c0 is '0xf', not a number"),
    "underscore": ("1\t5\t-2\t1_0\t0", "c0 is '1_0', not a number"),
    "long": ("1\t5\t-2\tff\t" + "z" * 99, f"c1 is '{'z' * 24}', not a number"),
    "not UTF-8": ("1\t5\t-2\tf\udcff\t0", "not UTF-8 text"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, name, block_bytes, case):
    text, reason = BAD[case]
    bad = text.encode(errors="surrogateescape")
    texts = [GOOD.encode(), GOOD.encode(), bad, GOOD.encode(), bad]
    path = write(tmp_path / name, texts)
    with pytest.raises(DataError) as error:
        read(path, SMALL, block_bytes=block_bytes)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: {reason}")
    assert message.endswith("; correct the line, or leave such lines out with --bad-rows skip")
    assert len(message.splitlines()) == 1

    rejected = []

    def note(*line):
        rejected.append(line)

    found = read(path, SMALL, bad_rows="skip", on_reject=note, block_bytes=block_bytes)
    assert_rows(found, [row for row in oracle(texts, 2, 2) if row[1] is not None])
    assert found[0].tolist() == [1, 2, 4]
    assert [(line, text) for line, _, text in rejected] == [(3, bad), (5, bad)]
    assert all(why.startswith(reason) for _, why, _ in rejected)


def test_a_short_and_a_long_line_do_not_make_up_for_each_other(tmp_path):
    path = write(tmp_path / "log", [b"1\t5\t-2\tff", b"1\t5\t-2\tff\t0\t0"])
    with pytest.raises(DataError, match=r"line 1: 4 columns"):
        read(path, SMALL)


def test_all_lines_may_be_bad(tmp_path):
    path = write(tmp_path / "log", [b"x", b"", b"y"])
    line, label, dense, ids = read(path, SMALL, bad_rows="skip")
    assert (line.shape, label.shape, dense.shape, ids.shape) == ((0,), (0,), (0, 2), (0, 2))


def fails(path, match):
    """Reading and counting both fail, whatever is done with bad lines, with one line that names the path."""
    for attempt in (
        lambda: read(path),
        lambda: read(path, bad_rows="skip", block_bytes=3000),
        lambda: count_rows(path),
    ):
        with pytest.raises(DataError, match=match) as error:
            attempt()
        assert str(error.value).startswith(f"{path}: ")
        assert len(str(error.value).splitlines()) == 1


def test_a_missing_file(tmp_path):
    fails(tmp_path / "log", "not found; check the path")


def test_a_folder(tmp_path):
    fails(tmp_path, "is a folder; name a file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read all files")
def test_a_forbidden_file(tmp_path):
    path = write(tmp_path / "log", lines(1, seed=0))
    path.chmod(0)
    fails(path, "Permission denied")


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_file(tmp_path, name):
    fails(write(tmp_path / name, []), "empty, there is no line 1; check")


def test_a_truncated_gzip(tmp_path):
    path = write(tmp_path / "log.gz", lines(300, seed=8))
    path.write_bytes(path.read_bytes()[:-2000])
    fails(path, r"gzip damaged after line \d+ \(Compressed file ended .*\); fetch it again")
    with pytest.raises(DataError) as error:
        read(path, block_bytes=3000)
    # Blocks that came out whole are counted, so the line is known to within a block.
    assert "after line 0 " not in str(error.value)


@pytest.mark.parametrize("position", [10, 5000, -6])  # how it is packed; what is packed; the checksum
def test_a_corrupt_gzip(tmp_path, position):
    path = write(tmp_path / "log.gz", lines(300, seed=9))
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)
    fails(path, r"gzip damaged after line \d+ ")


def test_rubbish_after_gzip(tmp_path):
    path = write(tmp_path / "log.gz", lines(30, seed=10))
    path.write_bytes(path.read_bytes() + b"rubbish")
    fails(path, "gzip damaged after line ")


def test_a_line_without_end(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(lines(1, seed=11)[0] + b"\n" + b"0" * (2 << 20))
    with pytest.raises(DataError, match=r"a line after line 1 is over 1 MiB; give a click log"):
        read(path, block_bytes=1000)
