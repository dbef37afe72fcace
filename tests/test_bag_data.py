"""Columns of bags: from any format to the same batches, as plain Python has them."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import polars as pl
import pytest
import xxhash
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data_pipeline import shard_files, synthetic
from data_pipeline.batches import Batch, Rows, raw_batches
from data_pipeline.columns import frame_reader
from data_pipeline.describe import describe, text
from data_pipeline.folders import verify
from data_pipeline.frames import RowReader
from data_pipeline.job import PrepareConfig
from data_pipeline.manifest import MANIFEST, Manifest
from data_pipeline.prepare import prepare
from data_pipeline.schema import Bag, DataError, Schema, load_schema

TAGS, PAID = Bag("mean", ";"), Bag(weights=True)
SCHEMA = Schema(
    "own",
    "y",
    ("n",),
    ("user", "tags", "paid"),
    ("integer", "integer", "string"),
    bags={"tags": TAGS, "paid": PAID},
)
LAST = np.iinfo(np.int64).max
SIZES = {"block_rows": 4, "window_blocks": 2}

# A row: its user, its tags, and what it paid for, with weights that a text tells exactly.
users = st.none() | st.integers(1, 5)
tags = st.lists(st.sampled_from([0, 1, 2, 7, 2**32 - 1]), max_size=4)
paid = st.lists(st.tuples(st.sampled_from(["a", "b:c", "ä"]), st.sampled_from([-1.5, 0.25, 1.0])), max_size=3)
rows_drawn = st.lists(st.tuples(users, tags, paid), min_size=6, max_size=40)


def write_text(path, rows):
    lines = ["user,n,y,paid,tags"]
    for n, (user, tags, paid) in enumerate(rows):
        cells = ["" if user is None else str(user), str(n), str(n % 2)]
        cells += ["|".join(f"{name}:{weight}" for name, weight in paid), ";".join(map(str, tags))]
        lines.append(",".join(cells))
    path.write_text("\n".join(lines) + "\n")


def as_frame(rows):
    """The same as lists; an empty bag is now a list without ids, and now no list at all."""
    pairs = pl.List(pl.Struct({"of": pl.String, "much": pl.Float64}))
    columns = {
        "tags": pl.Series(
            [tags or (None if n % 2 else []) for n, (_, tags, _) in enumerate(rows)], dtype=pl.List(pl.Int64)
        ),
        "user": pl.Series([user for user, _, _ in rows], dtype=pl.Int64),
        "paid": pl.Series(
            [[{"of": of, "much": much} for of, much in paid] for *_, paid in rows], dtype=pairs
        ),
        "n": range(len(rows)),
        "y": [n % 2 for n in range(len(rows))],
    }
    return pl.DataFrame(columns)


def raw_ids(row):
    """(ids, weights) of the three bags of a row, by hand."""
    user, tags, paid = row
    hashes = [xxhash.xxh32_intdigest(name.encode()) for name, _ in paid]
    return [([user or 0], [1.0]), (tags, [1.0] * len(tags)), (hashes, [weight for _, weight in paid])]


def numbering(rows, least):
    """The dictionaries of the three columns, by first appearance in rows that train."""
    found = []
    for column in range(3):
        seen = list(chain.from_iterable(raw_ids(row)[column][0] for row in rows))
        counts = Counter(seen)
        kept = [value for value in dict.fromkeys(seen) if counts[value] >= least]
        found.append({value: number for number, value in enumerate(kept, 1)})
    return found


def nested(batch):
    """The bags of a batch as lists, row by row."""
    values, offsets, weights = batch.ids
    assert (values.dtype, offsets.dtype, weights.dtype) == (np.uint32, np.int64, np.float32)
    assert len(offsets) == 3 * len(batch.label) + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(values) == len(weights)
    bags = [(values[a:b].tolist(), weights[a:b].tolist()) for a, b in pairwise(offsets)]
    return [bags[i : i + 3] for i in range(0, len(bags), 3)]


def prepared(folder, log, schema=SCHEMA, **settings):
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"dense": "none", "split": "0.5,0.2,0.3", "blocks": 2} | settings
    return prepare(PrepareConfig((log,), folder, schema=schema, **settings))


def digests(folder):
    return [day["sha256"] for day in json.loads((folder / MANIFEST).read_text())["days"]]


@pytest.mark.parametrize("dialect", ["hash", "modulo", "dictionary"])
@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # to shrink takes minutes
@given(rows=rows_drawn, piece=st.sampled_from([9, 1 << 22]), least=st.sampled_from([1, 2]))
def test_any_format_becomes_the_bags_of_plain_python(tmp_path_factory, dialect, rows, piece, least):
    folder = tmp_path_factory.mktemp("bags")
    write_text(folder / "log.csv", rows)
    as_frame(rows).write_parquet(folder / "log.parquet")
    more = {"modulo": {"max_ind_range": 3}, "dictionary": {"min_count": least}}.get(dialect, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_files, "PIECE", piece)
        manifest = prepared(folder / "data", folder / "log.csv", ids=dialect, **more)
        prepared(folder / "lists", folder / "log.parquet", ids=dialect, **more)
    verify(folder / "data")
    assert digests(folder / "data") == digests(folder / "lists")
    number = [{}] * 3
    if dialect == "dictionary":
        number = numbering(rows[: manifest.rows("train")], least)

    def bag(ids, weights, known):
        if dialect == "dictionary":
            return [known.get(i, 0) for i in ids], weights
        return [i % 3 if dialect == "modulo" else i for i in ids], weights

    expected = [[bag(*raw, known) for raw, known in zip(raw_ids(row), number, strict=True)] for row in rows]
    for seed, skip in ((None, 0), (3, 0), (3, 2)):
        epoch = Rows(manifest, None, **SIZES).batches(5, seed=seed, start_step=skip)
        for batch in epoch:
            assert nested(batch) == [expected[int(n)] for n in batch.dense[:, 0]]
    ours = [nested(batch) for batch in Rows(manifest, None).batches(5)]
    for log in ("log.csv", "log.parquet"):
        assert [nested(batch) for batch in raw_batches(folder / log, manifest, 5)] == ours
    dense, ids = RowReader(manifest).rows(as_frame(rows))
    assert nested(Batch(dense[:, 0], dense, ids)) == expected


ROWS = [
    (n % 4 or None, [n % 3, 7][: n % 3], [("a", 0.25), ("b:c", -1.5), ("a", 1.0)][: n % 4]) for n in range(60)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """ROWS as CSV in `log.csv`, prepared with ids modulo 11 in `data`."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "log.csv", ROWS)
    prepared(folder / "data", folder / "log.csv", ids="modulo", max_ind_range=11)
    return folder


