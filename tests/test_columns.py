import csv
import gzip
import io
import itertools
import json
import math
import re
from dataclasses import asdict, replace

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipeline.columns import frame_reader, hash_texts
from data_pipeline.logs import count_rows, read_log
from data_pipeline.proposal import propose
from data_pipeline.schema import DataError, Schema, load_schema

SCHEMA = Schema(
    "own", "liked", ("age", "price"), ("user", "genre", "code"), ("integer", "string", "hex"), ("", "NA"), 2.0
)
NAMES = SCHEMA.columns


def xxh32(data: bytes) -> int:
    """XXH32 with seed 0, from the specification of xxHash."""
    p1, p2, p3, p4, p5, mask = 2654435761, 2246822519, 3266489917, 668265263, 374761393, 2**32 - 1

    def turn(x, bits):
        x &= mask
        return (x << bits | x >> (32 - bits)) & mask

    rest = data
    if len(data) >= 16:
        lanes = [p1 + p2, p2, 0, -p1]
        while len(rest) >= 16:
            for i in range(4):
                lanes[i] = turn(lanes[i] + int.from_bytes(rest[4 * i : 4 * i + 4], "little") * p2, 13) * p1
            rest = rest[16:]
        total = sum(turn(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
    else:
        total = p5
    total += len(data)
    while len(rest) >= 4:
        total, rest = turn(total + int.from_bytes(rest[:4], "little") * p3, 17) * p4, rest[4:]
    for byte in rest:
        total = turn(total + byte * p5, 11) * p1
    for shift, factor in ((15, p2), (13, p3), (16, 1)):
        total &= mask
        total = (total ^ total >> shift) * factor
    return total & mask


def split_line(line: str, separator: str) -> list[str] | None:
    """The fields of a line of RFC 4180, read character by character; None if it is none."""
    fields, at = [], 0
    if "\r" in line:
        return None
    while True:
        field = ""
        if line[at : at + 1] == '"':
            at += 1
            while True:
                if at >= len(line):
                    return None
                if line[at] == '"':
                    at += 1
                    if line[at : at + 1] != '"':
                        break
                field += line[at]
                at += 1
        else:
            while at < len(line) and line[at] != separator:
                if line[at] == '"':
                    return None
                field += line[at]
                at += 1
        fields.append(field)
        if at == len(line):
            return fields
        if line[at] != separator:
            return None
        at += 1


TRUTH = dict.fromkeys(["true", "True", "TRUE", "yes", "Yes", "YES", "t", "T", "y", "Y"], "1")
TRUTH |= dict.fromkeys(["false", "False", "FALSE", "no", "No", "NO", "f", "F", "n", "N"], "0")


def plain_row(fields: list[str] | None, schema: Schema = SCHEMA):
    """(label, [log(max(x, 0) + 1), ...], ids) of the texts of a row, or None if it breaks the rules."""
    if fields is None or len(fields) != len(schema.columns):
        return None
    number = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
    label, *fields = fields
    label = TRUTH.get(label, label)
    if not number.fullmatch(label) or (schema.threshold is None and float(label) not in (0, 1)):
        return None
    label = int(float(label) >= (1 if schema.threshold is None else schema.threshold))
    columns = (*schema.dense, *schema.categorical)
    missing = [schema.missing_in.get(column, schema.missing) for column in columns]
    fields = [None if field in texts else field for field, texts in zip(fields, missing, strict=True)]
    dense, ids = fields[: len(schema.dense)], fields[len(schema.dense) :]
    if any(text is not None and not (number.fullmatch(text) and abs(float(text)) < 1e38) for text in dense):
        return None
    values = [schema.dense_missing if text is None else float(text) for text in dense]
    found = []
    for text, kind in zip(ids, schema.kinds, strict=True):
        if text is None:
            found.append(0)
        elif kind == "string":
            found.append(max(xxh32(text.encode()), 1))
        elif kind == "hex":
            if not re.fullmatch("[0-9a-fA-F]{1,8}", text):
                return None
            found.append(int(text, 16))
        else:
            if not re.fullmatch(r"-?[0-9]{1,38}(\.0+)?", text):
                return None
            value = int(text.partition(".")[0])
            found.append(value if 0 <= value < 2**32 else max(xxh32(str(value).encode()), 1))
    transforms = [schema.transforms.get(column, "log1p") for column in schema.dense]
    given = zip(values, transforms, strict=True)
    return label, [np.float32(math.log1p(max(x, 0)) if how == "log1p" else x) for x, how in given], found


def read(path, schema=SCHEMA, **options):
    """All rows of a table as [(row, label, dense, ids), ...]."""
    rows = []
    for chunk in read_log(path, schema, **options):
        assert (chunk.dense.dtype, chunk.ids.dtype) == (np.float32, np.uint32)
        assert chunk.dense.flags.c_contiguous
        assert chunk.ids.flags.c_contiguous
        labels = itertools.repeat(None) if chunk.label is None else chunk.label.tolist()
        rows += zip(chunk.line.tolist(), labels, chunk.dense.tolist(), chunk.ids.tolist())  # noqa: B905
    return rows


def fails(match, path, schema=SCHEMA, **options):
    with pytest.raises(DataError, match=match) as error:
        read(path, schema, **options)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1


def test_the_hash_is_that_of_the_specification():
    """Golden values are xxHash's own, and one text whose hash is 0, which means missing."""
    golden = {"": 0x02CC5D05, "a": 0x550D7456, "Nobody inspects the spammish repetition": 0xE2293B2F}
    for text, value in golden.items():
        assert xxh32(text.encode()) == value
    assert xxh32(b"abfcS1Iz") == 0
    texts = pl.Series([*golden, "abfcS1Iz", None, "a", "é" * 40, None])
    long = xxh32(("é" * 40).encode())
    assert hash_texts(texts).to_list() == [*golden.values(), 1, None, 0x550D7456, long, None]
    assert hash_texts(texts).dtype == pl.UInt32
    nothing = hash_texts(pl.Series([None, None], dtype=pl.String))
    assert (nothing.dtype, nothing.to_list()) == (pl.UInt32, [None, None])


NUMBERS = ["", "NA", "0", "-1", "3.5", "1e3", ".5", "7.", "-.5E-2", "0" * 30 + "1"]
BAD_NUMBERS = [
    "+1",
    " 1",
    "1 ",
    "nan",
    "inf",
    "1e400",
    "1e38",
    "1_0",
    "0x1",
    "--1",
    "1,5",
    "e5",
    ".",
    "\u0661",
]
IDS = ["", "NA", "0", "7", "007", "7.0", "7.000", "-5.0", "4294967295", "4294967296", "-5", "-0", "9" * 38]
fields = st.tuples(
    st.sampled_from(["0", "1"] * 5 + [*TRUTH, "1.0", "", "NA", "2", "x", "tRUE", "ja"]),
    *(st.sampled_from(NUMBERS * 3 + BAD_NUMBERS) | st.floats(-1e9, 1e9).map(repr) for _ in range(2)),
    st.sampled_from(IDS * 2 + ["1.5", "7.", "7.0e1", "x", "9" * 39, " 1"])
    | st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["", "NA", "na", " ", "a,b", 'say "x"', "a;b\tc"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=20),
    st.sampled_from(["", "NA", "0", "ff", "FFFFFFFF", "00000001", "100000000", "xyz", "-1"]),
)


def quote(field: str, separator: str, always: bool) -> str:
    if always or any(character in field for character in (separator, '"')):
        return '"' + field.replace('"', '""') + '"'
    return field


BROKEN = ["", "x", '"', '1,2,3,4,"a,5', '1,2,3,4,a"b",5', '"1"2,2,3,4,a,5', "1,2,3,4,a,5,6", "1,2,3,4,a\rb,5"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(fields, st.booleans()), min_size=1, max_size=5),
    st.lists(
        st.sampled_from(["", "x", '"', '1,2,3,4,"a,5', '1,2,3,4,a"b",5', '"1"2,2,3,4,a,5', "1,2,3,4,a,5,6"])
    ),
    st.sampled_from(",;\t"),
    st.permutations(range(6)),
    st.sampled_from([1, 30, 1 << 20]),
    st.sampled_from(["own.csv", "own.tsv.gz"]),
    st.sampled_from([None, 1.0, 0.0]),
    st.sampled_from([{}, {"genre": ()}, {"age": ("-1", ""), "user": ("7", "NA")}]),
    st.sampled_from([{}, {"price": "none"}, {"price": "log1p", "age": "none"}]),
)
def test_a_csv_file_is_read_as_the_plain_parser_does(
    tmp_path_factory, rows, broken, separator, order, block_bytes, name, threshold, missing_in, transforms
):
    """Values, rejected rows and the row an error names, whatever the order of columns and the quotes."""
    schema = replace(SCHEMA, threshold=threshold, missing_in=missing_in, transforms=transforms)
    lines = [separator.join(quote(row[i], separator, always) for i in order) for row, always in rows] + [
        line.replace(",", separator) for line in broken
    ]
    header = separator.join(NAMES[i] for i in order)
    path = tmp_path_factory.getbasetemp() / name
    data = "".join(line + "\n" for line in [header, *lines]).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)

    expected = []
    for line in lines:
        found = split_line(line, separator)
        if found is not None and len(found) == 6:
            found = [found[order.index(i)] for i in range(6)]
        expected.append(plain_row(found, schema))
    good = [(number, *row) for number, row in enumerate(expected, 1) if row is not None]
    bad = [number for number, row in enumerate(expected, 1) if row is None]
    rejected = []
    note = lambda *row: rejected.append(row)  # noqa: E731
    assert read(path, schema, bad_rows="skip", on_reject=note, block_bytes=block_bytes) == good
    assert [row for row, _, _ in rejected] == bad
    assert count_rows(path) == len(lines)
    if bad:
        fails(rf"{name}, row {bad[0]} \(line {bad[0] + 1}\): ", path, schema, block_bytes=block_bytes)
    else:
        assert read(path, schema) == good


