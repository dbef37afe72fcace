"""Mixed dimensions (Ginart et al., arXiv 1909.11810): the more ids a feature has, the shorter its rows are.

    vector(f, id) = table[f, id] projection[f]        (d_f) (d_f, D)

The width d_f falls as n_f^-alpha, where n_f is the number of ids, of which many are then rare. All widths are
the largest within the budget, projections counted, and from 1 to D. With alpha = 0 they are equal, which is
plain low dimension. A feature keeps a table of width D, and has no projection, where that is no larger.
"""

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.composed import Chosen, ComposedEmbedding, composed
from robe.embeddings.declared import Weights
from robe.embeddings.tables import initial_bounds, largest, tables

STEPS = 64  # in which the width of the largest feature is tried, from one whole number to the next


def widths(config: TrainConfig, data: DataSpec) -> np.ndarray:
    """(F,) d_f, within the budget."""
    n, width = np.array(data.cardinalities), config.model.width
    longer = (n.max() / n) ** config.embedding.alpha

    def of(step: int) -> np.ndarray:
        found = np.clip(longer * (step / STEPS), 1, width).astype(int)
        return np.where(found * (n + width) < n * width, found, width)

    def size(step: int) -> int:
        found = of(step)
        return int((found * (n + width * (found < width))).sum())

    return of(largest(size, width * STEPS, config, data))


def declare(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    n, width, found = np.array(data.cardinalities), config.model.width, widths(config, data)
    short = found[found < width]
    return {
        **{f"width{d}": Weights(n[found == d], int(d)) for d in np.unique(short)},
        "tables": Weights(n[found == width], width),
        "projections": Weights(np.ones(short.sum(), int), width),
    }


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype: str) -> ComposedEmbedding:
    xp, width, weights, found = backend.xp, config.model.width, declare(config, data), widths(config, data)
    bounds = initial_bounds(config, data)
    shorter = [np.flatnonzero(found == d) for d in np.unique(found[found < width])]
    features = dict(zip(weights, (*shorter, np.flatnonzero(found == width)), strict=False))

    def part(name: str, bounds, stream: int) -> ArrayEmbedding:
        return tables(weights[name], bounds, config, data, backend, dtype, stream=stream)

    parts = {name: part(name, bounds[of], 1 + stream) for stream, (name, of) in enumerate(features.items())}
    *short_parts, _ = parts
    # A sum of d_f products has the variance of a full table's element, where that of a projection is 1 / d_f.
    projected = np.concatenate([found[of].repeat(found[of]) for of in (*shorter, found[:0])])
    parts["projections"] = part("projections", np.sqrt(3 / projected), 1 + len(parts))

    def matrices(projections):
        """(F_d, d, D) for each width d that is projected."""
        done = 0
        for of in shorter:
            d = int(found[of[0]])
            yield projections[0, done : done + of.size * d].reshape(of.size, d, width)
            done += of.size * d

    def projected_by(place, short, matrix):
        """Rows (B, F_d, d) times the matrix (d, D) of their feature; of ids (N, 1), feature by feature."""
        if place.features is None:
            return xp.matmul(short.swapaxes(0, 1), matrix).swapaxes(0, 1)
        product = backend.empty((*short.shape[:2], matrix.shape[2]), short.dtype)
        for f, its_matrix in enumerate(matrix):
            mine = xp.flatnonzero(place.features == f)
            product[mine, 0] = xp.matmul(short[mine, 0], its_matrix)
        return product

    def d_matrices(place, short, d, count):
        """The gradients (F_d, d, D) of these matrices, F_d of them; d (B, F_d, D): those of the products."""
        if place.features is None:
            return xp.matmul(short.transpose(1, 2, 0), d.swapaxes(0, 1))
        of = [xp.flatnonzero(place.features == f) for f in range(count)]
        return xp.stack([xp.matmul(short[mine, 0].T, d[mine, 0]) for mine in of])

    def compose(rows, out, places):
        *shorts, tables, projections = rows
        out[places["tables"].at] = tables
        for name, short, matrix in zip(short_parts, shorts, matrices(projections), strict=True):
            out[places[name].at] = projected_by(places[name], short, matrix)

    def gradients(rows, d_vectors, places):
        *shorts, _, projections = rows
        d_shorts, d_projections = [], [projections[:, :0]]
        for name, short, matrix in zip(short_parts, shorts, matrices(projections), strict=True):
            d = places[name].take(d_vectors)
            d_shorts.append(xp.ascontiguousarray(projected_by(places[name], d, matrix.swapaxes(1, 2))))
            d_projections.append(d_matrices(places[name], short, d, len(matrix)).reshape(1, -1, width))
        return *d_shorts, places["tables"].take(d_vectors), xp.concatenate(d_projections, axis=1)

    chosen = {name: Chosen(of, found.size, backend) for name, of in features.items()}
    made = config, data, backend, parts, compose, gradients
    return composed(*made, chosen=chosen, shared=("projections",))
