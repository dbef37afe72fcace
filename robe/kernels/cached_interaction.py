"""Look up rows, in the cache or the table, and interact in one: gather_interaction.py for cached_gather.py.

    table, form, tags, values, ids, base   as in cached_gather.py
    first (B, D) float32                   vector 0 of each row, the output of the bottom MLP
    out   (B, D + N * (N - 1) / 2) float32 as in interaction.py, N = 1 + F

Versions: `reference` and `cuda` are the two operations one after the other. `cpu` looks up a row of the batch
into a few kilobytes that stay in the first-level cache, and interacts them there.
"""

import numpy as np
from numba import njit, prange

from robe.kernels.cached_gather import (
    cached_gather_cost,
    cached_gather_cuda,
    cached_gather_reference,
    cached_row,
    find_places,
)
from robe.kernels.interaction import (
    REORDER,
    ROWS,
    interact_row,
    interaction_cost,
    interaction_cuda,
    interaction_reference,
)
from robe.kernels.parts.cost import Cost


def cached_interaction_cost(table, form, tags, values, ids, base, first, out) -> Cost:
    """As cached_gather, but the vectors are not written; the operations of the interaction besides."""
    rows, features = ids.shape
    vectors = np.broadcast_to(first[:1, None], (rows, 1 + features, first.shape[1]))
    moved, flops = cached_gather_cost(table, form, tags, values, ids, base, vectors[:, 1:])
    moved += first.nbytes + out.nbytes - vectors[:, 1:].nbytes
    return Cost(moved, flops + interaction_cost(vectors, out).flops)


def cached_interaction_reference(table, form, tags, values, ids, base, first, out):
    vectors = np.empty((len(ids), 1 + ids.shape[1], first.shape[1]), first.dtype)
    vectors[:, 0] = first
    cached_gather_reference(table, form, tags, values, ids, base, vectors[:, 1:])
    interaction_reference(vectors, out)


@njit(parallel=True, nogil=True, cache=True, fastmath=REORDER)
def _cached_interaction(table, form, tags, values, ids, base, first, out):
    rows = ids.shape[0]
    for tile in prange((rows + ROWS - 1) // ROWS):
        start, last = tile * ROWS, min((tile + 1) * ROWS, rows)
        vectors = np.empty((1 + ids.shape[1], first.shape[1]), first.dtype)
        places = np.empty((2, ids.shape[1]), np.int64)
        find_places(tags, ids[start], base, places[0])
        for b in range(start, last):
            vectors[0] = first[b]
            k, following = (b - start) % 2, ids[min(b + 1, last - 1)]
            cached_row(
                table, form, tags, values, ids[b], places[k], following, places[1 - k], base, vectors[1:]
            )
            interact_row(vectors, out[b])


def cached_interaction_cpu(table, form, tags, values, ids, base, first, out):
    _cached_interaction(table, form, tags, values.reshape(-1), ids, base, first, out)


def cached_interaction_cuda(table, form, tags, values, ids, base, first, out):
    vectors = np.empty_like(
        first, shape=(len(ids), 1 + ids.shape[1], first.shape[1])
    )  # CuPy's where `first` is
    vectors[:, 0] = first
    cached_gather_cuda(table, form, tags, values, ids, base, vectors[:, 1:])
    interaction_cuda(vectors, out)
