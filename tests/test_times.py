"""Hours and weekdays of a column of times, from the file to probabilities."""

import json
import re
from datetime import UTC, date, datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from data_pipeline.batches import Rows, raw_batches
from data_pipeline.frames import RowReader
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.proposal import propose
from data_pipeline.schema import DataError, load_schema
from robe.cli import main
from robe.serve import Server

TOML = 'label = "click"\ndense = []\n[categorical]\nuser = "integer"\nat = ["hour", "weekday"]\n'
# Times as texts, and what they are; the 1st of May 2024 was a Wednesday.
TIMES = {
    "2024-05-01": (0, 2),
    "2024-05-01 23:59": (23, 2),
    "2024-05-06T00:00:00.5": (0, 0),
    "2024-05-05T23:30:00-01:00": (0, 0),
    "2024-05-06T01:30:00+02:00": (23, 6),
    "1969-12-31 05:00:00Z": (5, 2),
    "": None,
}
ROWS = 4 * len(TIMES)
FORMATS = ("csv", "parquet", "jsonl")


def table(texts=tuple(TIMES) * 4):
    clicks, users = np.arange(len(texts)) % 2, np.arange(len(texts)) % 5
    return pl.DataFrame({"click": clicks, "user": users, "at": list(texts)})


def written(folder, frame, form):
    """The table in a file; in Parquet the times have a type, in JSON lines a missing one is null."""
    path = folder / f"own.{form}"
    times = pl.Series(
        "at", [datetime.fromisoformat(text) if text else None for text in frame["at"]], dtype=object
    )
    if form == "csv":
        frame.write_csv(path)
    elif form == "jsonl":
        frame.with_columns(pl.col("at").replace("", None)).write_ndjson(path)
    else:
        in_utc = [at and (at if at.tzinfo else at.replace(tzinfo=UTC)) for at in times]
        frame.with_columns(pl.Series("at", in_utc).dt.convert_time_zone("Asia/Kolkata")).write_parquet(path)
    return path


def prepared(path, toml=TOML, **options):
    (path.parent / "own.toml").write_text(toml)
    schema, out = load_schema(path.parent / "own.toml"), path.with_name(f"{path.name}.data")
    return prepare(PrepareConfig((path,), out, schema=schema, **options))


def ids(manifest):
    return next(Rows(manifest, None).batches(ROWS)).ids


def test_hours_and_weekdays_are_ids_from_1_on(tmp_path):
    """And a missing time is 0, like other missing values."""
    found = {form: prepared(written(tmp_path, table(), form)) for form in FORMATS}
    assert found["csv"].schema.categorical == ("user", "at_hour", "at_weekday")
    expected = [[0, 0] if parts is None else [part + 1 for part in parts] for parts in TIMES.values()]
    np.testing.assert_array_equal(ids(found["csv"])[:, 1:], expected * 4)
    assert all(one.same_rows(found["csv"]) for one in found.values())


@pytest.mark.parametrize("form", FORMATS)
def test_tables_in_memory_and_files_to_predict_for_become_the_same(form, tmp_path):
    path = written(tmp_path, table(), form)
    manifest = prepared(path, ids="dictionary")
    reader, expected = RowReader(manifest), ids(manifest)
    np.testing.assert_array_equal(next(raw_batches(path, manifest, ROWS)).ids, expected)
    np.testing.assert_array_equal(reader.rows(table())[1], expected)
    np.testing.assert_array_equal(reader.ids("at_weekday", table()["at"])[:, 2], expected[:, 2])
    server = Server(SimpleNamespace(schema=manifest.schema, read_table=reader.rows), ROWS, 10**6)
    body = json.dumps({"rows": table().select("user", "at").to_dicts()}).encode()
    np.testing.assert_array_equal(server._read(body)[1], expected)


def test_types_and_texts_mean_the_same(tmp_path):
    reader = RowReader(prepared(written(tmp_path, table(), "csv")))
    at = datetime(2024, 5, 5, 23, 30, tzinfo=timezone(timedelta(hours=-1)))
    same = [["2024-05-06 00:30"], [datetime(2024, 5, 6)], [date(2024, 5, 6)], [at]]
    assert [reader.ids("at_hour", column)[0, 1] for column in same] == [1] * 4
    assert [reader.ids("at_weekday", column)[0, 2] for column in same] == [1] * 4