@settings(deadline=None)
@given(
    st.sampled_from([b'1,2,,4,"a",5\n0,1,NA,4,b,ff\n', b"1,2,,4,a,5\n0,1,NA,4,b,ff\n"]),
    st.binary(max_size=40) | st.sampled_from([b"\xff", b"\xc3\xa9", b'"', b"\r", b"\0"]),
    st.integers(0, 30),
)
def test_whatever_the_bytes_of_a_csv_file(tmp_path_factory, data, bytes_, position):
    """Either the plain parser's rows or a DataError with the number of its first bad one."""
    data = data[:position] + bytes_ + data[position:]
    assume(data)
    path = tmp_path_factory.getbasetemp() / "own.csv"
    path.write_bytes(",".join(NAMES).encode() + b"\n" + data)
    expected = []
    for line in data.removesuffix(b"\n").split(b"\n"):
        try:
            expected.append(plain_row(split_line(line.removesuffix(b"\r").decode(), ",")))
        except UnicodeDecodeError:
            expected.append(None)
    if None in expected:
        fails(rf"row {expected.index(None) + 1} \(line", path)
    else:
        assert read(path) == [(number, *row) for number, row in enumerate(expected, 1)]
    good = [(number, *row) for number, row in enumerate(expected, 1) if row is not None]
    assert read(path, bad_rows="skip") == good


