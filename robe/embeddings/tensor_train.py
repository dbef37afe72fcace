"""Tensor trains (TT-Rec, Yin et al., arXiv 2101.11714): a vector is a product of three small matrices.

The n ids of a feature are numbered by three digits below p_1, p_2, p_3, p_1 * p_2 * p_3 >= n, and the D
elements by d_1 * d_2 * d_3 = D. Per feature there are three tables, the cores, one row per digit:

    vector(f, id) = A[digit_1] B[digit_2] C[digit_3]       (d_1, r) (r, d_2 * r) (r, d_3), read row by row

The rank r is the same for all features, the largest within the budget. A feature keeps a whole table where
that is no larger than its cores.
"""

from math import isqrt

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.composed import Chosen, ComposedEmbedding, composed
from robe.embeddings.declared import Weights
from robe.embeddings.tables import initial_bounds, largest, tables


def factors(width: int) -> tuple[int, int, int]:
    """d_1 <= d_2 <= d_3 of a width, near one another: (2, 2, 4) of 16, (4, 4, 4) of 64, (4, 4, 8) of 128."""
    first = max(d for d in range(1, round(width ** (1 / 3)) + 1) if width % d == 0)
    second = max(d for d in range(1, isqrt(width // first) + 1) if width // first % d == 0)
    return first, second, width // first // second


def digits(cardinalities) -> np.ndarray:
    """(3, F): p_1, p_2, p_3, near the cube root of n."""
    n = np.array(cardinalities)
    last = np.ceil(np.cbrt(n)).astype(int)
    rest = -(-n // last)
    middle = np.ceil(np.sqrt(rest)).astype(int)
    return np.stack([-(-rest // middle), middle, last])


def core_widths(width: int, rank: int) -> tuple[int, int, int]:
    first, second, third = factors(width)
    return first * rank, rank * second * rank, rank * third


def core_weights(config: TrainConfig, data: DataSpec, rank: int) -> np.ndarray:
    """(F,) weights of the cores of each feature."""
    return core_widths(config.model.width, rank) @ digits(data.cardinalities)


def stored_weights(config: TrainConfig, data: DataSpec, rank: int) -> int:
    full = np.array(data.cardinalities) * config.model.width
    return int(np.minimum(full, core_weights(config, data, rank)).sum())


def best_rank(config: TrainConfig, data: DataSpec) -> int:
    # From this rank on no core is smaller than its table.
    most = 1 + isqrt(max(data.cardinalities) * config.model.width)
    return largest(lambda rank: stored_weights(config, data, rank), most, config, data)


def cored_features(config: TrainConfig, data: DataSpec, rank: int) -> np.ndarray:
    """(F,): whether the cores of a feature are smaller than its table."""
    return core_weights(config, data, rank) < np.array(data.cardinalities) * config.model.width


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    rank, n, width = best_rank(config, data), np.array(data.cardinalities), config.model.width
    cored = cored_features(config, data, rank)
    cores = zip(digits(n[cored]), core_widths(width, rank), strict=True)
    return {
        **{f"core{k}": Weights(rows, core_width) for k, (rows, core_width) in enumerate(cores, 1)},
        "tables": Weights(n[~cored], width),
    }


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ComposedEmbedding:
    xp, width, rank, weights = backend.xp, config.model.width, best_rank(config, data), declare(config, data)
    bounds, cored = initial_bounds(config, data), cored_features(config, data, rank)
    kept, trains = np.flatnonzero(~cored), np.flatnonzero(cored)
    moduli = [backend.to_device(weights[f"core{k}"].rows.astype(np.uint32)) for k in (2, 3)]
    trained, whole = (Chosen(numbers, cored.size, backend) for numbers in (trains, kept))

    def digit(k: int):
        def row_of(ids, features):
            middle, last = (by[features] for by in moduli)
            if k == 3:
                return ids % last
            ids = ids // last
            return ids % middle if k == 2 else ids // middle

        return row_of

    # An element is a sum of rank^2 products of three, each of variance v: rank^2 * v^3 = bound^2 / 3.
    core_bounds = np.sqrt(3 * np.cbrt(bounds[trains] ** 2 / 3 / rank**2))

    def part(name: str, bounds, stream: int, row_of=None) -> ArrayEmbedding:
        return tables(weights[name], bounds, config, data, backend, dtype, stream=stream, row_of=row_of)

    parts = {f"core{k}": part(f"core{k}", core_bounds, 1 + k, digit(k)) for k in (1, 2, 3)}
    parts["tables"] = part("tables", bounds[kept], 1)
    first, second, third = factors(width)
    shapes = (first, rank), (rank, second * rank), (rank, third)

    def matrices(rows):
        """A, B, C and A B of each vector (N, ...)."""
        a, b, c = (core.reshape(-1, *shape) for core, shape in zip(rows, shapes, strict=True))
        return a, b, c, xp.matmul(a, b).reshape(-1, first * second, rank)

    def compose(rows, out, places):
        *cores, tables = rows
        *_, c, ab = matrices(cores)
        out[places["tables"].at] = tables
        out[places["core1"].at] = xp.matmul(ab, c).reshape(*cores[0].shape[:2], width)

    def gradients(rows, d_vectors, places):
        *cores, _ = rows
        a, b, c, ab = matrices(cores)
        d = places["core1"].take(d_vectors).reshape(-1, first * second, third)
        d_ab = xp.matmul(d, c.swapaxes(1, 2)).reshape(-1, first, second * rank)
        found = (
            xp.matmul(d_ab, b.swapaxes(1, 2)),
            xp.matmul(a.swapaxes(1, 2), d_ab),
            xp.matmul(ab.swapaxes(1, 2), d),
        )
        found = (g.reshape(core.shape) for g, core in zip(found, cores, strict=True))
        return *found, places["tables"].take(d_vectors)

    chosen = dict.fromkeys(parts, trained) | {"tables": whole}
    return composed(config, data, backend, parts, compose, gradients, chosen=chosen)
