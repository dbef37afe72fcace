"""Splits that a column of the table tells, from the file to the AUC of a training."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest

from data_pipeline import parse_days
from data_pipeline.batches import Rows
from data_pipeline.folders import verify
from data_pipeline.logs import read_log
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.proposal import propose
from data_pipeline.schema import DataError, load_schema, moment
from robe.cli import main

TOML = 'label = "click"\nweight = "worth"\nsplit = "part"\ndense = ["number"]\n[transform]\nnumber = "none"\n'
TOML += '[categorical]\nuser = "integer"\ntags = "string"\n[bags]\ntags = {}\n'
WORDS = {"train": ["train"], "validation": ["validation", "valid", "val"], "test": ["test"]}
FORMATS = ("csv", "parquet", "jsonl")
ROWS = 600


@pytest.fixture
def log(tmp_path):
    """A table with bags and weights whose numbers are those of its rows; part is of no order."""
    rng = np.random.default_rng(0)
    user = rng.integers(20, size=ROWS)
    columns = {"click": (rng.random(ROWS) < user / 20) * 1, "worth": rng.integers(1, 4, ROWS)}
    columns |= {"number": np.arange(ROWS), "user": user, "tags": rng.choice(["", "a", "a|b"], ROWS)}
    words = ["train"] * 6 + [word for names in WORDS.values() for word in names]
    frame = pl.DataFrame(columns | {"part": rng.choice(words, ROWS)})
    written(tmp_path, frame)
    (tmp_path / "log.toml").write_text(TOML)
    return frame


def written(folder, frame):
    frame.write_csv(folder / "log.csv")
    frame.write_parquet(folder / "log.parquet")
    frame.write_ndjson(folder / "log.jsonl")


def prepared(folder, name="data", inputs=("log.csv",), **options):
    schema, files = load_schema(folder / "log.toml"), tuple(folder / one for one in inputs)
    return prepare(PrepareConfig(files, folder / name, schema=schema, dense="none", **options))


def numbers(manifest, split):
    """The numbers of the rows of a split, in order."""
    return np.concatenate([rows.dense[:, 0] for rows in Rows(manifest, split).batches(70)]).astype(int)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_end_in_the_split_that_they_name(log, tmp_path):
    manifests = [prepared(tmp_path, f"{form}.data", [f"log.{form}"]) for form in FORMATS]
    for name in SPLITS:
        mine = log.filter(pl.col("part").is_in(WORDS[name]))
        found = list(Rows(verify(tmp_path / "csv.data"), name).batches(70))
        for part in ("label", "weight"):
            column = np.concatenate([getattr(rows, part) for rows in found])
            np.testing.assert_array_equal(column, mine["click" if part == "label" else "worth"])
        np.testing.assert_array_equal(numbers(manifests[0], name), mine["number"])
        lengths = np.concatenate([rows.ids.lengths(2)[:, 1] for rows in found])
        np.testing.assert_array_equal(lengths, mine["tags"].str.extract_all("[ab]").list.len())
    assert (
        manifests[0]
        .describe()
        .endswith(
            "rows train, validate and test as column part says; "
            f"test: {tmp_path}/log.csv, rows whose part is test, "
            f"validation: {tmp_path}/log.csv, rows whose part is validation"
        )
    )
    assert all(one.same_rows(manifests[0]) for one in manifests[1:])


def test_the_bytes_are_the_same_however_the_work_is_cut(log, tmp_path, monkeypatch):
    prepared(tmp_path, "whole")
    assert prepared(tmp_path, "shared", days="2") is None
    (tmp_path / "log.toml").write_text(TOML.replace('"part"', '"other"'))
    with pytest.raises(
        DataError, match=r"was begun with split_by \['part'\], not \['other'\]; go on with the same"
    ):
        prepared(tmp_path, "shared")
    (tmp_path / "log.toml").write_text(TOML)
    monkeypatch.setattr(parse_days, "read_log", partial(read_log, block_bytes=500))
    prepared(tmp_path, "shared")
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_the_table_is_read_once(log, tmp_path, monkeypatch):
    """And again for a day that is lacking, by which time the others are as they were."""
    asked = []

    def read(path, *arguments, **options):
        asked.append(path.name)
        yield from read_log(path, *arguments, **options)

    monkeypatch.setattr(parse_days, "read_log", read)
    seen = []
    schema = load_schema(tmp_path / "log.toml")
    config = PrepareConfig((tmp_path / "log.csv",), tmp_path / "data", schema=schema)
    prepare(config, lambda done, total: seen.append((done, total)))
    size = (tmp_path / "log.csv").stat().st_size
    assert asked == ["log.csv"]
    assert seen[-1] == (size, size)
    for days in ("1", "0,2"):
        assert prepare(replace(config, out=tmp_path / "shared", days=days)) is None
    prepare(replace(config, out=tmp_path / "shared"))
    assert asked == ["log.csv"] * 3
    assert contents(tmp_path / "shared") == contents(tmp_path / "data")


def test_the_split_changes_no_value_and_leaves_no_trace_where_there_is_none(log, tmp_path):
    """So a model may be evaluated on rows that were split in another way."""
    split = prepared(tmp_path)
    (tmp_path / "log.toml").write_text(TOML.replace('split = "part"\n', ""))
    plain = prepared(tmp_path, "plain")
    assert split.fingerprint() == plain.fingerprint()
    told = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("data", "plain")]
    assert told[0]["schema"].keys() - told[1]["schema"].keys() == {"split"}


def test_a_folder_of_parquet_is_one_log(log, tmp_path):
    (tmp_path / "parts").mkdir()
    for part in range(3):
        log[part * 200 : (part + 1) * 200].write_parquet(tmp_path / "parts" / f"part-{part}.parquet")
    assert prepared(tmp_path, "folder", ["parts"]).same_rows(prepared(tmp_path))
    with pytest.raises(DataError, match=r"log.parquet: is a second file, .* put them together"):
        prepared(tmp_path, "two", ["log.csv", "log.parquet"])


def test_other_options_go_with_it(log, tmp_path):
    """Negatives are dropped where rows train alone, and ids are numbered by what these have."""
    manifest = prepared(tmp_path, "thinned", keep_negatives=0.25)
    assert [day.dropped > 0 for day in manifest.days] == [True, False, False]
    train = log.filter(pl.col("part") == "train")
    assert manifest.days[0].rows + manifest.days[0].dropped == len(train)
    assert set(train.filter(pl.col("click") == 1)["number"]) <= set(numbers(manifest, "train"))
    numbered = prepared(tmp_path, "numbered", ids="dictionary")
    users = [batch.ids.part(0, 1, 2).values[0] for batch in Rows(numbered, "train").batches(1)]
    first = {user: i + 1 for i, user in enumerate(train["user"].unique(maintain_order=True))}
    assert users == [first[user] for user in train["user"]]


def timed(folder, frame, part, at):
    """The table with times in place of its parts."""
    written(folder, frame.with_columns(part=part))
    (folder / "log.toml").write_text(TOML.replace("dense", f"split_at = {at}\ndense", 1))


DAYS = ["2024-04-30T23:59:59.999999", "2024-05-01", "2024-05-31 12:30", "2024-05-31T23:59Z", "2024-06-01"]
DAYS += ["2024-06-01T01:30:00+02:00", "2024-05-01T01:30:00.5+0200", "2023-02-28", "2030-01-01 00:00:00"]
PARTS = ["train", *["validation"] * 3, "test", "validation", "train", "train", "test"]


def test_a_time_splits_alike_in_every_format(log, tmp_path):
    """The first of two times validates, the second tests; the zone counts, and without one it is UTC."""
    at = '["2024-05-01", "2024-06-01"]'
    which = np.arange(ROWS) % len(DAYS)
    timed(tmp_path, log, pl.Series(DAYS)[which], at)
    manifests = [prepared(tmp_path, f"{form}.data", [f"log.{form}"]) for form in FORMATS]
    utc = pl.Series(DAYS).map_elements(moment, pl.Datetime("us"))[which]
    stamps = {"plain": utc, "zoned": utc.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")}
    stamps |= {"fine": utc.cast(pl.Datetime("ns"))}
    for name, part in stamps.items():
        log.with_columns(part=part).write_parquet(tmp_path / f"{name}.parquet")
        manifests.append(prepared(tmp_path, f"{name}.data", [f"{name}.parquet"]))
    log.with_columns(part=stamps["zoned"]).write_csv(tmp_path / "again.csv")
    manifests.append(prepared(tmp_path, "again.data", ["again.csv"]))
    for name in SPLITS:
        mine = [row for row in range(ROWS) if PARTS[row % len(PARTS)] == name]
        assert numbers(manifests[0], name).tolist() == mine
    assert all(one.same_rows(manifests[0]) for one in manifests[1:])
    assert "log.csv, rows whose part is from 2024-06-01 on" in manifests[0].split_note


def test_dates_and_numbers_are_times(log, tmp_path):
    """TOML's own dates, Arrow's, and seconds, which CSV and JSON lines have as texts."""
    day = pl.Series(np.arange(ROWS) % 30 + 1)
    expected = {"train": day < 11, "validation": (day >= 11) & (day < 21), "test": day >= 21}
    seconds = day * 86_400 + 1_700_000_000
    numbered = "[1_700_950_400, 1_701_814_400.0]"
    cases = (
        (pl.date(2024, 5, day), "[2024-05-11, 2024-05-21]", FORMATS),
        (seconds, numbered, FORMATS),
        (seconds.cast(pl.Float64), numbered, ["parquet"]),
    )
    for case, (part, at, forms) in enumerate(cases):
        timed(tmp_path, log, part, at)
        for form in forms:
            manifest = prepared(tmp_path, f"{form}.{case}", [f"log.{form}"])
            for name, rows in expected.items():
                np.testing.assert_array_equal(numbers(manifest, name), rows.arg_true())


@pytest.mark.parametrize("bad", ["", "1714521600", "2024-02-30", "01/05/2024"])
def test_other_texts_are_bad_times(bad, log, tmp_path):
    part = pl.when(pl.col("number") == 7).then(pl.lit(bad)).otherwise(pl.lit("2024-05-01"))
    timed(tmp_path, log, part, '["2024-05-01", "2024-06-01"]')
    words = rf"log.csv, row 8 \(line 9\): part is '{bad}', not a time like 2024-05-01 or .*; correct it"
    with pytest.raises(DataError, match=words):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (pl.lit(None, pl.Float64), "part is 'None', not a number"),
        (pl.date(2024, 5, 1), "is Date, which cannot"),
    ],
)
def test_missing_times_and_those_of_another_kind_are_refused(part, words, log, tmp_path):
    timed(tmp_path, log, part, "[1, 2]")
    with pytest.raises(DataError, match=rf"log\.parquet.*{words}"):
        prepared(tmp_path, inputs=["log.parquet"])


@pytest.mark.parametrize(
    ("part", "bounds"),
    [
        (pl.date(2024, 5, pl.col("number") // 20 + 1), '["2024-05-25", "2024-05-28"]'),
        (1_700_000_000 + pl.col("number") * 3600, "[1701728000, 1701944000]"),
    ],
)
def test_times_are_proposed_for_splits(part, bounds, log, tmp_path):
    """As comments, which hold once the # is taken away, whatever the format."""
    written(tmp_path, log.with_columns(created_at=part).drop("part"))
    for form in FORMATS:
        text = propose(tmp_path / f"log.{form}", ROWS)
        assert f'# split = "created_at"\n# split_at = {bounds}  # behind 80% and 90% of these' in text
        (tmp_path / "log.toml").write_text(text.replace("# split", "split"))
        manifest = prepared(tmp_path, f"{form}.data", [f"log.{form}"])
        assert [day.rows for day in manifest.days] == [480, 60, 60]
    written(tmp_path, log.drop("part"))
    assert "split" not in propose(tmp_path / "log.csv", ROWS)