ROWS = [
    ["1", "33", "3.5", "7", 'a "b", c', "ff"],
    ["0", "", "", "", "", ""],
    ["1", "-3", "1000.25", "99999999999", "é", "0A"],
]
EXPECTED = [(number, *plain_row(row)) for number, row in enumerate(ROWS, 1)]
FRAME = pl.DataFrame(
    {
        "extra": [0.5, 1.5, 2.5],
        "code": ["ff", None, "0A"],
        "genre": ['a "b", c', "NA", "é"],
        "user": [7, None, 99999999999],
        "price": [3.5, float("nan"), 1000.25],
        "age": pl.Series([33, None, -3], dtype=pl.Int8),
        "liked": [True, False, True],
    }
)


def write(frame: pl.DataFrame, path, **options):
    (frame.write_parquet if path.suffix == ".parquet" else frame.write_ipc)(path, **options)
    return path


BINARY = ["own.parquet", "own.arrow", "own.IPC", "own.feather"]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("slice_rows", [1, 2, 100])
def test_typed_columns(tmp_path, name, slice_rows):
    path = write(FRAME, tmp_path / name)
    assert read(path, slice_rows=slice_rows) == EXPECTED
    assert read(path, slice_rows=slice_rows, first_line=3)[-1:] == EXPECTED[-1:]
    assert count_rows(path) == 3
    assert [chunk.position for chunk in read_log(path, SCHEMA)] == [path.stat().st_size]
    for types in ({"genre": pl.Categorical}, {"liked": pl.UInt8}, {"user": pl.String, "age": pl.Float32}):
        write(FRAME.cast(types), path)
        assert read(path) == EXPECTED


