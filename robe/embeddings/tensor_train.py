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
from robe.embeddings.composed import ComposedEmbedding
from robe.embeddings.tables import initial_bounds, largest, tables, whole


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


def tensor_train_tables(config: TrainConfig, data: DataSpec) -> list[tuple[int, int]]:
    """(rows, width) of each core, and of the tables that are kept whole."""
    rank, n = best_rank(config, data), np.array(data.cardinalities)
    cored = core_weights(config, data, rank) < n * config.model.width
    rows = digits(n[cored]).sum(axis=1).tolist()
    widths = core_widths(config.model.width, rank)
    return [*zip(rows, widths, strict=True), (int(n[~cored].sum()), config.model.width)]


def stored(config: TrainConfig, data: DataSpec, rank: int) -> int:
    full = np.array(data.cardinalities) * config.model.width
    return int(np.minimum(full, core_weights(config, data, rank)).sum())


def best_rank(config: TrainConfig, data: DataSpec) -> int:
    # From this rank on no core is smaller than its table.
    most = 1 + isqrt(max(data.cardinalities) * config.model.width)
    return largest(lambda rank: stored(config, data, rank), most, config, data)


def tensor_train_weights(config: TrainConfig, data: DataSpec) -> int:
    return stored(config, data, best_rank(config, data))


def tensor_trains(
    config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32"
) -> ComposedEmbedding:
    xp, width, rank = backend.xp, config.model.width, best_rank(config, data)
    n, bounds = np.array(data.cardinalities), initial_bounds(config, data)
    cored = core_weights(config, data, rank) < n * width
    kept, trains = np.flatnonzero(~cored), np.flatnonzero(cored)
    p = digits(n[trains])
    _, *moduli = (backend.to_device(row.astype(np.uint32)) for row in p)
    kept_columns, train_columns = map(backend.to_device, (kept, trains))

    def digit(k: int):
        def place(ids):
            ids = xp.take(ids, train_columns, axis=1)
            if k == 2:
                return ids % moduli[1]
            ids = ids // moduli[1]
            return ids % moduli[0] if k == 1 else ids // moduli[0]

        return place

    # An element is a sum of rank^2 products of three, each of variance v: rank^2 * v^3 = bound^2 / 3.
    core_bounds = np.sqrt(3 * np.cbrt(bounds[trains] ** 2 / 3 / rank**2))
    parts = {
        f"core{k + 1}": tables(
            *(p[k], core_bounds, config, data, backend, dtype),
            width=core_width,
            stream=2 + k,
            place=digit(k),
        )
        for k, core_width in enumerate(core_widths(width, rank))
    }
    parts["tables"] = tables(
        *(n[kept], bounds[kept], config, data, backend, dtype),
        place=lambda ids: xp.take(ids, kept_columns, axis=1),
    )
    first, second, third = factors(width)
    shapes = (first, rank), (rank, second * rank), (rank, third)

    def matrices(rows):
        """A, B, C and A B of each vector (N, ...)."""
        a, b, c = (core.reshape(-1, *shape) for core, shape in zip(rows, shapes, strict=True))
        return a, b, c, xp.matmul(a, b).reshape(-1, first * second, rank)

    def compose(rows, out):
        *cores, tables = rows
        *_, c, ab = matrices(cores)
        out[:, kept_columns] = tables
        out[:, train_columns] = xp.matmul(ab, c).reshape(len(out), -1, width)

    def gradients(rows, d_vectors):
        *cores, _ = rows
        a, b, c, ab = matrices(cores)
        d = xp.take(d_vectors, train_columns, axis=1).reshape(-1, first * second, third)
        d_ab = xp.matmul(d, c.swapaxes(1, 2)).reshape(-1, first, second * rank)
        found = (
            xp.matmul(d_ab, b.swapaxes(1, 2)),
            xp.matmul(a.swapaxes(1, 2), d_ab),
            xp.matmul(ab.swapaxes(1, 2), d),
        )
        found = (g.reshape(core.shape) for g, core in zip(found, cores, strict=True))
        return *found, xp.take(d_vectors, kept_columns, axis=1)

    return ComposedEmbedding(
        config.embedding.method, parts, compose, gradients, n.size, width, backend, **whole(config, data)
    )
