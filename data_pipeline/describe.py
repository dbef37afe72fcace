"""What stands in the columns of a prepared folder, as a table and a figure.

Clicks, zeros, means and extremes are of the rows looked at: a sample, or all rows. What needs all values at
once (medians, histograms, frequencies of ids) is of the sample always. So memory is that of the sample,
however large the folder: up to 400 bytes per row of Criteo's columns.

The sample takes the same share of each day, in random row blocks of 256 rows, drawn with a seed. Shards do
not tell which values were missing in the log, as these became a dense 0 or an id. So the zeros are counted.
"""

import heapq
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from rich.cells import cell_len, set_cell_size

from data_pipeline.bags import Bags, columns_of
from data_pipeline.batches import WINDOW_BLOCKS, Batch, Rows
from data_pipeline.dialects import scaler
from data_pipeline.manifest import Manifest, Stretch, measured_columns
from data_pipeline.names import fitted, shown
from data_pipeline.schema import DataError
from data_pipeline.whole_files import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK_ROWS = 256
BATCH = BLOCK_ROWS * WINDOW_BLOCKS  # a window is one batch, and is not copied
BINS = 60
# The exponent is fitted to ids seen at least so often, as lower counts are mostly chance; and to at least so
# many ids, as a few fit any exponent.
LEAST_COUNT, LEAST_RANKS = 10, 10
# A figure shows so many columns at most: more cannot be read, and take minutes to draw. The table has all.
PANELS, BARS = 56, 60
NAME_CELLS = 20  # of a name in the figure

DENSE_ZERO = {
    **dict.fromkeys(("log1p", "zscore"), "a count of 0 or below, or a missing one"),
    **dict.fromkeys(("none", "quantile"), "0 or missing"),
}
ID_ZERO = {
    "hash": "missing (or 32 bits that happen to be 0)",
    "modulo": "missing, or a multiple of the modulus",
    "dictionary": "not in the dictionary, as training did not see it (or too seldom); a missing value is one "
    "like any other",
}


class Dense(NamedTuple):
    """A dense column; zeros, mean, least and most are of the rows looked at, the rest of the sample."""

    name: str
    zeros: float  # share of the rows
    mean: float
    least: float
    median: float
    high: float  # the 99th percentile
    most: float
    histogram: tuple[np.ndarray, np.ndarray]  # without zeros: shares of the sample (n,), edges (n + 1,)


class Categorical(NamedTuple):
    """A categorical column; zeros, mean and most are of the rows looked at, the rest of the sample."""

    name: str
    zeros: float  # share of the ids
    cardinality: int  # by the manifest
    counts: np.ndarray  # (n,) how often each distinct id but 0 occurs, falling
    exponent: float | None  # s of the law count ~ rank^-s; None if there is too little to fit
    sampled: int  # ids of the sample
    mean: float  # number of ids in a row
    most: int


Column = Dense | Categorical
Drawn = TypeVar("Drawn", bound=Column)


@dataclass(frozen=True)
class Description:
    """What `describe` found."""

    manifest: Manifest
    looked: np.ndarray  # (days,) rows looked at
    clicks: np.ndarray  # (days,) clicks among them
    sampled: int  # rows of the sample
    seed: int
    dense: tuple[Dense, ...]
    categorical: tuple[Categorical, ...]