def test_read_log_goes_by_the_name(tmp_path):
    write(FRAME, tmp_path / "own.parquet")
    (chunk,) = read_log(tmp_path / "own.parquet", SCHEMA)
    assert chunk.ids.tolist() == [row[3] for row in EXPECTED]
    (tmp_path / "raw").write_text("1\t2\tff\n")
    (chunk,) = read_log(tmp_path / "raw", Schema("raw", "l", ("d",), ("c",)))
    assert chunk.ids.tolist() == [[255]]
    with pytest.raises(DataError, match=r"raw: a raw .* schema own sets kinds, missing, dense_missing; give"):
        next(read_log(tmp_path / "raw", SCHEMA))


def test_a_csv_file_can_start_at_a_row(tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([NAMES, *ROWS])
    assert read(path) == EXPECTED
    for first in (1, 2, 3):
        assert read(path, block_bytes=1, first_line=first)[-(4 - first) :] == EXPECTED[first - 1 :]
    assert len(read(path, block_bytes=1, first_line=3)) < 3


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_a_table_may_lack_labels(tmp_path, name):
    frame = pl.read_csv(io.StringIO("age,price,user,genre,code\n33,3.5,7,x,ff\n"), infer_schema=False)
    path = tmp_path / name
    frame.write_csv(path) if name.endswith("csv") else frame.write_parquet(path)
    assert [row[0:2] for row in read(path, labelled=None)] == [(1, None)]
    fails("has no column 'liked', but 'age, price, user, genre, code'; .*`robe schema FILE", path)


def test_a_schema_without_dense_columns(tmp_path):
    (tmp_path / "own.csv").write_text("y,user\n1,a\n0,b\n")
    schema = Schema("own", "y", (), ("user",), ("string",))
    (chunk,) = read_log(tmp_path / "own.csv", schema)
    assert chunk.dense.shape == (2, 0)
    assert chunk.ids[:, 0].tolist() == [xxh32(b"a"), xxh32(b"b")]


def test_a_single_column(tmp_path):
    """Where a blank line is a missing value."""
    for text in (b"user\na\n\nb\n", b'user\na\n""\nb'):
        (tmp_path / "own.csv").write_bytes(text)
        (chunk,) = read_log(
            tmp_path / "own.csv", Schema("own", "y", (), ("user",), ("string",)), labelled=None
        )
        assert chunk.ids[:, 0].tolist() == [xxh32(b"a"), 0, xxh32(b"b")]


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64])
def test_whole_floats_are_integers(tmp_path, dtype):
    """What Pandas makes of a column of ids when some are missing means the same in CSV and Parquet."""
    ids = [37, None, 0, 2**24, -5, None]
    frame = pl.DataFrame({"y": [0, 1] * 3, "user": ids})
    schema = Schema("own", "y", (), ("user",), ("integer",))
    expected = [0 if x is None else x if x >= 0 else xxh32(b"-5") for x in ids]
    path = write(frame.cast({"user": dtype}), tmp_path / "own.parquet")
    assert [row[3] for row in read(path, schema)] == [[x] for x in expected]
    nan = pl.DataFrame({"y": [0, 1] * 3, "user": pl.Series(ids, dtype=dtype).fill_null(float("nan"))})
    assert read(write(nan, tmp_path / "nan.parquet"), schema) == read(path, schema)
    (tmp_path / "own.csv").write_text(
        "y,user\n" + "".join(f"{i % 2},{'' if x is None else f'{x}.0'}\n" for i, x in enumerate(ids))
    )
    assert read(tmp_path / "own.csv", schema) == read(path, schema)
    texts = replace(schema, kinds=("string",))
    whole = write(pl.DataFrame({"y": [0, 1] * 3, "user": ids}), tmp_path / "whole.parquet")
    assert read(tmp_path / "nan.parquet", texts) == read(path, texts) == read(whole, texts)
    for bad in (37.5, float("inf"), float(2**26 if dtype == pl.Float32 else 2**54)):
        write(pl.DataFrame({"y": [0, 1], "user": pl.Series([1, bad], dtype=dtype)}), path)
        for declared in (schema, texts):
            words = r"own.parquet, row 2: user is '.*', not a whole number of up to \d+, as which Float"
            fails(words, path, declared)


