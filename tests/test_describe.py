import dataclasses
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.text import Text
from rich.cells import cell_len

from data_pipeline import describe as module
from data_pipeline.describe import describe, draw, notes, save, text, zipf_exponent
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


def test_what_zeros_mean_is_told_of_each_transform(manifest):
    name, *_ = manifest.schema.dense
    schema = dataclasses.replace(manifest.schema, transforms={name: "log1p"})
    own = dataclasses.replace(manifest, schema=schema)
    assert manifest.transforms() == "none"
    assert own.transforms() == "none, 1 by schema log1p"
    assert [line for line in notes(own) if line.startswith("zeros")] == [
        "zeros (none): 0 or missing",
        "zeros (log1p): a count of 0 or below, or a missing one",
    ]
    assert len(notes(manifest)) == len(notes(own)) - 1


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


NAMES = (
    "$x$",
    "$",
    r"$\frac{1}$ \alpha",
    "a^b_c 100%",
    "_hidden",
    "\x1b[31m",
    "new\nline",
    "rtl\u202e",
    "x" * 200,
)


def described(manifest, dense, categorical):
    """What would be told of columns of these names, of which each holds what the first ones do."""
    found, dense, categorical = describe(manifest, 1000), tuple(dense), tuple(categorical)
    schema = Schema("a\x1b[31m", "label", dense, categorical)
    return dataclasses.replace(
        found,
        manifest=dataclasses.replace(manifest, schema=schema),
        dense=tuple(found.dense[1]._replace(name=name) for name in dense),
        categorical=tuple(found.categorical[0]._replace(name=name) for name in categorical),
    )


def test_names_are_drawn_as_they_are(manifest, tmp_path):
    """Not as formulas; and what cannot be seen is written out. Any warning would be an error here."""
    figure = draw(described(manifest, NAMES, [f"c{name}" for name in NAMES]))
    save(figure, tmp_path / "d.png")
    expected = [*NAMES[:5], r"\x1b[31m", r"new\nline", r"rtl\u202e", "x" * 11 + "..." + "x" * 6]
    titles = [axes.title for axes in figure.axes[2 : 2 + len(NAMES)]]
    assert [title.get_text() for title in titles] == expected
    bars, distinct = figure.axes[1], figure.axes[-2]
    drawn = [*bars.get_xticklabels()[: len(NAMES)], *titles]
    assert [text.get_text() for text in drawn] == 2 * expected
    assert [text.get_text() for text in distinct.get_yticklabels()][:5] == [f"c{name}" for name in NAMES[:5]]
    names = [*drawn, *bars.get_xticklabels(), *distinct.get_yticklabels(), figure._suptitle]
    assert not any(text.get_parse_math() for text in names)
    assert r"a\x1b[31m data" in figure._suptitle.get_text()
    written = [text.get_text() for text in figure.findobj(Text)]
    assert all(text.replace("\n(", "(").isprintable() for text in written)


def test_long_names_leave_room(manifest, tmp_path):
    figure = draw(described(manifest, ["W" * 200] * 7, ["价" * 200] * 26))
    save(figure, tmp_path / "d.png")
    figure_width = figure.get_window_extent().width
    assert all(axes.get_window_extent().width > 0.1 * figure_width for axes in figure.axes[:-3])
    titles = [axes.title.get_window_extent() for axes in figure.axes[2:9]]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))


def test_characters_that_no_font_has_become_code_points(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own_fonts())
    figure = draw(described(manifest, ["价格", "é"], ["市"]))
    save(figure, tmp_path / "d.png")
    assert [axes.get_title() for axes in figure.axes[2:4]] == [r"\u4ef7\u683c", "é"]
    assert any("no font of this machine" in text.get_text() for text in figure.findobj(Text))


def own_fonts():
    """The fonts that matplotlib brings along."""
    return [f for f in font_manager.fontManager.ttflist if f.fname.startswith(matplotlib.get_data_path())]


def test_a_font_that_has_the_characters_is_found(manifest, tmp_path, monkeypatch):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib.tables._g_l_y_f import Glyph

    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "price"])
    builder.setupCharacterMap({ord("价"): "price"})
    builder.setupGlyf({".notdef": Glyph(), "price": Glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "price": (500, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Of-a test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own_fonts())
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    figure = draw(described(manifest, ["价格", "é"], ["市"]))
    save(figure, tmp_path / "d.png")
    assert figure.axes[2].get_title() == r"价\u683c"
    assert "Of-a test" in figure.axes[2].title.get_fontfamily()


def test_of_many_columns_the_figure_shows_some_and_says_so(manifest, tmp_path):
    found = described(manifest, map("d{}".format, range(1000)), map("c{}".format, range(1000)))
    rest = found.dense[0]._replace(least=1, most=1, zeros=0)
    dense = (rest._replace(name="constant"), *found.dense[1:-1], rest._replace(name="last", zeros=0.9))
    large = found.categorical[-1]._replace(cardinality=10**6)
    found = dataclasses.replace(found, dense=dense, categorical=(*found.categorical[:-1], large))
    figure = draw(found)
    assert len(figure.axes) == 2 + module.PANELS + 3
    assert figure.axes[2].get_title() == "d1"
    zeros, distinct = figure.axes[1], figure.axes[-2]
    assert zeros.get_title().startswith("the most zeros of 2,000 columns")
    assert "last" in [text.get_text() for text in zeros.get_xticklabels()]
    assert "(60 of 1,000, the largest)" in distinct.get_title()
    assert [text.get_text() for text in distinct.get_yticklabels()] == [*(f"c{i}" for i in range(59)), "c999"]
    titles = [text.get_text() for text in figure.findobj(Text)]
    assert "dense columns (none), zeros left out (56 of 1,000, those that vary first)" in titles
    assert {f"d{i}" for i in range(1, 999)} | {f"c{i}" for i in range(1000)} <= set(text(found).split())


def test_the_table_of_any_names(manifest):
    categorical = ("价格" * 30, "[red]", "a" * 30, "a" * 31)
    lines = text(described(manifest, NAMES, categorical)).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith(("dense ", "categorical "))]
    dense, features = (lines[i : i + 1 + n] for i, n in zip(heads, (len(NAMES), 4), strict=True))
    shown = [*NAMES[:5], r"\x1b[31m", r"new\nline", r"rtl\u202e", "x" * 19 + "..." + "x" * 10]
    assert [line[:33].rstrip() for line in dense[1:]] == shown
    assert all(line.isprintable() for line in lines)
    for part in (dense, features):
        assert len({cell_len(line) for line in part}) == 1
    assert features[4].startswith("a" * 31 + " ")


@pytest.mark.parametrize("everything", [False, True])
def test_progress_ends_when_all_is_looked_at(manifest, everything):
    told = []
    describe(manifest, 1000, everything=everything, progress=lambda *values: told.append(values))
    done = [done for done, _ in told]
    assert done == sorted(set(done))
    assert {total for _, total in told} == {done[-1]}
    assert len(told) >= (1 + everything) * 3 + 5  # the days, the columns