class _Tally:
    """Sums over rows, in memory that does not grow with them."""

    def __init__(self, manifest: Manifest):
        days, dense = len(manifest.days), len(manifest.schema.dense)
        self.rows, self.clicks, self.zero = np.zeros(days, np.int64), np.zeros(days), _zero(manifest)
        self.dense_zeros, self.sum = np.zeros(dense, np.int64), np.zeros(dense)
        self.least, self.most = np.full(dense, np.inf), np.full(dense, -np.inf)
        features = len(manifest.schema.categorical)
        self.ids, self.id_zeros = np.zeros(features, np.int64), np.zeros(features, np.int64)
        self.most_ids = np.full(features, 0 if manifest.schema.bags else 1)

    def add(self, day: int, batch: Batch) -> None:
        self.rows[day] += len(batch.label)
        self.clicks[day] += batch.label.sum(dtype=np.float64)
        self.dense_zeros += (batch.dense == self.zero).sum(axis=0)
        columns = list(columns_of(batch.ids, len(self.ids)))
        self.ids += [len(column) for column in columns]
        self.id_zeros += [np.count_nonzero(column == 0) for column in columns]
        if isinstance(batch.ids, Bags):
            self.most_ids = np.maximum(self.most_ids, batch.ids.lengths(len(self.ids)).max(axis=0))
        self.sum += batch.dense.sum(axis=0, dtype=np.float64)
        self.least = np.minimum(self.least, batch.dense.min(axis=0))
        self.most = np.maximum(self.most, batch.dense.max(axis=0))