def test_a_file_without_a_header_says_so(tmp_path):
    """Numbers may be names, as pandas gives them, if the schema has one of them."""
    path = tmp_path / "own.csv"
    path.write_text("1,37,9.5,ann,comedy,ff\n0,21,3,bob,war,1a\n")
    for labelled in (True, None):
        words = (
            r"own.csv, line 1: no header, but data, as '1' shows; write a line with the names of the columns"
        )
        fails(words, path, labelled=labelled)
    path.write_text("user,age,1,2\n1,37,9.5,ann\n")
    fails("own.csv: has no column 'liked', but 'user,", path)
    path.write_text("0,1\n7,8\n")
    assert [row[3] for row in read(path, Schema("own", "y", (), ("1",), ("integer",)), labelled=None)] == [
        [8]
    ]


def test_truths_are_labels_whatever_the_spelling(tmp_path):
    schema = Schema("own", "y", (), ("user",), ("string",))
    (tmp_path / "own.csv").write_text("y,user\n" + "".join(f"{word},True\n" for word in TRUTH))
    assert [(row[1], row[3]) for row in read(tmp_path / "own.csv", schema)] == [
        (int(value), [xxh32(b"True")]) for value in TRUTH.values()
    ]
    for threshold in (1, 0.5):
        limited = replace(schema, threshold=threshold)
        assert read(tmp_path / "own.csv", limited) == read(tmp_path / "own.csv", schema)
    (tmp_path / "own.csv").write_text("y,user\n0.15,a\n")
    fails(
        r"row 1 \(line 2\): y is '0.15', not 0 or 1, .*`threshold` in the schema",
        tmp_path / "own.csv",
        schema,
    )


def test_numbers_that_become_0_are_told(tmp_path):
    schema = replace(SCHEMA, dense=("a", "b"), transforms={"b": "none"}, dense_missing=-7)
    frame = FRAME.with_columns(a=pl.Series([-1, 0, 2]), b=pl.Series([-1.5, None, 2]))
    path = write(frame, tmp_path / "own.parquet")
    (chunk,) = read_log(path, schema)
    assert chunk.dense.tolist() == [[0, -1.5], [0, -7], [np.float32(math.log1p(2)), 2]]
    assert chunk.clipped.tolist() == [[True, False], [False, False], [False, False]]
    (chunk,) = read_log(path, replace(schema, transforms={"b": "log1p"}), dense="none")
    assert chunk.dense.tolist() == [[-1, 0], [0, 0], [2, np.float32(math.log1p(2))]]
    assert chunk.clipped.tolist() == [[False, True], [False, True], [False, False]]
    (tmp_path / "raw").write_text("1\t-2\tff\n0\t\tff\n")
    (chunk,) = read_log(tmp_path / "raw", Schema("raw", "l", ("d",), ("c",)))
    assert chunk.clipped.tolist() == [[True], [False]]


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_quotes_that_are_part_of_the_text(tmp_path, block_bytes):
    """As in a TSV of titles: the schema says so, and what is proposed of such a file says it too."""
    texts = ['The "best" thing', '5" pipe', "plain", '"quoted"', '"', '""', '"half']
    path = tmp_path / "news.tsv"
    path.write_text("click\ttitle\n" + "".join(f"{i % 2}\t{text}\n" for i, text in enumerate(texts)))
    proposed = propose(path, 10)
    assert 'quote = ""' in proposed
    (tmp_path / "news.toml").write_text(proposed)
    schema = load_schema(tmp_path / "news.toml")
    assert schema.quote == ""
    assert load_schema_again(schema) == schema
    found = [row[3][0] for row in read(path, schema, block_bytes=block_bytes)]
    assert found == [xxh32(text.encode()) for text in texts]
    assert count_rows(path) == len(texts)
    quoting = replace(schema, quote='"')
    assert quoting.fingerprint() != schema.fingerprint()
    fails(r"row 1 \(line 2\): quotes .*; if quotes are part of the text, write quote = ", path, quoting)
    path.write_text('click\ttitle\n1\t"quoted"\n0\tplain\n')
    assert "quote =" not in propose(path, 10)
    assert read(path, quoting)[0][3] == [xxh32(b"quoted")]


