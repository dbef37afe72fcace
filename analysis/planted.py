"""Rows of a planted law, made where a model computes, as fast as it asks for them, and never stored.

The law is that of `run.py synth` (data_pipeline/synthetic.py): ids by Zipf's law, counts with heavy tails,
and a click with probability sigmoid(logit), where

    logit = bias + dense part + sum_f effect[f, rank_f] + sum_{f<g} <latent[f, rank_f], latent[g, rank_g]>

Row n is a function of (seed, n) alone: its column c is drawn by word_of(key, 64 n + c), of the hash in
robe/kernels/parts/hashing.py. What takes powers and logarithms in `run.py synth` is a table here, made once
by NumPy and read by whole numbers, so the NumPy reference, the CPU and CUDA draw the same ids and counts:

    ranks    lie in bins, at most 2% wide. A bin has the chance that Zipf's law gives it; all its ranks are as
             likely, and matter as much as its first one.
    counts   are one of 1024 quantiles of those of `run.py synth`, as log(1 + count), and 0 where missing.

Ids are ranks spread over 0 .. n - 1, since frequent values of a log do not lie side by side. No id is
missing: in tables a missing value is a value like others.

Logits are float64 in the reference and sums of float32 in the compiled versions, so a row whose uniform
number lies within rounding of its probability may have another label.
"""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from data_pipeline.schema import CRITEO_TB_CARDINALITIES
from data_pipeline.synthetic import DENSE_MISSING, MIN_CARDINALITY, PAIRED, bias_of, counts_of, sigmoid
from robe import metrics
from robe.backend import Backend
from robe.errors import RobeError
from robe.kernels.parts.hashing import K1, divide, mix64, multiply_high, reciprocal, word_of
from robe.kernels.parts.launch import launch
from robe.kernels.parts.parallel import parallel

FEATURES, DENSE, LATENT = 26, 13, 3
BINS = LEVELS = 1024
COLUMNS = np.uint64(64)  # words of a row: of its label, its counts and its ids; the rest is not drawn
SAMPLE = 1 << 15  # rows that set means and deviations, and the bias
HELD_OUT = 1 << 56  # the first row that is not trained on
SPREAD = np.uint64(2654435761)  # a prime above all cardinalities
BIAS, EFFECTS, PAIRS, COUNTS = range(4)  # places in `weights`; of counts, the first of 13

U64, U32, F32 = np.uint64, np.uint32, np.float32
ONE, LOW16, S1, S16, S40, S54 = U64(1), U64(0xFFFF), U64(1), U64(16), U64(40), U64(54)
NONE, HALF, CENTRE, TO_UNIT = F32(0), F32(0.5), F32(1 << 15), F32(2.0**-24)


class Enough(RobeError):
    """There are no more rows to train on, or there is no more time."""


@dataclass(frozen=True)
class LawConfig:
    """What to plant.

    exponents: of the Zipf law of each feature. decay: parameters of a rank shrink as rank^-decay. base_rate:
    the share of clicks. scale: of the published cardinalities. dense, effects, pairs: standard deviations of
    the three parts of the logit over the rows.
    """

    exponents: tuple[float, ...]
    decay: float
    base_rate: float
    scale: float = 1.0
    dense: float = 0.3
    effects: float = 1.1
    pairs: float = 0.8
    seed: int = 0

    @property
    def cardinalities(self) -> tuple[int, ...]:
        return tuple(max(int(n * self.scale), min(n, MIN_CARDINALITY)) for n in CRITEO_TB_CARDINALITIES)


class Law(NamedTuple):
    """The law as kernels read it.

    key: of the words. edges (26, BINS + 1) uint32: the first rank of each bin. below (26, BINS) uint64: the
    chance of all ranks before a bin, times 2^63, where there is no bin 2^63. strengths (26, BINS) float32.
    keys (26,) uint64: of the parameters; centre (26, 4) float32: their mean. sizes, reciprocals (26,) uint64:
    numbers of ids. levels (13, LEVELS) float32: the counts. weights (16,) float32: the bias, and what
    effects, pairs and each count are multiplied by.
    """

    key: np.uint64
    edges: Any
    below: Any
    strengths: Any
    keys: Any
    centre: Any
    sizes: Any
    reciprocals: Any
    levels: Any
    weights: Any

    def on(self, backend: Backend) -> "Law":
        """The same law, with its tables where the backend computes."""
        return Law(self.key, *map(backend.to_device, self[1:]))


