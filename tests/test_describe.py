import dataclasses

import numpy as np
import pytest

from data_pipeline import describe as module
from data_pipeline.describe import describe, draw, save, text, zipf_exponent
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, shard_name
from data_pipeline.schema import Schema

DAYS = (3000, 5000, 2000)
RATES = (0.1, 0.3, 0.5)


@pytest.fixture(scope="module")
def rows():
    """label, dense, ids (10,000 rows): clicks at RATES; ids of a Zipf law, of 4 values, of one."""
    rng = np.random.default_rng(0)
    label = np.concatenate([np.arange(n) < rate * n for n, rate in zip(DAYS, RATES, strict=True)])
    dense = np.stack([np.arange(10_000) % 4, rng.exponential(1, 10_000)], axis=1).astype(np.float32)
    law = np.arange(1, 2001) ** -1.2
    zipf = 1 + rng.choice(2000, 10_000, p=law / law.sum())
    ids = np.stack([zipf, np.arange(10_000) % 4, np.full(10_000, 2**32 - 1)], axis=1)
    return label[:, None].astype(np.int32), dense, ids.astype(np.uint32)


@pytest.fixture
def manifest(rows, tmp_path):
    cuts = np.cumsum(DAYS)[:-1]
    for kind, array in zip(KINDS, rows, strict=True):
        for day, part in enumerate(np.split(array, cuts)):
            np.save(tmp_path / shard_name(day, kind), part.view(KINDS[kind]))
    split = {"train": ((0, 0, 3000), (1, 0, 5000)), "test": ((2, 0, 9),), "validation": ((2, 9, 2000),)}
    days = tuple(Day(rows, {}, "test") for rows in DAYS)
    schema = Schema("small", "label", ("number", "half"), ("zipf", "four", "one"))
    return Manifest(schema, "none", Ids("hash", (2000, 4, 1), False), days, split, "", folder=tmp_path)


@pytest.mark.parametrize(
    ("wanted", "everything", "sampled"),
    [(10_000, False, 10_000), (99_999, False, 10_000), (1000, True, 1000)],
)
def test_all_rows_are_counted(manifest, rows, wanted, everything, sampled):
    found = describe(manifest, wanted, everything=everything)
    assert found.looked.tolist() == list(DAYS)
    assert found.clicks.tolist() == [300, 1500, 1000]
    assert found.sampled == sampled
    for column, values in zip(found.dense, rows[1].T, strict=True):
        assert column.zeros == np.mean(values == 0)
        assert column.mean == pytest.approx(values.mean(dtype=float))
        assert (column.least, column.most) == (values.min(), values.max())
    assert [feature.zeros for feature in found.categorical] == [0, 0.25, 0]
    # All rows were looked at, so there is no uncertainty to tell.
    assert module.label_rates(found) == [(day, rate, 0) for day, rate in enumerate(RATES)]


def test_what_a_sample_of_everything_tells(manifest, rows):
    found = describe(manifest, 10_000)
    for feature, values in zip(found.categorical, rows[2].T, strict=True):
        counts = np.unique(values[values != 0], return_counts=True)[1]
        np.testing.assert_array_equal(feature.counts, -np.sort(-counts))
    assert found.categorical[1].counts.tolist() == [2500] * 3
    assert [feature.cardinality for feature in found.categorical] == [2000, 4, 1]
    number, half = found.dense
    assert (number.median, number.high) == (1.5, 3)
    assert half.median == pytest.approx(np.median(rows[1][:, 1]))
    shares, edges = number.histogram
    assert [edges[0], edges[-1]] == [1, 3]  # zeros are left out
    assert shares.sum() == pytest.approx(0.75)


def test_a_sample_has_rows_of_every_day_and_repeats(manifest):
    found, again, other = (describe(manifest, 2000, seed=seed) for seed in (1, 1, 2))
    assert found.looked.tolist() == [600, 1000, 400]
    assert found.sampled == 2000
    assert text(found) == text(again) != text(other)
    for (_, rate, error), true in zip(module.label_rates(found), RATES, strict=True):
        assert 0 < error < 0.05
        # Not drawn row by row: whole blocks hold clicks alone, so it may be off by more than its interval.
        assert abs(rate - true) < 0.2


def test_the_exponent_of_a_zipf_law():
    rank = np.arange(1, 100_001)
    for exponent in (0.6, 1.0, 1.5):
        assert zipf_exponent(1e9 * rank**-exponent) == pytest.approx(exponent)
    rng = np.random.default_rng(0)
    law = rank**-1.2
    counts = -np.sort(-rng.multinomial(1_000_000, law / law.sum()))
    # Those seen seldom are left out; their counts, all 1, would pull it down.
    assert zipf_exponent(counts) == pytest.approx(1.2, abs=0.03)
    assert zipf_exponent(np.array([100] * 9 + [9] * 50)) is None
    assert zipf_exponent(np.array([], int)) is None


def test_the_table(manifest):
    lines = text(describe(manifest, 10_000)).splitlines()
    assert lines[1] == "looked at 10,000 of 10,000 rows; sample: 10,000 of all days, seed 0"
    assert lines[3] == "label rate per day: 28.000% in all"
    assert "1: 30.000 +-0.000 %" in lines[4]
    table = {words[0]: words[1:] for words in map(str.split, lines) if words}
    assert table["number"] == ["25.00%", "1.5", "0", "1.5", "3", "3"]
    assert table["four"] == ["25.00%", "~4", "3", "25.00%", "75.00%", "-"]
    assert table["one"] == ["0.00%", "~1", "1", "100.00%", "100.00%", "-"]
    assert float(table["zipf"][-1]) == pytest.approx(1.2, abs=0.1)
    assert "id 0 (hash): missing (or 32 bits that happen to be 0)" in lines


def test_values_that_are_not_finite_hide_none_that_are(manifest):
    path = manifest.folder / shard_name(0, "dense")
    dense = np.load(path)
    dense[0] = np.nan, np.inf
    np.save(path, dense)
    number, half = describe(manifest, 10_000).dense
    assert (number.median, half.most) == (2, np.inf)  # of one 0 fewer
    assert np.isnan(number.mean)
    assert half.histogram[1][-1] < 20


def test_a_log_without_dense_columns(manifest, tmp_path):
    for day, rows in enumerate(DAYS):
        np.save(manifest.folder / shard_name(day, "dense"), np.zeros((rows, 0), np.float32))
    schema = Schema("bare", "label", (), manifest.schema.categorical)
    found = describe(dataclasses.replace(manifest, schema=schema), 1000, everything=True)
    assert [feature.zeros for feature in found.categorical] == [0, 0.25, 0]
    save(draw(found), tmp_path / "d.png")


def test_the_figure_holds_every_column(manifest, tmp_path):
    figure = draw(describe(manifest, 1000))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == [
        "label rate per day, with 95% intervals",
        "zeros per column: what missing values became, and more",
    ]
    assert titles[2:4] == ["number", "half"]
    bars = figure.axes[1].patches
    assert len(bars) == 5
    assert bars[3].get_height() == pytest.approx(25, abs=1)
    frequencies = next(axes for axes in figure.axes if axes.get_title().startswith("frequency"))
    assert len(frequencies.lines) == 3
    save(figure, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".d.png*"))
