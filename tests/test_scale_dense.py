"""Transforms that are measured: by training rows alone, in any pieces, and the same wherever they apply."""

import dataclasses
import json
from functools import partial

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_parser import lines, write

from data_pipeline import parse_days, shard_files
from data_pipeline.batches import Rows, raw_batches
from data_pipeline.describe import describe
from data_pipeline.folders import verify
from data_pipeline.frames import RowReader
from data_pipeline.manifest import MANIFEST, Manifest
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.scale_dense import KNOTS, MEASURES
from data_pipeline.schema import DataError, Schema
from robe.config import ConfigError, DataSpec

NUMBERS = st.floats(-1e6, 1e6, width=32) | st.integers(-5, 5).map(float)


def dense(folder, split=None):
    batch = next(Rows(Manifest.load(folder), split).batches(10**6))
    return batch.dense


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three days of a raw log, prepared by each transform; the last day is not trained on."""
    folder = tmp_path_factory.mktemp("scaled")
    files = tuple(write(folder / f"day_{day}", lines(300, seed=day)) for day in range(3))
    for transform in ("log1p", "none", "zscore", "quantile"):
        prepare(PrepareConfig(files, folder / transform, dense=transform))
    return folder


def expected(folder, transform):
    """By the definition, over all training rows at once."""
    base = {"zscore": "log1p", "quantile": "none"}[transform]
    train, rows = (dense(folder / base, split).astype(float) for split in ("train", None))
    if transform == "zscore":
        return (rows - train.mean(axis=0)) / train.std(axis=0)
    below, up_to = (
        np.stack([np.searchsorted(np.sort(a), b, side) for a, b in zip(train.T, rows.T, strict=True)], axis=1)
        for side in ("left", "right")
    )
    return np.sqrt(12) * ((below + up_to) / 2 / len(train) - 0.5)


def test_values_are_those_of_the_definition(folders):
    found = dense(folders / "zscore")
    np.testing.assert_allclose(found, expected(folders, "zscore"), atol=2e-5)
    train = dense(folders / "zscore", "train")
    np.testing.assert_allclose((train.mean(axis=0), train.std(axis=0)), ([0] * 13, [1] * 13), atol=2e-5)
    # Of so few different numbers all are kept.
    np.testing.assert_allclose(dense(folders / "quantile"), expected(folders, "quantile"), atol=1e-6)


def test_quantiles_of_many_numbers_are_near(rng):
    """And a tenth of them is the largest."""
    column = (rng.lognormal(0, 3, 50_000) * rng.choice([-1, 1], 50_000)).astype(np.float32)
    column = np.minimum(column, np.sort(column)[45_000])
    ranks = MEASURES["quantile"]()
    ranks.add(column)
    knots = np.array(ranks.pairs())
    assert KNOTS < len(knots) <= 2 * KNOTS + 1
    found = np.interp(np.sort(column), *knots.T)
    share = np.where(np.arange(50_000) < 45_000, np.arange(50_000) / 50_000, 0.95)
    error = np.sort(abs(found - np.sqrt(12) * (share - 0.5)))
    assert error[-10] < np.sqrt(12) / KNOTS  # a few rows have numbers that are counted as the largest
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))


@pytest.mark.parametrize("transform", ["zscore", "quantile"])
def test_nothing_else_changes_and_all_readers_agree(folders, transform, tmp_path):
    for path in (folders / "log1p").iterdir():
        same = path.read_bytes() == (folders / transform / path.name).read_bytes()
        assert same == (path.suffix == ".npy" and "dense" not in path.name), path.name
    assert "measured" not in json.loads((folders / "log1p" / MANIFEST).read_text())
    manifest = verify(folders / transform)
    batches = [next(raw_batches(folders / f"day_{day}", manifest, 10**6)) for day in range(3)]
    np.testing.assert_array_equal(
        np.concatenate([batch.dense for batch in batches]), dense(folders / transform)
    )
    zeros, plain = (
        [column.zeros for column in describe(Manifest.load(folders / name), 10**6).dense]
        for name in (transform, "none" if transform == "quantile" else "log1p")
    )
    assert zeros == plain
    assert 0 < max(zeros) < 1


@pytest.mark.parametrize("transform", ["zscore", "quantile"])
def test_neither_pieces_nor_days_matter(folders, transform, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "PIECE", 13 * 7)
    monkeypatch.setattr(parse_days, "read_log", partial(parse_days.read_log, block_bytes=3000))
    one = tmp_path / "all"
    one.write_bytes(b"".join((folders / f"day_{day}").read_bytes() for day in range(3)))
    prepare(PrepareConfig((one,), tmp_path / "out", dense=transform, blocks=9, split="test=6,validation=7-8"))
    assert Manifest.load(tmp_path / "out").measured == Manifest.load(folders / transform).measured
    np.testing.assert_array_equal(dense(tmp_path / "out"), dense(folders / transform))


@given(st.lists(NUMBERS, min_size=1, max_size=300), st.lists(st.integers(0, 300), max_size=4))
@settings(max_examples=50, deadline=None)
@example([0.0, -1e-43], [])  # as near to 0 as float32 numbers are
@example([-0.0, 1.0, -1.0], [1])
def test_columns_are_measured_alike_in_any_order_and_pieces(numbers, cuts):
    column = np.array(numbers, np.float32)
    logarithms = np.log1p(np.maximum(column, 0))
    for name, values in (("zscore", logarithms), ("quantile", column)):
        whole, pieces = MEASURES[name](), MEASURES[name]()
        whole.add(values)
        for piece in np.split(values[::-1], sorted(cuts)):
            pieces.add(piece)
        assert whole.pairs() == pieces.pairs()
        if name == "zscore":
            ((mean, deviation),) = whole.pairs()
            assert mean == pytest.approx(values.mean(dtype=float), abs=1e-5)
            assert deviation == pytest.approx(values.std(dtype=float) or 1, abs=1e-3) or values.std() < 1e-5
        else:
            knots = np.array(whole.pairs())
            assert (np.diff(knots, axis=0) > 0).all()
            seen = np.unique(column)
            assert knots[0, 0] == pytest.approx(seen[0], rel=2**-10)
            assert knots[-1, 0] == pytest.approx(seen[-1], rel=2**-10)
            assert {*seen[abs(seen) <= 5]} & {*np.rint(seen)} <= {*knots[:, 0]} or len(knots) > KNOTS


def test_numbers_far_from_those_of_training_stay_finite_and_one_value_is_0(tmp_path):
    schema = Schema("small", "y", ("one", "many"), ("c",), kinds=("string",), transforms={"many": "quantile"})
    table = pl.DataFrame(
        {"y": [0, 1] * 20, "one": [3.0] * 40, "many": [float(i) for i in range(40)], "c": "x"}
    )
    table.write_csv(tmp_path / "t.csv")
    config = PrepareConfig(
        (tmp_path / "t.csv",), tmp_path / "out", schema=schema, dense="zscore", split="0.8,0.1,0.1"
    )
    manifest = prepare(config)
    assert manifest.transforms() == "zscore, 1 by schema quantile"
    found = dense(tmp_path / "out")
    assert (found[:, 0] == 0).all()
    assert found[31, 1] == found[39, 1] == found[:, 1].max()  # beyond what training saw: as its largest
    reader = RowReader(manifest)
    np.testing.assert_array_equal(reader.rows(table)[0], found)
    far, _ = reader.rows({"one": [None, 1e30], "many": [-1e30, None], "c": ["x", None]})
    assert np.isfinite(far).all()
    assert far[0, 1] == far[1, 1] == found[:, 1].min()


def test_other_measures_are_other_data(folders, tmp_path):
    files = [folders / f"day_{day}" for day in (0, 2, 1)]
    prepare(PrepareConfig(tuple(files), tmp_path / "other", dense="zscore", input_order="given"))
    one, other = (Manifest.load(folder) for folder in (folders / "zscore", tmp_path / "other"))
    with pytest.raises(ConfigError, match="do not mean what they meant in training"):
        DataSpec.of(one).require(other.fingerprint(), "there")


@pytest.mark.parametrize(
    ("transform", "pairs"),
    [
        ("zscore", None), ("zscore", []), ("zscore", [[0.0, 0.0]]), ("zscore", [[0.0, 1.0], [1.0, 2.0]]),
        ("quantile", []), ("quantile", [[1.0, 0.0], [1.0, 1.0]]), ("quantile", [[1.0, 1.0], [2.0, 0.0]]),
        ("log1p", [[0.0, 1.0]]),
    ],
)  # fmt: skip
def test_measures_that_cannot_be_are_refused(folders, transform, pairs, tmp_path):
    data = json.loads((folders / transform / MANIFEST).read_text())
    data["measured"] = data.get("measured", {}) | {"int_3": pairs}
    if pairs is None:
        del data["measured"]["int_3"]
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"not a valid manifest \(measures of .*\); prepare the data again"):
        Manifest.load(tmp_path)


def test_a_schema_names_transforms_that_are_measured():
    schema = Schema("s", "y", ("a", "b"), ("c",), transforms={"b": "zscore"})
    assert dataclasses.replace(schema, transforms={}).fingerprint() != schema.fingerprint()
