"""Look up rows, in the cache or the table, and interact in one: gather_interaction.py for cached_gather.py.

    table, form, tags, values, ids, base   as in cached_gather.py
    first (B, D) float32                   vector 0 of each row, the output of the bottom MLP
    out   (B, D + N * (N - 1) / 2) float32 as in interaction.py, N = 1 + F

Versions: `reference` and `cuda` are the two operations one after the other. `cpu` looks up a row of the batch
into a few kilobytes that stay in the first-level cache, and interacts them there.
"""

import numpy as np
from numba.extending import register_jitable

from robe.kernels.cached_gather import (
    begin,
    cached_gather_cost,
    cached_gather_cuda,
    cached_gather_reference,
    read,
)
from robe.kernels.interaction import (
    interact_row,
    interaction_cost,
    interaction_cuda,
    interaction_reference,
)
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.walks import rows


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


@register_jitable
def _begin(state, form, base, b, ids):
    first = state[3]
    vectors = np.empty((1 + ids.size, first.shape[1]), first.dtype)
    return begin(state, form, base, b, ids), vectors


@register_jitable
def _interact(state, form, base, kept, b, ids, following):
    (entries, vectors), first, out = kept, state[3], state[4]
    for d in range(first.shape[1]):
        vectors[0, d] = first[b, d]
    read(state, form, base, entries, b, ids, following, vectors[1:])
    interact_row(vectors, out[b])


_cached_interaction = rows(_begin, _interact)


def cached_interaction_cpu(table, form, tags, values, ids, base, first, out):
    _cached_interaction((table, tags, values.reshape(-1), first, out), form, ids, base)


def cached_interaction_cuda(table, form, tags, values, ids, base, first, out):
    vectors = np.empty_like(
        first, shape=(len(ids), 1 + ids.shape[1], first.shape[1])
    )  # CuPy's where `first` is
    vectors[:, 0] = first
    cached_gather_cuda(table, form, tags, values, ids, base, vectors[:, 1:])
    interaction_cuda(vectors, out)