def test_what_is_no_time_is_a_bad_value(tmp_path):
    for text in ("2024-02-30", "2024-05-01 24:00", "1714521600", "yesterday", "NA"):
        path = written(tmp_path, table(["2024-05-01"] * 3), "csv")
        path.write_text(path.read_text() + f"1,1,{text}\n")
        with pytest.raises(
            DataError, match=f"row 4 .line 5.: at_hour is '{text}', not a time like 2024-05-01"
        ):
            prepared(path, blocks=2)
    manifest = prepared(path, TOML + '[missing_in]\nat = ["NA"]\n', blocks=2)
    assert ids(manifest)[-1].tolist() == [1, 0, 0]
    pl.DataFrame({"click": [0, 1], "user": [1, 2], "at": [1714521600, 3]}).write_parquet(
        tmp_path / "own.parquet"
    )
    with pytest.raises(DataError, match="column at is Int64, which cannot be a time; correct the schema"):
        prepared(tmp_path / "own.parquet", blocks=2)


def test_the_column_that_splits_may_be_one_of_features_too(tmp_path):
    split = 'split = "at"\nsplit_at = ["2024-05-03", "2024-05-06 00:15"]\n'
    path = written(tmp_path, table([text for text in TIMES if text] * 4), "csv")
    manifest = prepared(path, split + TOML)
    assert manifest.rows("train") == 3 * 4
    assert ids(manifest)[:3, 1:].tolist() == [[1, 3], [24, 3], [6, 3]]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("[]", "categorical.at must be one of hex, integer, string, or a list of parts of times, hour and"),
        ('"hour"', "categorical.at must be one of"),
        ('["minute"]', "categorical.at must be one of"),
        ('["hour"]\n"^at$" = ["hour"]', "column ^at$ must be the name of one column"),
        ('["hour", "hour"]', "column at_hour must be named once"),
        ('["hour"]\nat_hour = "integer"', "column at_hour must be named once"),
        ('["hour"]\n[bags]\nat = {}', "bags.at must be of a column in categorical, no times"),
    ],
)
def test_schemas_that_cannot_be_are_refused(kind, words, tmp_path):
    (tmp_path / "own.toml").write_text(TOML.replace('["hour", "weekday"]', kind))
    with pytest.raises(DataError, match=re.escape(words)):
        load_schema(tmp_path / "own.toml")


@pytest.mark.parametrize("form", FORMATS)
def test_a_schema_is_proposed_that_only_lacks_the_hash(form, tmp_path):
    path = written(tmp_path, table(), form)
    text = propose(path, ROWS)
    (line,) = (line for line in text.splitlines() if line.startswith("# at = "))
    assert line.startswith('# at = ["hour", "weekday"]  # left out: a time stamp; ')
    assert prepared(path, text.replace(line, line[2:])).schema.times == {"at_hour": "at", "at_weekday": "at"}
    written(tmp_path, table(["2024-05-01", "2024-05-02"] * 9), form)
    assert '# at = ["weekday"]  # left out' in propose(path, ROWS)


def test_clicks_that_depend_on_the_hour_get_to_an_auc(tmp_path):
    rng = np.random.default_rng(0)
    hours = rng.integers(24 * 60, size=2000)
    at = pl.Series("at", [datetime(2024, 5, 1) + timedelta(hours=int(hour)) for hour in hours])
    click = rng.random(2000) < np.where(hours % 24 < 12, 0.9, 0.1)
    pl.DataFrame({"click": click * 1, "user": rng.integers(9, size=2000), "at": at}).write_csv(
        tmp_path / "own.csv"
    )
    prepared(tmp_path / "own.csv", split="0.5,0.25,0.25")
    words = "--weights 200 --batch 32 --bottom 4 --width 4 --top 8 --block 4 --epochs 3"
    run = tmp_path / "run"
    main(["train", "--data", f"{tmp_path}/own.csv.data", *words.split(), "--out", str(run)])
    # The law has 0.9 * 0.9 + 0.9 * 0.1 = 0.90; 500 rows have a standard error of 0.015.
    assert json.loads((run / "summary.json").read_text())["test"]["auc"] > 0.85
    assert Manifest.load(run / "data").schema.times == {"at_hour": "at", "at_weekday": "at"}