def test_the_order_is_that_of_rows_without_bags(data, tmp_path):
    plain = prepared(tmp_path / "plain", data / "log.csv", replace(SCHEMA, bags={}, kinds=("string",) * 3))
    manifest = Manifest.load(data / "data")
    for order in ({"seed": 5, "epoch": 1}, {"seed": 5, "epoch": 1, "start_step": 3}):
        pairs = zip(
            Rows(manifest, None, **SIZES).batches(7, **order),
            Rows(plain, None, **SIZES).batches(7, **order),
            strict=True,
        )
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours.dense, theirs.dense)
            np.testing.assert_array_equal(ours.label, theirs.label)


def test_days_prepared_apart_end_in_the_same_bytes(data, tmp_path):
    paths = data / "log.csv", data / "again.csv"
    shutil.copy(*paths)
    settings = {"ids": "dictionary", "min_count": 2, "schema": SCHEMA, "dense": "zscore"}
    for name, steps in (("whole", [None]), ("apart", ["1", "0", None])):
        for days in steps:
            prepare(PrepareConfig(paths, tmp_path / name, days=days, **settings))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert "day_1_starts.npy" in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()


def test_data_without_bags_say_nothing_of_them(data, tmp_path):
    prepared(tmp_path / "plain", data / "log.csv", replace(SCHEMA, bags={}, kinds=("string",) * 3))
    assert "bags" not in json.loads((tmp_path / "plain" / MANIFEST).read_text())["schema"]
    assert {path.name for path in (tmp_path / "plain").glob("day_0*")} == {
        f"day_0_{kind}.npy" for kind in ("labels", "dense", "sparse")
    }
    assert replace(SCHEMA, bags={}).fingerprint() != SCHEMA.fingerprint()
    assert replace(SCHEMA, bags=SCHEMA.bags | {"tags": Bag("sum", ";")}).fingerprint() != SCHEMA.fingerprint()


