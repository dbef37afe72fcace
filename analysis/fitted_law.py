"""What a planted law takes from real rows: how often ids come, and how much the rare ones matter.

Frequencies. Let D(m) be how many distinct ids m of the N rows are expected to hold, drawn without
replacement: the sum over ids of 1 - C(N - c, m) / C(N, m), for an id of c rows (rarefaction: Hurlbert, 1971).
The exponent of a feature is the one with which m rows of the Zipf law over its published cardinality are
expected to hold as many. m is the largest power of two at which that is at most half of the cardinality; with
more, all have come.

Rare ids. Ids of a feature differ in their clicks by the variance of what their parameters bring, which
shrinks with the rank r as h r^(-2 decay). Each octave of ranks (2 and 3, 4 to 7, ...) is looked at by itself,
as frequent and rare ids may differ in the mean, too. In an octave of n ids, of which the k-th has c_k of the
N rows and the share y_k of clicks, all together y, let

    B = sum of c_k (y_k - y)^2 / (n - 1)        c = (N - sum of c_k^2 / N) / (n - 1)

(one-way analysis of variance). The mean of B is y (1 - y) + (c - 1) h r^(-2 decay), and it is taken to vary
as a mean of n - 1 squares of normal numbers. The decay is the one of the largest likelihood, with a height h
for each feature. Its interval has those whose likelihood's logarithm is less by up to 1.92 a feature, as if
all features told the same: those of real rows depend on one another, so this tells a tendency, and no cause.
"""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from analysis.planted import bins_of
from data_pipeline.logs import read_log

DECAYS = np.linspace(0, 1.5, 61)
HEIGHTS = np.append(0, np.geomspace(1e-5, 3, 80))  # times the variance of clicks
STEEPEST = 3.0  # exponent
INTERVAL = 1.92  # half of chi-square with one degree of freedom, 95%
CHUNKS = 64  # of a log, which are read


class Fitted(NamedTuple):
    """exponents (26): of the Zipf laws. decay, and the ends of its interval. base_rate: the share of
    clicks."""

    exponents: tuple[float, ...]
    decay: float
    decay_interval: tuple[float, float]
    base_rate: float
    rows: int


def fit_log(log: Path, cardinalities: tuple[int, ...]) -> Fitted:
    """The fit to the first rows of a log in Criteo's format. Raises DataError for one that cannot be read."""
    chunks = [(chunk.ids, chunk.label) for chunk in islice(read_log(log), CHUNKS)]
    ids, label = map(np.concatenate, zip(*chunks, strict=True))
    return fit(ids, label, cardinalities)


def fit(ids: np.ndarray, label: np.ndarray, cardinalities: tuple[int, ...]) -> Fitted:
    """ids (N, F), label (N,) 0 or 1."""
    counted = [np.unique(column, return_inverse=True, return_counts=True) for column in ids.T]
    decay, interval = decay_of([(inverse, counts) for _, inverse, counts in counted], label)
    exponents = [exponent_of(counts, n) for (_, _, counts), n in zip(counted, cardinalities, strict=True)]
    return Fitted(tuple(exponents), decay, interval, float(label.mean()), len(label))


def distinct(counts: np.ndarray, m: int) -> float:
    """How many distinct ids m of all rows are expected to hold; counts (ids,): rows of each."""
    rows, others = counts.sum(), counts.sum() - counts
    left = np.maximum(others - m, 0)
    missed = gammaln(others + 1) - gammaln(left + 1) - gammaln(rows + 1) + gammaln(rows - m + 1)
    return float(np.where(others < m, 1, -np.expm1(missed)).sum())


def distinct_of_law(cardinality: int, exponent: float, m: int) -> float:
    """The same of m rows of a Zipf law."""
    edges, below = bins_of(cardinality, exponent)
    sizes = np.diff(edges)
    return float((sizes * -np.expm1(m * np.log1p(-np.minimum(np.diff(below) / sizes, 1 - 1e-12)))).sum())


def exponent_of(counts: np.ndarray, cardinality: int) -> float:
    """The exponent from 0 to STEEPEST of a feature; by bisection."""
    m = 2
    while 2 * m <= counts.sum() and distinct(counts, 2 * m) <= cardinality / 2:
        m *= 2
    found, low, high = distinct(counts, m), 0.0, STEEPEST
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if distinct_of_law(cardinality, middle, m) > found else (low, middle)
    return round(middle, 3)


def decay_of(
    features: list[tuple[np.ndarray, np.ndarray]], label: np.ndarray
) -> tuple[float, tuple[float, float]]:
    """The decay and its interval; features: (number of the id of each row (N,), rows of each id) each."""
    loss = np.zeros(len(DECAYS))
    for inverse, counts in features:
        rank = np.empty(len(counts))
        rank[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
        octave, clicks = np.log2(rank).astype(int), np.bincount(inverse, label)

        def sums(of_ids, octave=octave):
            return np.bincount(octave, of_ids)

        ids, rows, at = sums(None), sums(counts), sums(counts * np.log2(rank)) / sums(counts)
        share = sums(clicks) / rows
        told = (ids > 1) & (share > 0) & (share < 1)
        between = (sums(clicks**2 / counts) - rows * share**2)[told] / (ids[told] - 1)
        size = (rows - sums(counts**2) / rows)[told] / (ids[told] - 1)
        variance = (share * (1 - share))[told]
        for i, decay in enumerate(DECAYS):
            shared = HEIGHTS[:, None] * variance * 2 ** (-2 * decay * at[told])
            mean = variance + (size - 1) * shared
            loss[i] += ((ids[told] - 1) / 2 * (np.log(mean) + between / mean)).sum(axis=1).min()
    good = DECAYS[loss <= loss.min() + INTERVAL * len(features)]
    return float(DECAYS[loss.argmin()]), (float(good[0]), float(good[-1]))