@pytest.mark.parametrize(
    "at",
    ['["2024-06-01", "2024-05-01"]', '["2024-05-01", 3]', '["May", "June"]', "[1]", "[true, 2]", "[1, nan]"],
)
def test_two_times_of_one_kind_split(at, tmp_path):
    (tmp_path / "log.toml").write_text(TOML.replace("dense", f"split_at = {at}\ndense", 1))
    with pytest.raises(DataError, match=r"split_at must be two times, .* the earlier first"):
        load_schema(tmp_path / "log.toml")
    (tmp_path / "log.toml").write_text(TOML.replace('split = "part"', "split_at = [1, 2]"))
    with pytest.raises(DataError, match="split_at must be beside a split"):
        load_schema(tmp_path / "log.toml")


@pytest.mark.parametrize("bad", ["", "Train", "holdout"])
def test_other_values_are_bad_cells(bad, log, tmp_path):
    written(
        tmp_path, log.with_columns(part=pl.when(pl.col("number") == 7).then(pl.lit(bad)).otherwise("part"))
    )
    for form, where in (("csv", r"row 8 \(line 9\)"), ("parquet", "row 8"), ("jsonl", "line 8")):
        words = (
            f"log.{form}, {where}: part is '{bad}', not one of train, validation, valid, val, test; correct"
        )
        with pytest.raises(DataError, match=words) as refused:
            prepared(tmp_path, inputs=[f"log.{form}"])
        assert "\n" not in str(refused.value)
    manifest = prepared(tmp_path, bad_rows="skip")
    assert [day.rejected for day in manifest.days] == [1, 0, 0]
    assert sum(day.rows for day in manifest.days) == ROWS - 1
    assert (tmp_path / "data" / "rejected.tsv").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "0.8,0.1,0.1"},
            "--split 0.8,0.1,0.1: column part of the schema's `split` says which rows",
        ),
        (
            {"split": "mlperf"},
            "--split mlperf: column part of the schema's `split` says which rows test; leave",
        ),
        ({"inputs": ["raw"]}, "a raw log holds integers and hex digits alone, but schema log sets .*split"),
        ({"inputs": ["none.csv"]}, "none.csv: has no column 'part'"),
        ({"inputs": ["few.csv"]}, "few.csv, rows whose part is test: no usable row; give some"),
        ({"inputs": ["types.parquet"]}, "types.parquet: column part is Int64, which cannot be a split; corr"),
    ],
)
def test_what_cannot_be_split_is_refused(options, message, log, tmp_path):
    log.drop("part").write_csv(tmp_path / "none.csv")
    log.filter(pl.col("part") != "test").write_csv(tmp_path / "few.csv")
    log.with_columns(part=0).cast({"part": pl.Int64}).write_parquet(tmp_path / "types.parquet")
    (tmp_path / "raw").write_text("1\t2\t3\t4\n")
    with pytest.raises(DataError, match=message) as refused:
        prepared(tmp_path, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / ".data.partial").exists() or "few" in message


def test_days_are_not_appended_to_such_a_folder(log, tmp_path):
    prepared(tmp_path)
    with pytest.raises(
        DataError, match=r"data: column part of the schema's `split` says .*, so --append cannot"
    ):
        prepared(tmp_path, "more", append=tmp_path / "data")


def test_from_the_table_to_an_auc(log, tmp_path, capsys):
    """Predictions need no column that splits; whoever guesses has an AUC of 0.5."""
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    main(["prepare", str(tmp_path / "log.csv"), "--schema", str(tmp_path / "log.toml"), "--out", data])
    tiny = "--weights 400 --block 4 --bottom 4 --width 4 --top 4 --batch 32 --lr 0.05 --epochs 3"
    main(["train", "--data", data, "--out", run, *tiny.split(), "--backend", "reference"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["auc"] > 0.6
    assert "rows train, validate and test as column part says" in capsys.readouterr().out
    log.drop("part", "click", "worth").write_csv(tmp_path / "new.csv")
    main(["predict", run, str(tmp_path / "new.csv"), "--backend", "reference", "--out", str(tmp_path / "p")])
    assert len(np.loadtxt(tmp_path / "p")) == ROWS
    assert Manifest.load(data).rows("test") == (log["part"] == "test").sum()