def changed(path, change):
    array = np.load(path)
    change(array)
    np.save(path, array)


def raised(array):
    array[5, 1] += 1


def moved(array):
    array[:] += 1


def turned(array):
    array[[4, 8]] = array[[8, 4]]  # where blocks of 4 rows begin


def negative(array):
    array[0] = -8


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "lengths",
            raised,
            "day_0_starts.npy, rows 4 to 8 .*: the ids of these bags are .*, but their lengths",
        ),
        ("starts", moved, "rows 0 to 4 .*: the ids of these bags are 1 to"),
        ("starts", turned, "the ids of these bags are"),
        ("starts", negative, "the ids of these bags are -8 to"),
    ],
)
def test_damaged_offsets_are_refused(data, tmp_path, kind, change, message):
    shutil.copytree(data / "data", tmp_path / "data")
    changed(tmp_path / "data" / f"day_0_{kind}.npy", change)
    manifest = Manifest.load(tmp_path / "data")
    for seed in (None, 1):
        with pytest.raises(DataError, match="prepare the data again") as error:
            list(Rows(manifest, None, block_rows=4, window_blocks=1).batches(60, seed=seed))
        if seed is None:
            assert re.search(message, str(error.value))
    with pytest.raises(DataError, match=f"day_0_{kind}.npy: its bytes are not those that were written"):
        verify(tmp_path / "data")


def test_ids_and_weights_that_cannot_be_are_named(data, tmp_path):
    shutil.copytree(data / "data", tmp_path / "data")
    manifest = Manifest.load(tmp_path / "data")
    start = int(np.load(tmp_path / "data" / "day_0_starts.npy")[7, 0])
    for kind, value, words in (
        ("weights", np.nan, "finite"),
        ("sparse", 11, "below its column's cardinality"),
    ):
        path = tmp_path / "data" / f"day_0_{kind}.npy"
        changed(path, lambda array, value=value: array.__setitem__(start + 1, value))
        with pytest.raises(DataError) as error:
            Rows(manifest, None).require_possible("sparse")
        assert f"{path}, row 7 (from 0), column tags: {value} is not {words}; prepare" in str(error.value)
    changed(tmp_path / "data" / "day_0_weights.npy", lambda array: None)
    np.save(tmp_path / "data" / "day_0_weights.npy", np.ones((3, 1), np.float32))
    with pytest.raises(DataError, match="holds 3 weights of"):
        Rows(manifest, None)
    (tmp_path / "data" / "day_0_starts.npy").unlink()
    with pytest.raises(DataError, match=r"day_0_starts.npy: missing, though manifest.json lists it"):
        Rows(manifest, None)


