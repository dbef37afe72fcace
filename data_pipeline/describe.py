"""A prepared folder -> what stands in its columns, as a table and a figure.

Clicks and zeros are counted, and means and extremes taken, over the rows looked at: a sample, or all rows.
What needs the values side by side (medians, histograms, frequencies of ids) comes from the sample always. So
memory is that of the sample, whatever the folder holds: up to 400 bytes per row of Criteo's columns.

The sample has rows of every day in proportion, drawn with a seed from random blocks of 256 rows. Shards do
not say what was missing in the log: they hold what became of it, a dense 0 or an id; so zeros are told.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_pipeline.batches import WINDOW_BLOCKS, Batch, Rows
from data_pipeline.manifest import Manifest
from data_pipeline.schema import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK_ROWS = 256
BATCH = BLOCK_ROWS * WINDOW_BLOCKS  # a window is one batch, and is not copied
BINS = 60
# The frequency of values seen less often is mostly chance; and two such values fit any exponent.
LEAST_COUNT, LEAST_RANKS = 10, 10

DENSE_ZERO = {"log1p": "a count of 0 or below, or a missing one", "none": "0 or missing"}
ID_ZERO = {
    "hash": "missing (or 32 bits that happen to be 0)",
    "modulo": "missing, or a multiple of the modulus",
    "dictionary": "not in the dictionary, as training did not see it (or too seldom); a missing value is one "
    "like any other",
}


class Dense(NamedTuple):
    """A dense column. zeros, mean, least and most are of the rows looked at, the rest of the sample."""

    name: str
    zeros: float  # share of the rows
    mean: float
    least: float
    median: float
    high: float  # 99% are not above
    most: float
    histogram: tuple[np.ndarray, np.ndarray]  # shares of the sample, and the edges; zeros are left out


class Categorical(NamedTuple):
    """A categorical column. zeros is of the rows looked at, counts and exponent of the sample."""

    name: str
    zeros: float
    cardinality: int  # by the manifest
    counts: np.ndarray  # of each distinct id but 0, falling
    exponent: float | None


@dataclass(frozen=True)
class Description:
    manifest: Manifest
    looked: np.ndarray  # (days,) rows
    clicks: np.ndarray  # (days,)
    sampled: int
    seed: int
    dense: tuple[Dense, ...]
    categorical: tuple[Categorical, ...]


class _Tally:
    """Sums over rows, in memory that does not grow with them."""

    def __init__(self, manifest: Manifest):
        days, dense = len(manifest.days), len(manifest.schema.dense)
        self.rows, self.clicks = np.zeros(days, np.int64), np.zeros(days)
        self.dense_zeros, self.sum = np.zeros(dense, np.int64), np.zeros(dense)
        self.least, self.most = np.full(dense, np.inf), np.full(dense, -np.inf)
        self.id_zeros = np.zeros(len(manifest.schema.categorical), np.int64)

    def add(self, day: int, batch: Batch) -> None:
        self.rows[day] += len(batch.label)
        self.clicks[day] += batch.label.sum(dtype=np.float64)
        self.dense_zeros += (batch.dense == 0).sum(axis=0)
        self.id_zeros += (batch.ids == 0).sum(axis=0)
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
    """Look at some `rows` rows of all days, and with `everything` count over all rows too."""
    if rows < 1:
        raise DataError(f"--rows must be at least 1, not {rows}")
    whole = sum(day.rows for day in manifest.days)
    quota = [min(day.rows, -(-day.rows * rows // max(whole, 1))) for day in manifest.days]
    total = sum(quota) + everything * whole
    tally, sampled = _Tally(manifest), 0
    sample_dense = np.empty((sum(quota), len(manifest.schema.dense)), np.float32)
    sample_ids = np.empty((sum(quota), len(manifest.schema.categorical)), np.uint32)
    for day, wanted in enumerate(quota):
        # A day taken whole is read in order.
        order = seed if wanted < manifest.days[day].rows else None
        for batch in _head(_day(manifest, day).batches(BATCH, seed=order), wanted):
            here = slice(sampled, sampled + len(batch.label))
            sample_dense[here], sample_ids[here], sampled = batch.dense, batch.ids, here.stop
            if not everything:
                tally.add(day, batch)
            progress(sampled, total)
    if everything:
        for day in range(len(quota)):
            for batch in _day(manifest, day).batches(BATCH):
                tally.add(day, batch)
                progress(sampled + int(tally.rows.sum()), total)
    looked = max(1, int(tally.rows.sum()))
    return Description(
        manifest,
        tally.rows,
        tally.clicks,
        sampled,
        seed,
        tuple(
            _dense(name, column, zeros / looked, mean, least, most)
            for name, column, zeros, mean, least, most in zip(
                *(manifest.schema.dense, sample_dense.T, tally.dense_zeros, tally.sum / looked),
                *(tally.least, tally.most),
                strict=True,
            )
        ),
        tuple(
            _categorical(name, column, zeros / looked, cardinality)
            for name, column, zeros, cardinality in zip(
                *(manifest.schema.categorical, sample_ids.T, tally.id_zeros, manifest.ids.cardinalities),
                strict=True,
            )
        ),
    )


def _day(manifest: Manifest, day: int) -> Rows:
    stretch = {"day": ((day, 0, manifest.days[day].rows),)}
    return Rows(replace(manifest, split=stretch), "day", block_rows=BLOCK_ROWS)


def _head(batches: Iterator[Batch], rows: int) -> Iterator[Batch]:
    """The first `rows` rows."""
    with closing(batches):
        while rows > 0:
            batch = next(batches).part(0, rows)
            rows -= len(batch.label)
            yield batch


def _dense(name: str, column: np.ndarray, zeros: float, mean: float, least: float, most: float) -> Dense:
    column = column[np.isfinite(column)]
    median, high = np.quantile(column, [0.5, 0.99]) if len(column) else (np.nan, np.nan)
    counts, edges = np.histogram(column[column != 0], BINS)
    return Dense(name, zeros, mean, least, median, high, most, (counts / max(1, len(column)), edges))


def _categorical(name: str, column: np.ndarray, zeros: float, cardinality: int) -> Categorical:
    counts = np.sort(np.unique(column[column != 0], return_counts=True)[1])[::-1]
    return Categorical(name, zeros, cardinality, counts, zipf_exponent(counts))


def zipf_exponent(counts: np.ndarray) -> float | None:
    """s of the law count ~ rank^-s: the least-squares line through the logarithms.

    counts: (n,) falling. None if fewer than LEAST_RANKS of them are at least LEAST_COUNT.
    """
    ranks = np.count_nonzero(counts >= LEAST_COUNT)
    if ranks < LEAST_RANKS:
        return None
    rank = spread(ranks)  # else the many that are seen seldom would outweigh the few that are seen often
    return -float(np.polyfit(np.log(rank), np.log(counts[rank - 1]), 1)[0])


def spread(n: int, points: int = 100) -> np.ndarray:
    """Up to `points` of the ranks 1 ... n, first and last among them, evenly on a logarithmic scale."""
    return np.unique(np.geomspace(1, n, points).round().astype(np.int64))


def text(found: Description) -> str:
    """The description as a table."""
    manifest, whole = found.manifest, sum(day.rows for day in found.manifest.days)
    looked = int(found.looked.sum())
    lines = [
        f"{manifest.folder}: {manifest.describe()}",
        f"looked at {looked:,} of {whole:,} rows; sample: {found.sampled:,} of all days, seed {found.seed}",
        "",
        f"label rate per day: {found.clicks.sum() / max(1, looked):.3%} in all",
    ]
    rates = [f"{day:>4}: {100 * rate:6.3f} +-{100 * error:5.3f} %" for day, rate, error in label_rates(found)]
    lines += ["".join(rates[i : i + 4]) for i in range(0, len(rates), 4)]
    lines += ["", f"{'dense':<16}{'zeros':>8}{'mean':>11}{'least':>11}{'median':>11}{'99%':>11}{'most':>11}"]
    for column in found.dense:
        numbers = column.mean, column.least, column.median, column.high, column.most
        lines.append(f"{column.name:<16.15}{column.zeros:>8.2%}" + "".join(f"{x:>11.4g}" for x in numbers))
    lines += [
        "",
        f"{'categorical':<16}{'id 0':>8}{'cardinality':>15}{'in sample':>12}"
        f"{'top 1':>9}{'top 100':>9}{'exponent':>10}",
    ]
    about = "" if manifest.ids.exact else "~"
    for feature in found.categorical:
        exponent = "-" if feature.exponent is None else f"{feature.exponent:.2f}"
        top, top_100 = (feature.counts[:k].sum() / max(1, found.sampled) for k in (1, 100))
        lines.append(
            f"{feature.name:<16.15}{feature.zeros:>8.2%}{about + format(feature.cardinality, ','):>15}"
            f"{len(feature.counts):>12,}{top:>9.2%}{top_100:>9.2%}{exponent:>10}"
        )
    return "\n".join([*lines, "", *notes(manifest)])


def notes(manifest: Manifest) -> list[str]:
    """What the words and numbers of the table mean."""
    transform, dialect = manifest.dense_transform, manifest.ids.dialect
    return [
        f"zeros ({transform}): {DENSE_ZERO.get(transform, 'not known')}",
        f"id 0 ({dialect}): {ID_ZERO.get(dialect, 'not known')}",
        "in sample: distinct ids; top k: share of its rows on the k most frequent; both without id 0",
        f"exponent: s of count ~ rank^-s, fitted to the ids that it holds {LEAST_COUNT} times or more",
    ]


def label_rates(found: Description) -> list[tuple[int, float, float]]:
    """Day, share of clicks, and half the width of its 95% interval: 0 if all rows of the day were looked at.

    As if each row had been drawn by itself, which holds if the clicks of a block are independent.
    """
    rates = []
    for day, (rows, clicks) in enumerate(zip(found.looked, found.clicks, strict=True)):
        rate = clicks / max(1, rows)
        share = rows / max(1, found.manifest.days[day].rows)
        rates.append((day, rate, 1.96 * np.sqrt(rate * (1 - rate) / max(1, rows) * (1 - share))))
    return rates


def draw(found: Description) -> "Figure":
    """The description as a figure."""
    # The Agg canvas needs no screen; pyplot would pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = 7
    dense_rows = max(1, -(-len(found.dense) // across))
    heights = [3.0, 1.6 * dense_rows, 5.2]
    figure = Figure(figsize=(14, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    source = "SYNTHETIC data" if found.manifest.synthetic else f"{found.manifest.schema.name} data"
    figure.suptitle(
        f"{found.manifest.folder}: {source}; {int(found.looked.sum()):,} rows looked at, "
        f"sample of {found.sampled:,}"
    )
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    rates, zeros = top.subplots(1, 2, width_ratios=[1, 2])
    _draw_rates(rates, found)
    _draw_zeros(zeros, found)
    middle.suptitle(f"dense columns ({found.manifest.dense_transform}), zeros left out", fontsize="medium")
    axes = middle.subplots(dense_rows, across, squeeze=False).ravel()
    for ax, column in zip(axes, found.dense, strict=False):
        shares, edges = column.histogram
        ax.stairs(shares, edges, fill=True, alpha=0.8)
        ax.set_title(column.name, fontsize="small")
        ax.set_yticks([])
        ax.tick_params(labelsize="x-small")
    for ax in axes[len(found.dense) :]:
        ax.axis("off")
    frequencies, distinct = bottom.subplots(1, 2, width_ratios=[3, 2])
    _draw_frequencies(frequencies, found)
    _draw_distinct(distinct, found)
    return figure


def _draw_rates(ax, found: Description) -> None:
    day, rate, error = np.array(label_rates(found)).T
    ax.errorbar(day, 100 * rate, 100 * error, fmt="o", markersize=4, capsize=2)
    ax.axhline(
        100 * found.clicks.sum() / max(1, found.looked.sum()), color="gray", linestyle="--", linewidth=1
    )
    ax.set(title="label rate per day, with 95% intervals", xlabel="day", ylabel="%")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def _draw_zeros(ax, found: Description) -> None:
    start = 0
    for columns, what in ((found.dense, "dense: 0"), (found.categorical, "categorical: id 0")):
        ax.bar(np.arange(start, start + len(columns)), [100 * c.zeros for c in columns], label=what)
        start += len(columns)
    names = [column.name for column in (*found.dense, *found.categorical)]
    ax.set_xticks(range(start), names, rotation=90, fontsize="x-small")
    ax.set(title="zeros per column: what missing values became, and more", ylabel="% of rows", ylim=(0, 100))
    ax.margins(x=0.01)
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize="small")


def _draw_frequencies(ax, found: Description) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    most = max((len(feature.counts) for feature in found.categorical), default=1)
    colors = ScalarMappable(LogNorm(1, max(2, most)), "viridis_r")
    for feature in found.categorical:
        if len(feature.counts):
            rank = spread(len(feature.counts))
            shares = 100 * feature.counts[rank - 1] / found.sampled
            ax.plot(rank, shares, color=colors.to_rgba(len(feature.counts)), linewidth=1.2)
    ax.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="% of the sample's rows")
    ax.set_title("frequency of ids other than 0 by rank, a line per feature")
    ax.grid(alpha=0.3)
    ax.figure.colorbar(colors, ax=ax, label="distinct ids in the sample", pad=0.01)


def _draw_distinct(ax, found: Description) -> None:
    place = np.arange(len(found.categorical))[::-1]
    ax.barh(place, [feature.cardinality for feature in found.categorical], color="C1", alpha=0.35)
    ax.barh(place, [len(feature.counts) for feature in found.categorical], color="C1")
    for y, feature in zip(place, found.categorical, strict=True):
        if feature.exponent is not None:
            end = max(feature.cardinality, len(feature.counts)), y
            ax.annotate(f" {feature.exponent:.2f}", end, va="center", fontsize="x-small")
    ax.set_yticks(place, [feature.name for feature in found.categorical], fontsize="x-small")
    about = "" if found.manifest.ids.exact else ", estimated"
    ax.margins(x=0.12)
    ax.set(xscale="log", xlabel=f"ids; light: cardinality{about}", ylim=(-1, len(place)))
    ax.set_title("distinct ids in the sample, and exponent")
    ax.grid(alpha=0.3, axis="x")


def save(figure: "Figure", out: Path) -> None:
    """Write the figure as PNG; `out` appears whole."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        figure.savefig(partial, dpi=110, format="png")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
