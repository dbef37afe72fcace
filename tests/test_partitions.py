"""Folders of Parquet files, partitioned or not, from the files to shards."""

import numpy as np
import polars as pl
import pytest

from data_pipeline.batches import Rows
from data_pipeline.columns import hash_texts
from data_pipeline.input_files import input_files
from data_pipeline.logs import count_rows, read_log
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.proposal import propose
from data_pipeline.schema import DataError, Schema

SCHEMA = Schema("own", "click", (), ("user", "country"), ("integer", "string"))


def written(path, users, **more):
    """A table of these users; the odd ones clicked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"click": [user is not None and int(user) % 2 for user in users], "user": users}
    pl.DataFrame(columns | more).write_parquet(path)


def prepared(tmp_path, *inputs, schema=SCHEMA, **options):
    """(days, the ids of all rows in order) of a preparation."""
    manifest = prepare(PrepareConfig(inputs, tmp_path / "out", schema=schema, **options))
    return manifest.days, next(Rows(manifest, None).batches(100)).ids.tolist()


def test_partitions_are_days_and_their_files_one_log(tmp_path):
    """Days and files come by number, with partitions within a day; files need not agree on a type."""
    log = tmp_path / "log"
    written(log / "date=2024-01-10" / "country=A%20B" / "part-0.parquet", [8, 9])
    written(log / "date=2024-01-9" / "country=DE" / "part-10.parquet", [4.0, None])
    written(log / "date=2024-01-9" / "country=DE" / "part-2.parquet", [2, 3])
    written(log / "date=2024-01-9" / "country=__HIVE_DEFAULT_PARTITION__" / "part-3.parquet", [5])
    written(log / "date=2024-01-9" / "_temporary" / "part-1.parquet", [77])
    written(log / "date=2024-01-11" / "country=DE" / "part-0.parquet", [6, 7])
    (log / "_SUCCESS").touch()
    days, ids = prepared(tmp_path, log)
    assert [day.source for day in days] == [str(log / f"date=2024-01-{day}") for day in (9, 10, 11)]
    assert [day.rows for day in days] == [5, 2, 2]
    de, ab = hash_texts(pl.Series(["DE", "A B"])).to_list()
    expected = [[2, de], [3, de], [4, de], [0, de], [5, 0], [8, ab], [9, ab], [6, de], [7, de]]
    assert ids == expected
    assert 'country = "string"' in propose(log, 10)


def test_years_months_and_days(tmp_path):
    for month, day in ((2, 1), (1, 31), (1, 4)):
        written(tmp_path / "year=2024" / f"month={month}" / f"day={day}" / "a.parquet", [month, day])
    (tmp_path / "year=2024" / "month=3").mkdir()
    days = [str(path.relative_to(tmp_path)) for path in input_files((tmp_path,))]
    assert days == [f"year=2024/month={month}/day={day}" for month, day in ((1, 4), (1, 31), (2, 1))]


@pytest.mark.parametrize("named", ["folder", "pattern"])
def test_a_flat_folder_is_a_file_a_day(tmp_path, named):
    for part in (10, 9, 1):
        written(tmp_path / "log" / f"part-{part}.parquet", [part, part], country=["DE", "DE"])
    days, ids = prepared(tmp_path, tmp_path / ("log" if named == "folder" else "log/part-*.parquet"))
    assert [user for user, _ in ids] == [1, 1, 9, 9, 10, 10]
    assert len(days) == 3


def test_one_partition_is_cut_into_days_across_its_files(tmp_path):
    """And read from a row on; a bad row is told by its file."""
    day = tmp_path / "date=1"
    for part, users in enumerate(([1, 2, 3], [4, 5, 6, 7], [8])):
        written(day / f"{part}.parquet", users, country=["DE"] * len(users))
    assert count_rows(day, SCHEMA) == 8
    chunks = list(read_log(day, SCHEMA, first_line=6, slice_rows=2))
    assert np.concatenate([chunk.line for chunk in chunks]).tolist() == [6, 7, 8]
    assert np.concatenate([chunk.ids[:, 0] for chunk in chunks]).tolist() == [6, 7, 8]
    whole = list(read_log(day, SCHEMA, slice_rows=3))
    assert [chunk.position for chunk in whole][-1] == sum(file.stat().st_size for file in day.iterdir())
    days, ids = prepared(tmp_path, tmp_path, blocks=2)
    assert [part.rows for part in days] == [4, 4]
    assert [user for user, _ in ids] == list(range(1, 9))
    written(day / "1.parquet", [4.0, 5.5, 6.0, 7.0], country=["DE"] * 4)
    with pytest.raises(DataError, match=rf"^{day}, row 2 of 1.parquet: user is '5.5', not a whole number"):
        list(read_log(day, SCHEMA))


def test_layouts_that_do_not_say_what_a_day_is(tmp_path):
    log = tmp_path / "log"
    written(log / "date=1" / "a.parquet", [1])
    written(log / "date=1" / "b.parquet", [1])
    one = (log / "date=1" / "a.parquet", log / "date=1" / "b.parquet")
    assert input_files(one) == input_files((log / "date=1",)) == list(one)
    written(log / "dt=2" / "a.parquet", [1])
    with pytest.raises(
        DataError, match=r"b.parquet: is in one partition with a.parquet.*; name \S*date=1 instead"
    ):
        input_files((*one, log / "dt=2" / "a.parquet"))
    with pytest.raises(DataError, match=r"dt=2: does not say which day it is as date=1 does; name the days"):
        input_files((log,))
    assert input_files((log / "date=1", log / "dt=2"), "given") == [log / "date=1", log / "dt=2"]
    written(log / "c.parquet", [1])
    with pytest.raises(
        DataError, match=r"log: holds a partition, date=1, beside a file, c.parquet; name the"
    ):
        input_files((log,))
    with pytest.raises(DataError, match=r"none\*: no file matches; check the path"):
        input_files((tmp_path / "none*",))