def describe(
    manifest: Manifest,
    rows: int,
    *,
    everything: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Description:
    """Look at a prepared folder.

    rows: how many rows to take for the sample, of all days together.
    everything: count clicks and zeros, and take means and extremes, over all rows, not only over the sample.
    seed: of the sample.
    progress: called with the values looked at so far and in all: those read, and again those of the sample,
        column by column.

    Raises DataError if a shard is missing or damaged.
    """
    if rows < 1:
        raise DataError(f"--rows must be at least 1, not {rows}")
    whole = sum(day.rows for day in manifest.days)
    quota = [min(day.rows, -(-day.rows * rows // max(whole, 1))) for day in manifest.days]
    width = len(manifest.schema.dense) + len(manifest.schema.categorical)
    read = sum(quota) + everything * whole
    total = (read + sum(quota)) * width
    tally, sampled = _Tally(manifest), 0
    sample_dense = np.empty((sum(quota), len(manifest.schema.dense)), np.float32)
    sample_ids: list[list[np.ndarray]] = [[] for _ in manifest.schema.categorical]
    for day, wanted in enumerate(quota):
        # A day taken whole is read in order.
        order = seed if wanted < manifest.days[day].rows else None
        for batch in _head(_day(manifest, day).batches(BATCH, seed=order), wanted):
            here = slice(sampled, sampled + len(batch.label))
            sample_dense[here], sampled = batch.dense, here.stop
            for parts, column in zip(sample_ids, columns_of(batch.ids, len(sample_ids)), strict=True):
                parts.append(column.copy())
            if not everything:
                tally.add(day, batch)
            progress(sampled * width, total)
    if everything:
        for day in range(len(quota)):
            for batch in _day(manifest, day).batches(BATCH):
                tally.add(day, batch)
                progress((sampled + int(tally.rows.sum())) * width, total)

    def told(names: Sequence[str], first: int) -> Iterator[tuple[int, str]]:
        """Numbers and names of columns, of which so many others are done."""
        for i, name in enumerate(names):
            yield i, name
            progress(read * width + (first + i + 1) * sampled, total)

    looked = max(1, int(tally.rows.sum()))
    return Description(
        manifest=manifest,
        looked=tally.rows,
        clicks=tally.clicks,
        sampled=sampled,
        seed=seed,
        dense=tuple(
            _dense(
                name,
                sample_dense[:, i],
                zero=tally.zero[i],
                zeros=tally.dense_zeros[i] / looked,
                mean=tally.sum[i] / looked,
                least=tally.least[i],
                most=tally.most[i],
            )
            for i, name in told(manifest.schema.dense, 0)
        ),
        categorical=tuple(
            _categorical(
                name,
                np.concatenate([np.empty(0, np.uint32), *sample_ids[i]]),
                zeros=tally.id_zeros[i] / max(1, tally.ids[i]),
                cardinality=manifest.ids.cardinalities[i],
                mean=tally.ids[i] / looked,
                most=int(tally.most_ids[i]),
            )
            for i, name in told(manifest.schema.categorical, len(manifest.schema.dense))
        ),
    )


def _day(manifest: Manifest, day: int) -> Rows:
    """The rows of one day."""
    split: dict[str, tuple[Stretch, ...]] = {"day": ((day, 0, manifest.days[day].rows),)}
    return Rows(replace(manifest, split=split), "day", block_rows=BLOCK_ROWS)


def _head(batches: Generator[Batch, None, None], rows: int) -> Iterator[Batch]:
    """The first `rows` rows."""
    with closing(batches):
        while rows > 0:
            batch = next(batches).part(0, rows)
            rows -= len(batch.label)
            yield batch


def _zero(manifest: Manifest) -> np.ndarray:
    """What the number 0, and a missing one, is in each dense column (n,); NaN where it cannot be told."""
    schema = manifest.schema
    zero = np.zeros((1, len(schema.dense)), np.float32)
    (zero,) = scaler(schema, manifest.dense_transform, manifest.measured)(zero)
    for name, transform in measured_columns(schema, manifest.dense_transform).items():
        (least, _), (most, _) = manifest.measured[name][0], manifest.measured[name][-1]
        if transform == "quantile" and not least <= 0 <= most:  # it is what the nearest number is
            zero[schema.dense.index(name)] = np.nan
    return zero


def _dense(
    name: str, column: np.ndarray, *, zero: float, zeros: float, mean: float, least: float, most: float
) -> Dense:
    """What is told of a dense column (n,) of the sample."""
    column = column[np.isfinite(column)]
    median, high = np.quantile(column, [0.5, 0.99]) if len(column) else (np.nan, np.nan)
    counts, edges = np.histogram(column[column != zero], BINS)
    return Dense(
        name=name,
        zeros=zeros,
        mean=mean,
        least=least,
        median=median,
        high=high,
        most=most,
        histogram=(counts / max(1, len(column)), edges),
    )


def _categorical(
    name: str, column: np.ndarray, *, zeros: float, cardinality: int, mean: float, most: int
) -> Categorical:
    """What is told of a categorical column of the sample, which has these ids (n,)."""
    counts = np.sort(np.unique(column[column != 0], return_counts=True)[1])[::-1]
    return Categorical(name, zeros, cardinality, counts, zipf_exponent(counts), len(column), mean, most)


def zipf_exponent(counts: np.ndarray) -> float | None:
    """The exponent s of the law count ~ rank^-s, by least squares over the logarithms.

    counts: (n,) falling. None if fewer than LEAST_RANKS of them are at least LEAST_COUNT.
    """
    ranks = int(np.count_nonzero(counts >= LEAST_COUNT))
    if ranks < LEAST_RANKS:
        return None
    rank = spread(ranks)  # of all ranks, the many rare ids would outweigh the few frequent ones
    return -float(np.polyfit(np.log(rank), np.log(counts[rank - 1]), 1)[0])


def spread(n: int, points: int = 100) -> np.ndarray:
    """Up to `points` of the ranks 1 ... n, evenly on a logarithmic scale, with the first and the last."""
    return np.unique(np.geomspace(1, n, points).round().astype(np.int64))


def text(found: Description) -> str:
    """The description as a table, for a terminal."""
    manifest, whole = found.manifest, sum(day.rows for day in found.manifest.days)
    looked = int(found.looked.sum())
    lines = [
        f"{shown(manifest.folder)}: {manifest.describe()}",
        f"looked at {looked:,} of {whole:,} rows; sample: {found.sampled:,} of all days, seed {found.seed}",
        "",
        f"label rate per day: {found.clicks.sum() / max(1, looked):.3%} in all",
    ]
    rates = [f"{day:>4}: {100 * rate:6.3f} +-{100 * error:5.3f} %" for day, rate, error in label_rates(found)]
    lines += ["".join(rates[i : i + 4]) for i in range(0, len(rates), 4)]
    columns: tuple[Column, ...] = (*found.dense, *found.categorical)
    names = {column.name: fitted(shown(column.name), 32) for column in columns}
    width = max(15, *map(cell_len, names.values())) + 1
    lines += [
        "",
        f"{'dense':<{width}}{'zeros':>8}{'mean':>11}{'least':>11}{'median':>11}{'99%':>11}{'most':>11}",
    ]
    for column in found.dense:
        numbers = column.mean, column.least, column.median, column.high, column.most
        name = set_cell_size(names[column.name], width)
        lines.append(f"{name}{column.zeros:>8.2%}" + "".join(f"{x:>11.4g}" for x in numbers))
    lines += [
        "",
        f"{'categorical':<{width}}{'id 0':>8}{'cardinality':>15}{'in sample':>12}"
        f"{'top 1':>9}{'top 100':>9}{'exponent':>10}",
    ]
    about = "" if manifest.ids.exact else "~"
    for feature in found.categorical:
        exponent = "-" if feature.exponent is None else f"{feature.exponent:.2f}"
        name = set_cell_size(names[feature.name], width)
        top, top_100 = (feature.counts[:k].sum() / max(1, feature.sampled) for k in (1, 100))
        lines.append(
            f"{name}{feature.zeros:>8.2%}{about + format(feature.cardinality, ','):>15}"
            f"{len(feature.counts):>12,}{top:>9.2%}{top_100:>9.2%}{exponent:>10}"
        )
    if bags := manifest.schema.bags:
        lines += ["", f"{'bags':<{width}}{'pooling':>8}{'ids: mean':>15}{'most':>12}"]
    for feature in found.categorical:
        if feature.name in bags:
            name = set_cell_size(names[feature.name], width)
            lines.append(f"{name}{bags[feature.name].pooling:>8}{feature.mean:>15.4g}{feature.most:>12,}")
    return "\n".join([*lines, "", *notes(manifest)])


def notes(manifest: Manifest) -> list[str]:
    """What the words and numbers of the table mean."""
    transforms = dict.fromkeys([manifest.dense_transform, *manifest.schema.transforms.values()])
    dialect = manifest.ids.dialect
    return [
        *(f"zeros ({transform}): {DENSE_ZERO.get(transform, 'not known')}" for transform in transforms),
        f"id 0 ({dialect}): {ID_ZERO.get(dialect, 'not known')}",
        f"in sample: distinct ids; top k: share of its {_unit(manifest)} on the k most frequent; both "
        "without id 0",
        f"exponent: s of count ~ rank^-s, fitted to the ids that it holds {LEAST_COUNT} times or more",
    ]


def _unit(manifest: Manifest) -> str:
    """What the ids of a column are counted by."""
    return "ids" if manifest.schema.bags else "rows"


def label_rates(found: Description) -> list[tuple[int, float, float]]:
    """For each day: its number, the share of clicks, and half the width of its 95% interval.

    The width is that for rows drawn one by one; it holds for row blocks if their clicks are independent. It
    is 0 if all rows of the day were looked at.
    """
    rates = []
    for day, (rows, clicks) in enumerate(zip(found.looked, found.clicks, strict=True)):
        rate = clicks / max(1, rows)
        share = rows / max(1, found.manifest.days[day].rows)
        rates.append((day, rate, 1.96 * np.sqrt(rate * (1 - rate) / max(1, rows) * (1 - share))))
    return rates


def draw(found: Description) -> "Figure":
    """The description as a figure; of more columns than it has room for, those that its titles name."""
    # The Agg canvas needs no screen, while pyplot would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns: tuple[Column, ...] = (*found.dense, *found.categorical)
    dense = _most(found.dense, PANELS, lambda column: column.least < column.most)
    zeros = _most(columns, BARS, lambda column: column.zeros)
    features = _most(found.categorical, BARS, lambda feature: feature.cardinality)
    folder = fitted(shown(found.manifest.folder), 80)
    source = fitted(shown(found.manifest.schema.name), 40)
    lettering = _Lettering([folder, source, *(shown(column.name) for column in columns)])

    across = 7
    dense_rows = max(1, -(-len(dense) // across))
    longest = max(cell_len(lettering.name(column)) for column in zeros)
    heights = [2.6 + 0.065 * longest, 1.6 * dense_rows if dense else 0.5, max(5.2, 0.13 * len(features))]
    figure = Figure(figsize=(14, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    source = "SYNTHETIC data" if found.manifest.synthetic else f"{source} data"
    looked = f"{int(found.looked.sum()):,} rows looked at, sample of {found.sampled:,}"
    figure.suptitle(lettering.text(f"{folder}: {source}; {looked}"), **lettering.style)
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    rates_axes, zeros_axes = top.subplots(1, 2, width_ratios=[1, 2])
    _draw_rates(rates_axes, found)
    _draw_zeros(zeros_axes, zeros, len(columns), lettering)
    kind = f"dense columns ({found.manifest.transforms()}), zeros left out"
    which = _which(dense, found.dense, "those that vary first")
    middle.suptitle(f"{kind}{which}" if dense else "no dense columns", fontsize="medium")
    axes = middle.subplots(dense_rows, across, squeeze=False).ravel()
    for ax, column in zip(axes, dense, strict=False):
        shares, edges = column.histogram
        ax.stairs(shares, edges, fill=True, alpha=0.8)
        name = lettering.name(column)
        ax.set_title(name, fontsize="small" if len(name) < 16 else "x-small", **lettering.style)
        ax.set_yticks([])
        ax.tick_params(labelsize="x-small")
    for ax in axes[len(dense) :]:
        ax.axis("off")
    frequencies, distinct = bottom.subplots(1, 2, width_ratios=[3, 2])
    _draw_frequencies(frequencies, found)
    _draw_distinct(distinct, features, found, lettering)
    if lettering.lacking:
        bottom.supxlabel(
            r"\u and digits: a character that no font of this machine has; install one such as Noto Sans CJK",
            fontsize="small",
        )
    return figure


def _most(columns: Sequence[Drawn], count: int, key: Callable[[Drawn], float]) -> list[Drawn]:
    """The `count` columns with the largest keys, the first of equals, in the order of the schema."""
    best = heapq.nlargest(count, range(len(columns)), key=lambda i: key(columns[i]))
    return [columns[i] for i in sorted(best)]


def _which(drawn: Sequence, columns: Sequence, words: str) -> str:
    """What a title says where there are more columns than drawn."""
    return f" ({len(drawn)} of {len(columns):,}, {words})" if len(drawn) < len(columns) else ""


class _Lettering:
    r"""How names are drawn: as they are, and never as formulas.

    Characters that matplotlib's own font lacks come from fonts of this machine that have them. Those that no
    font has would be drawn as empty boxes, and are written as code points instead, like \u4ef7.

    lacking: the characters that no font has.
    style: the properties of texts that hold names.
    """

    def __init__(self, texts: Iterable[str]):
        """texts: all that will be drawn."""
        from matplotlib import get_data_path, rcParams
        from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

        def glyphs(*families: str) -> set[int]:
            return set(get_font(findfont(FontProperties(family=families))).get_charmap())

        families = list(rcParams["font.family"])
        lacking = set(map(ord, set().union(*texts))) - glyphs(*families)
        # Those that matplotlib brings along are of symbols.
        others = {
            font.name
            for font in fontManager.ttflist
            if (font.style, font.weight) == ("normal", 400) and not font.fname.startswith(get_data_path())
        }
        for family in sorted(others, key=lambda family: ("Sans" not in family, family)):
            if not lacking:
                break
            if found := lacking & glyphs(family):
                families.append(family)
                lacking -= found
        self.lacking = set(map(chr, lacking))
        self.style: dict[str, Any] = {"fontfamily": families, "parse_math": False, "usetex": False}

    def text(self, text: str) -> str:
        return shown(text, self.lacking)

    def name(self, column: Column) -> str:
        """The name, cut so that it fits as it is drawn."""
        lengths = range(NAME_CELLS, 3, -1)
        texts = (self.text(fitted(shown(column.name), cells)) for cells in lengths)
        return next((text for text in texts if cell_len(text) <= NAME_CELLS), "...")


def _draw_rates(ax, found: Description) -> None:
    day, rate, error = np.array(label_rates(found)).T
    ax.errorbar(day, 100 * rate, 100 * error, fmt="o", markersize=4, capsize=2)
    ax.axhline(
        100 * found.clicks.sum() / max(1, found.looked.sum()), color="gray", linestyle="--", linewidth=1
    )
    ax.set(title="label rate per day, with 95% intervals", xlabel="day", ylabel="%")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def _draw_zeros(ax, columns: Sequence[Column], count: int, lettering: _Lettering) -> None:
    """columns: of `count`, those to be drawn, dense ones first."""
    for label, kind, color in (("dense: 0", Dense, "C0"), ("categorical: id 0", Categorical, "C1")):
        bars = {i: 100 * column.zeros for i, column in enumerate(columns) if isinstance(column, kind)}
        if bars:
            ax.bar(list(bars), list(bars.values()), color=color, label=label)
    names = [lettering.name(column) for column in columns]
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small", **lettering.style)
    which = "zeros per column" if len(columns) == count else f"the most zeros of {count:,} columns"
    ax.set(title=f"{which}: what missing values became, and more", ylabel="% of rows", ylim=(0, 100))
    ax.margins(x=0.01)
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize="small")


def _draw_frequencies(ax, found: Description) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    distinct = np.array([max(1, len(feature.counts)) for feature in found.categorical])
    colors = ScalarMappable(LogNorm(1, max(2, distinct.max())), "viridis_r")
    for feature, color in zip(found.categorical, colors.to_rgba(distinct), strict=True):
        if len(feature.counts):
            rank = spread(len(feature.counts))
            shares = 100 * feature.counts[rank - 1] / feature.sampled
            ax.plot(rank, shares, color=color, linewidth=1.2)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="rank of the id",
        ylabel=f"% of the sample's {_unit(found.manifest)}",
    )
    ax.set_title("frequency of ids other than 0 by rank, a line per feature")
    ax.grid(alpha=0.3)
    ax.figure.colorbar(colors, ax=ax, label="distinct ids in the sample", pad=0.01)


def _draw_distinct(ax, features: Sequence[Categorical], found: Description, lettering: _Lettering) -> None:
    height = np.arange(len(features))[::-1]
    ax.barh(height, [feature.cardinality for feature in features], color="C1", alpha=0.35)
    ax.barh(height, [len(feature.counts) for feature in features], color="C1")
    for y, feature in zip(height, features, strict=True):
        if feature.exponent is not None:
            end = max(feature.cardinality, len(feature.counts)), y
            ax.annotate(f" {feature.exponent:.2f}", end, va="center", fontsize="x-small")
    names = [lettering.name(feature) for feature in features]
    ax.set_yticks(height, names, fontsize="x-small", **lettering.style)
    about = "" if found.manifest.ids.exact else ", estimated"
    which = _which(features, found.categorical, "the largest")
    most = max(max(feature.cardinality, len(feature.counts)) for feature in features)
    ax.set(xscale="log", xlim=(0.7, 4 * max(1, most)), ylim=(-1, len(height)))
    ax.set_xlabel(f"ids; light: cardinality{about}")
    ax.set_title("distinct ids in the sample, and exponent" + which.replace(" ", "\n", 1))
    ax.grid(alpha=0.3, axis="x")


def save(figure: "Figure", out: Path) -> None:
    """Write the figure as PNG; `out` appears whole."""
    write_figure(out, figure, 110)