def bins_of(cardinality: int, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """First rank of each bin, and one behind the last; chance of all ranks before each; (bins + 1,) both.

    As in `run.py synth`, rank k has the mass of [k - 1/2, k + 1/2] under the continuous power law.
    """
    edges = np.unique(np.rint(np.geomspace(1, cardinality + 1, BINS + 1)).astype(np.int64))
    power = 1 - exponent or 1e-6  # a logarithm is the limit of small powers
    low, high = 0.5**power, (cardinality + 0.5) ** power
    return edges, ((edges - 0.5) ** power - low) / (high - low)


def law_of(config: LawConfig) -> Law:
    """The law of a configuration. A sample of its rows sets means, deviations and the bias."""
    rng = np.random.default_rng([config.seed, 26])
    dense_weights = rng.uniform(-1, 1, DENSE)
    keys, cardinalities = rng.integers(0, 2**64, FEATURES, np.uint64), np.array(config.cardinalities)
    edges, below = np.zeros((FEATURES, BINS + 1), np.uint32), np.full((FEATURES, BINS), 2**63, np.uint64)
    for f, (size, exponent) in enumerate(zip(cardinalities.tolist(), config.exponents, strict=True)):
        first, chance = bins_of(size, exponent)
        edges[f, : len(first)] = first
        below[f, : len(first) - 1] = np.ldexp(chance[:-1], 63).astype(np.uint64)
    strengths = (np.maximum(edges[:, :-1], 1.0) ** -config.decay / CENTRE).astype(np.float32)
    uniform = np.broadcast_to((np.arange(LEVELS)[:, None] + 0.5) / LEVELS, (LEVELS, DENSE))
    missing = DENSE_MISSING / 100
    # Of the levels, the first are missing values, and the others quantiles of those that are there.
    there = np.maximum(uniform - missing, 0.5 / LEVELS) / (1 - missing)
    levels = np.where(uniform < missing, 0, np.log1p(np.maximum(counts_of(there), 0))).T.astype(np.float32)
    with np.errstate(over="ignore"):
        key = mix64(U64(config.seed) + K1)
    law = Law(
        key=key,
        edges=edges,
        below=below,
        strengths=strengths,
        keys=keys,
        centre=np.zeros((FEATURES, 1 + LATENT), np.float32),
        sizes=cardinalities.astype(np.uint64),
        reciprocals=np.array([reciprocal(n) for n in cardinalities.tolist()]),
        levels=np.ascontiguousarray(levels),
        weights=np.concatenate([[0, 1, 1], dense_weights]).astype(np.float32),
    )
    sample = _columns(law, HELD_OUT - SAMPLE, SAMPLE)
    law.centre[...] = _parameters(law, *sample[2:]).mean(axis=0)
    parts = _parts(law, *sample[1:])
    scales = np.array([config.effects, config.pairs, config.dense]) / parts.std(axis=0)
    law.weights[EFFECTS:COUNTS], law.weights[COUNTS:] = scales[:2], scales[2] * dense_weights
    law.weights[BIAS] = bias_of(parts @ scales, config.base_rate)
    return law


def _columns(law: Law, first: int, rows: int) -> tuple[np.ndarray, ...]:
    """Of consecutive rows: a uniform number (rows,) for the label, the levels (rows, 13), bins and ranks
    (rows, 26)."""
    numbers = (U64(first) + np.arange(rows, dtype=np.uint64)) * COLUMNS
    words = word_of(law.key, numbers[:, None] + np.arange(1 + DENSE + FEATURES, dtype=np.uint64))
    of_ids = words[:, 1 + DENSE :]
    bins = np.stack(
        [np.searchsorted(law.below[f], of_ids[:, f] >> S1, "right") - 1 for f in range(FEATURES)], axis=1
    )
    features = np.arange(FEATURES)
    edges = law.edges.astype(np.uint64)
    begin, end = edges[features, bins], edges[features, bins + 1]
    ranks = begin + multiply_high(mix64(of_ids), end - begin)
    return (words[:, 0] >> S40) * 2.0**-24, words[:, 1 : 1 + DENSE] >> S54, bins, ranks


def _parameters(law: Law, bins: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Effect (1) and latent vector (3) of each rank, before centring: (rows, 26, 4) float64."""
    words = word_of(law.keys, ranks)[..., None] >> (S16 * np.arange(1 + LATENT, dtype=np.uint64))
    strengths = law.strengths[np.arange(FEATURES), bins]
    return ((words & LOW16) - float(CENTRE)) * strengths[..., None]


def _parts(law: Law, levels: np.ndarray, bins: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """What effects, pairs and counts add to the logit, the first two before scaling: (rows, 3) float64."""
    parameters = _parameters(law, bins, ranks) - law.centre
    effects, latent = parameters[:, :, 0], parameters[:, PAIRED, 1:]
    # sum_{f<g} <u_f, u_g> = (|sum_f u_f|^2 - sum_f |u_f|^2) / 2
    pairs = ((latent.sum(axis=1) ** 2).sum(axis=1) - (latent**2).sum(axis=(1, 2))) / 2
    dense = (law.levels[np.arange(DENSE), levels] * law.weights[COUNTS:].astype(np.float64)).sum(axis=1)
    return np.stack([effects.sum(axis=1), pairs, dense], axis=1)


def draw_reference(first, law, label, dense, ids, logits):
    """Rows from number `first` on: label (B,), dense (B, 13), logits (B,) float, ids (B, 26) uint32."""
    uniform, levels, bins, ranks = _columns(law, int(first), len(label))
    dense[...] = law.levels[np.arange(DENSE), levels]
    ids[...] = divide((ranks - ONE) * SPREAD, law.sizes, law.reciprocals)[1]
    scales = np.append(law.weights[EFFECTS:COUNTS], F32(1)).astype(np.float64)
    logits[...] = float(law.weights[BIAS]) + _parts(law, levels, bins, ranks) @ scales
    label[...] = uniform < sigmoid(logits)


@register_jitable
def bin_of(below, f, word):
    """The last bin of a feature that begins at the word or before it."""
    found, step = U32(0), U32(BINS // 2)
    while step > 0:
        if below[f, U32(found + step)] <= word:
            found = U32(found + step)
        step = U32(step >> U32(1))
    return found


@register_jitable
def number_of(word, place):
    """Sixteen bits of a word as a float from -2^15 to 2^15 - 1."""
    return F32((word >> (S16 * U64(place))) & LOW16) - CENTRE


@register_jitable
def draw_row(b, first, key, tables, label, dense, ids, logits):
    edges, below, strengths, keys, centre, sizes, reciprocals, levels, weights = tables
    number = (first + U64(b)) * COLUMNS
    logit, i = weights[BIAS], U32(0)
    while i < DENSE:
        count = levels[i, word_of(key, number + U64(i) + ONE) >> S54]
        dense[b, i] = count
        logit += weights[U32(i + U32(COUNTS))] * count
        i = U32(i + U32(1))
    effects = sum_0 = sum_1 = sum_2 = squares = NONE
    f = U32(0)
    while f < FEATURES:
        word = word_of(key, number + U64(f) + U64(1 + DENSE))
        j = bin_of(below, f, word >> S1)
        begin = U64(edges[f, j])
        rank = begin + multiply_high(mix64(word), U64(edges[f, U32(j + U32(1))]) - begin)
        ids[b, f] = U32(divide((rank - ONE) * SPREAD, sizes[f], reciprocals[f])[1])
        parameters, strength = word_of(keys[f], rank), strengths[f, j]
        effects += number_of(parameters, 0) * strength - centre[f, 0]
        if f & U32(3) == 0:  # PAIRED
            u = number_of(parameters, 1) * strength - centre[f, 1]
            v = number_of(parameters, 2) * strength - centre[f, 2]
            w = number_of(parameters, 3) * strength - centre[f, 3]
            sum_0, sum_1, sum_2 = sum_0 + u, sum_1 + v, sum_2 + w
            squares += u * u + v * v + w * w
        f = U32(f + U32(1))
    pairs = (sum_0 * sum_0 + sum_1 * sum_1 + sum_2 * sum_2 - squares) * HALF
    logit += weights[EFFECTS] * effects + weights[PAIRS] * pairs
    uniform = F32(word_of(key, number) >> S40) * TO_UNIT
    logits[b] = logit
    label[b] = F32(uniform * (F32(1) + math.exp(-logit)) < F32(1))


@parallel()
def _draw(first, key, tables, label, dense, ids, logits):
    for b in prange(label.size):
        draw_row(b, first, key, tables, label, dense, ids, logits)


def draw_cpu(first, law, label, dense, ids, logits):
    _draw(U64(first), law.key, tuple(law[1:]), label, dense, ids, logits)


@cuda.jit(cache=True)
def _draw_kernel(first, key, tables, label, dense, ids, logits):
    b = U64(cuda.grid(1))  # unsigned: see sgd.py
    while b < U64(label.size):
        draw_row(b, first, key, tables, label, dense, ids, logits)
        b += U64(cuda.gridsize(1))


def draw_cuda(first, law, label, dense, ids, logits):
    launch(_draw_kernel, label.shape, U64(first), law.key, tuple(law[1:]), label, dense, ids, logits)


DRAWS: dict[str, Callable] = {"reference": draw_reference, "cpu": draw_cpu, "cuda": draw_cuda}


class Drawn:
    """Consecutive rows of a law, made batch by batch where the backend computes, as robe/train.py takes rows.

    law: on that backend. first: the number of the first row. judged: rows to evaluate on, whose labels are
    read on the host.

    A batch is valid until the next one is asked for. What is queued on a device before reads it as it was, as
    all is queued in one order.
    """

    def __init__(self, law: Law, backend: Backend, count: int, first: int = 0, judged: bool = False):
        self.law, self.backend, self.count = law, backend, count
        self.first, self.judged, self.draw = first, judged, DRAWS[backend.name]

    def drawn(self, batch_size: int, start_step: int = 0) -> Generator[tuple]:
        """Batches (label, dense, ids, logits), where the backend computes."""
        columns = ((), "float32"), ((DENSE,), "float32"), ((FEATURES,), "uint32"), ((), "float32")
        arrays = [self.backend.empty((batch_size, *shape), dtype) for shape, dtype in columns]
        for start in range(start_step * batch_size, self.count, batch_size):
            batch = tuple(array[: self.count - start] for array in arrays)
            self.draw(self.first + start, self.law, *batch)
            yield batch

    def batches(
        self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start_step: int = 0
    ) -> Generator[tuple]:
        """Batches (label, dense, ids); rows are independent, so there is nothing to shuffle."""
        for label, dense, ids, _ in self.drawn(batch_size, start_step):
            yield self.backend.to_host(label) if self.judged else label, dense, ids

    def truth(self) -> dict[str, float]:
        """AUC and log loss of the true probabilities, AUC of the counts' part alone, and share of clicks."""
        found = [], [], []
        for label, dense, _, logits in self.drawn(SAMPLE):
            counts = dense @ self.law.weights[COUNTS:]
            for kept, array in zip(found, (label, logits, counts), strict=True):
                kept.append(self.backend.to_host(array).copy())
        label, logits, counts = map(np.concatenate, found)
        return {
            "best_auc": metrics.auc(label, logits),
            "best_log_loss": metrics.log_loss(label, logits),
            "counts_auc": metrics.auc(label, counts),
            "click_rate": float(label.mean()),
        }


class Eaten(Drawn):
    """Rows to train on, which end a training by Enough: behind the last batch, or when it is time.

    They count one row more than there are. So the training never comes to its own end, where it would write a
    checkpoint, for which there may be no room.

    until: of `time.monotonic()`.
    """

    def __init__(self, law: Law, backend: Backend, count: int, first: int, until: float):
        super().__init__(law, backend, count + 1, first)
        self.until = until

    def drawn(self, batch_size: int, start_step: int = 0) -> Generator[tuple]:
        """Whole batches, of which `count` is a multiple."""
        for batch in super().drawn(batch_size, start_step):
            if len(batch[0]) < batch_size:
                raise Enough("all rows are trained on")
            if time.monotonic() > self.until:
                raise Enough("its time is over")
            yield batch