@pytest.mark.parametrize(
    ("tags", "paid", "message"),
    [
        ("3;x", "", "tags is '3;x', not up to 65,535 ids, each an integer"),
        ("3|4", "", "tags is '3|4', not"),
        (";".join(["1"] * 65_536), "", "tags is '1;1;1;1;1;1;1;1;1;1;1;1;', not up to 65,535 ids"),
        ("", "a", "paid is 'a', not up to 65,535 ids, each a text with a finite weight"),
        ("", "a:", "paid is 'a:', not"),
        ("", "a:1|b:nan", "paid is 'a:1|b:nan', not"),
        ("", "a:1e39", "paid is 'a:1e39', not"),
        ("", "a:1|b:2|c:x", "paid is 'a:1|b:2|c:x', not"),
    ],
)
def test_a_bad_cell_is_a_bad_row(data, tmp_path, tags, paid, message):
    log, manifest = tmp_path / "log.csv", Manifest.load(data / "data")
    log.write_text(f"user,n,y,paid,tags\n1,0,0,a:1,2\n1,1,1,{paid},{tags}\n1,2,0,,;3;;4\n")
    with pytest.raises(DataError) as error:
        list(raw_batches(log, manifest, 5))
    assert f"{log}, row 2 (line 3): {message}" in str(error.value)
    bad = []
    (batch,) = raw_batches(log, manifest, 5, on_bad=lambda row, why: bad.append(row))
    a = xxhash.xxh32_intdigest(b"a") % 11
    one = ([1], [1.0])
    assert nested(batch) == [
        [one, ([2], [1.0]), ([a], [1.0])],
        [([], [])] * 3,
        [one, ([3, 4], [1.0] * 2), ([], [])],
    ]
    assert bad == [1]


def test_lists_are_checked_as_texts_are(data, tmp_path):
    manifest = Manifest.load(data / "data")
    good = as_frame(ROWS[:3])
    reader = RowReader(manifest)
    for paid, tags, message in (
        ([{"of": "a", "much": np.nan}], [1], "paid is .*, not up to .* with a finite weight"),
        ([{"of": "a", "much": None}], [1], "paid is .*, not up to .* with a finite weight"),
    ):
        row = pl.DataFrame({"user": [1], "n": [0], "y": [0], "tags": [tags], "paid": [paid]})
        with pytest.raises(DataError, match=f"row 0: {message}"):
            reader.rows(row)
    for column in (pl.Series("paid", [["a"], ["b"], None]), pl.Series("paid", [["a:1"], [None], None])):
        table = good.with_columns(column)
        if column[0][0] == "a":
            with pytest.raises(DataError, match=r"paid is .*, not"):
                reader.rows(table)
        else:
            reader.rows(table)
    with pytest.raises(DataError, match=r"paid is List\(Int64\), but its ids have weights; give texts"):
        reader.rows(good.with_columns(pl.Series("paid", [[1], [2], [3]])))
    single = {"user": ["4"], "n": [1], "tags": [6], "paid": ["a:2"]}  # one id each
    _, ids = reader.rows(single)
    assert ids.values.tolist() == [4, 6, xxhash.xxh32_intdigest(b"a") % 11]
    assert ids.weights.tolist() == [1, 1, 2]


@pytest.mark.parametrize("name", ["weight", "ids", "bad", "", "a:"])
def test_names_of_bags_are_data(name):
    schema = Schema("own", "y", (), (name,), ("integer",), bags={name: PAID})
    found = frame_reader(schema, "own")(pl.DataFrame({name: ["3:0.5|4:2", ""]}))
    values, offsets, weights = found.ids(schema)
    assert (values.tolist(), offsets.tolist(), weights.tolist()) == ([3, 4], [0, 2, 2], [0.5, 2.0])
    plain = replace(schema, bags={name: Bag()})
    found = frame_reader(plain, "own")(pl.DataFrame({name: [[3, 4], []]}))
    assert found.ids(plain).values.tolist() == [3, 4]


def test_the_bags_of_one_column_alone(data):
    reader = RowReader(Manifest.load(data / "data"))
    ids = reader.ids("tags", [[3, 15], []])
    assert (ids.values.tolist(), ids.offsets.tolist()) == ([3, 4], [0, 0, 2, 2, 2, 2, 2])