def load_schema_again(schema):
    """A schema as a manifest keeps it."""
    return msgspec.convert(json.loads(json.dumps(asdict(schema))), Schema)


def test_errors_name_file_row_column_and_value(tmp_path):
    frame = FRAME.with_columns(price=pl.Series([1.0, float("inf"), -1e39]), liked=pl.Series([0, 1, 2]))
    path = write(frame, tmp_path / "own.parquet")
    fails(r"own.parquet, row 2: price is 'inf', not a number below 1e\+38; correct .*--bad-rows skip", path)
    rejected = []
    rows = read(path, bad_rows="skip", on_reject=lambda *row: rejected.append(row), slice_rows=2)
    assert [row[0] for row in rows] == [1]
    assert [row for row, _, _ in rejected] == [2, 3]
    assert rejected[1][1:] == (
        "liked is '2', not 0 or 1, true or false (other numbers need a `threshold` in the schema)",
        "2\t-3\t-1e+39\t99999999999\té\t0A".encode(),
    )


def test_tables_that_cannot_be_used(tmp_path):
    path = tmp_path / "own.csv"
    fails("own.csv: not found", path)
    fails("no.parquet: not found; check the path", tmp_path / "no.parquet")
    path.write_text("")
    fails("own.csv: empty", path)
    path.write_text(",".join(NAMES) + "\n")
    fails("own.csv: empty, there is no row after the header", path)
    path.write_text(",".join([*NAMES, "age"]) + "\n1,2,3,4,5,6,7\n")
    fails("own.csv: has two columns 'age'; rename one", path)
    path.write_text(",".join([*NAMES, "x", "x"]) + "\n1,2,3,4,5,6,7,8\n")
    assert len(read(path)) == 1
    path.write_bytes(b"\xff,b\n1,2\n")
    fails("own.csv, line 1: not UTF-8 text; if it is GBK, `iconv", path)
    path = write(FRAME.cast({"code": pl.Binary}), tmp_path / "own.parquet")
    fails("own.parquet: column code is Binary, which cannot be hex; correct the schema", path)
    write(FRAME.cast({"age": pl.Date}), path)
    fails("column age is Date, which cannot be a number", path)
    write(FRAME.clear(), path)
    fails("own.parquet: empty, there is no row 1", path)
    data = write(FRAME, path).read_bytes()
    for damage in (
        data[:-20],
        data[20:],
        b"",
        data[: len(data) // 2] + bytes(9) + data[len(data) // 2 + 9 :],
    ):
        path.write_bytes(damage)
        fails("own.parquet: ", path)
    data = write(FRAME, tmp_path / "own.arrow").read_bytes()
    for damage in (data[:-20], b"", data[: len(data) // 2]):
        (tmp_path / "own.arrow").write_bytes(damage)
        fails("own.arrow: not a whole arrow file", tmp_path / "own.arrow")


def test_a_few_rows_are_read_as_many_are():
    """Columns of one rule are read together then; these are alike in all but one thing each."""
    kinds = [*("integer", "string", "hex") * 2, "integer", "string"]
    names = tuple("abcdefgh")
    schema = Schema("own", "liked", ("x", "y", "z"), names, kinds, missing_in={"d": ("", "7"), "y": ("-",)})
    rng = np.random.default_rng(0)
    missing = {name: schema.missing_in.get(name, ("",))[0] for name in (*names, "x", "y")}
    texts = {name: rng.choice(["1", "7", "22", text], 2000) for name, text in missing.items()}
    others = {"g": rng.integers(50, size=2000), "h": rng.integers(50, size=2000), "z": rng.normal(size=2000)}
    frame, read = pl.DataFrame(texts | others), frame_reader(schema, "own")
    whole = read(frame).flat
    for rows in (1, 7, 500):
        assert read(frame[1000 : 1000 + rows]).flat.equals(whole[1000 : 1000 + rows])
    bad = frame[:5].with_columns(pl.Series("d", ["1", "7", "1", "a word", ""]))
    with pytest.raises(DataError, match="own, row 3: d is 'a word', not an integer"):
        read(bad.with_columns(pl.Series("f", ["1", "", "1", "no hex", "1"])))
