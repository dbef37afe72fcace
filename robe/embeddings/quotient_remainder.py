"""Quotient and remainder (Shi et al., arXiv 1909.02107): two small tables per feature tell all ids apart.

    vector(f, id) = quotient[f, id // c] * remainder[f, id mod c]        or their sum

ceil(n / c) + c rows serve n ids; no c needs fewer than 2 sqrt(n). To fit the budget, the largest features are
all cut to the same number of rows, except that a feature which needs more takes its minimum. With c = 1 a
feature keeps its whole table, and one remainder row.
"""

from bisect import bisect_left
from math import isqrt

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.composed import ComposedEmbedding, composed
from robe.embeddings.declared import Weights
from robe.embeddings.tables import initial_bounds, largest, tables


def divisor(n: int, rows: int) -> int:
    """The smallest c with ceil(n / c) + c <= rows, or, if there is none, <= ceil(2 sqrt(n)), the least."""
    rows = max(rows, 1 + isqrt(4 * n - 1))
    # That is c * (rows - c) >= n, which grows up to rows / 2.
    return 1 + bisect_left(range(1, rows // 2 + 1), n, key=lambda c: c * (rows - c))


def divisors(config: TrainConfig, data: DataSpec) -> np.ndarray:
    """(F,) c of each feature, within the budget."""

    def of(cap: int) -> np.ndarray:
        return np.array([divisor(n, cap) for n in data.cardinalities])

    def size(cap: int) -> int:
        return int(sum(count_rows(data, of(cap)))) * config.model.width

    return of(largest(size, 1 + max(data.cardinalities), config, data))


def count_rows(data: DataSpec, c: np.ndarray) -> np.ndarray:
    return -(-np.array(data.cardinalities) // c) + c


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    c, width = divisors(config, data), config.model.width
    return {"quotient": Weights(count_rows(data, c) - c, width), "remainder": Weights(c, width)}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ComposedEmbedding:
    weights, xp = declare(config, data), backend.xp
    by = backend.to_device(weights["remainder"].rows.astype(np.uint32))
    bounds = initial_bounds(config, data)
    product = config.embedding.combine == "multiply"
    # Uniform in (-a, a) has variance a^2 / 3: that of the product is a^4 / 9, of the sum 2 a^2 / 3.
    bounds = (3 * bounds**2) ** 0.25 if product else bounds / np.sqrt(2)
    maps = {
        "quotient": lambda ids, features: ids // by[features],
        "remainder": lambda ids, features: ids % by[features],
    }
    parts = {
        name: tables(weights[name], bounds, config, data, backend, dtype, stream=stream, row_of=row_of)
        for stream, (name, row_of) in enumerate(maps.items(), 1)
    }

    def compose(rows, out, places):
        (xp.multiply if product else xp.add)(*rows, out=out)

    def gradients(rows, d_vectors, places):
        quotient, remainder = rows
        return (d_vectors * remainder, d_vectors * quotient) if product else (d_vectors, d_vectors)

    return composed(config, data, backend, parts, compose, gradients)