def test_describe_counts_ids_by_bag(data):
    found = describe(Manifest.load(data / "data"), 10**6)
    lengths = np.array([[len(ids) for ids, _ in raw_ids(row)] for row in ROWS])
    assert [column.mean for column in found.categorical] == lengths.mean(axis=0).tolist()
    assert [column.most for column in found.categorical] == [1, 2, 3]
    ids = np.array(list(chain.from_iterable(raw_ids(row)[1][0] for row in ROWS)))
    assert found.categorical[1].zeros == (ids == 0).mean()
    assert found.categorical[1].counts.tolist() == sorted(Counter(ids[ids != 0].tolist()).values())[::-1]
    assert "tags                mean              1           2" in text(found)


SCHEMA_TEXT = """
label = "y"
categorical = { user = "integer", tags = "integer", paid = "string" }
dense = ["n"]
[bags]
tags = { pooling = "mean", separator = ";" }
paid = { weights = true }
"""


def test_a_schema_has_bags(tmp_path):
    (tmp_path / "own.toml").write_text(SCHEMA_TEXT)
    assert load_schema(tmp_path / "own.toml") == SCHEMA
    assert SCHEMA.poolings() == ("sum", "mean", "sum")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"mean"', '"median"', "bags: pooling must be one of sum, mean, max"),
        ('";"', '";;"', "bags: separator must be one character"),
        (
            "weights = true",
            'weights = true, separator = ":"',
            "bags: separator must be one character, and not that",
        ),
        ("weights = true", 'weights = "paid"', "bags: weights must be true or false"),
        (
            "weights = true",
            'weights = true, pooling = "max"',
            "bags: weights must be true or false, and false where",
        ),
        (
            "weights",
            "weight",
            "bags.paid must be a table with no other keys than pooling, separator, weights",
        ),
        ("paid = {", "n = {", "bags.n must be of a column in categorical"),
        ("[bags]", "[[bags]]", "bags must be a table of COLUMN = { pooling = POOLING, ... }"),
    ],
)
def test_a_bad_bag_is_refused(tmp_path, old, new, message):
    (tmp_path / "own.toml").write_text(SCHEMA_TEXT.replace(old, new))
    with pytest.raises(DataError) as error:
        load_schema(tmp_path / "own.toml")
    assert f"own.toml: {message}" in str(error.value)


def test_the_law_of_synthetic_bags_is_what_plain_python_says(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "SAMPLE_CHUNKS", 1)
    config = synthetic.SyntheticConfig(tmp_path, bags=True)
    law, plain = synthetic.BagLaw(config), synthetic.Law(config)
    chunk = law.draw(40, 0)
    values = law.values(chunk.ranks)
    lines = synthetic.to_text(chunk, values).decode().splitlines()
    sizes = set()
    for row, line in enumerate(lines):
        cells = line.split("\t")[14:]
        pooled = np.zeros((26, 4))
        for feature, cell in enumerate(cells):
            ranks = chunk.ranks[row, :, feature]
            there = ranks[ranks > 0]
            assert cell == "|".join(f"{value:08x}" for value in values[row, : len(there), feature])
            parts = [
                plain._parameters(np.full((1, 26), rank, np.uint32))[0, feature].astype(float)
                for rank in (there if feature in synthetic.BAGS else ranks[:1])
            ]
            pooled[feature] = np.sum(parts, axis=0) if parts else 0
            if synthetic.BAGS.get(feature) == "mean" and parts:
                pooled[feature] /= len(parts)
            if feature in synthetic.BAGS:
                sizes.add(len(there))
        pooled -= law.centre
        latent = pooled[synthetic.PAIRED, 1:]
        pairs = sum(latent[i] @ latent[j] for i in range(7) for j in range(i))
        counts = np.log1p(np.maximum(np.nan_to_num(chunk.dense[row]), 0)) @ law.dense_weights
        logit = np.array([counts, pooled[:, 0].sum(), pairs]) @ law.part_weights + law.bias
        assert chunk.logit[row] == pytest.approx(logit, abs=1e-4)  # of float32 sums
    assert sizes == set(range(synthetic.BAG_IDS + 1))
