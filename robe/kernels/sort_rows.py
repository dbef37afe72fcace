"""The rows that a batch looks up, sorted by their hash (cache.py), so that equal rows lie side by side.

    ids    (B, F)  uint32   as in gather.py
    base   (F,)    uint64   row = base[f] + id, below 2^32 - 1
    keys   (B * F,) uint32  the hashes of all rows, ascending
    order  (B * F,) uint32  which look-up, b * F + f, each is of; those of one row in the order of the batch

Versions: `reference` and `cuda` leave the sorting to NumPy and CuPy. `cpu` sorts by 11 bits at a time, from
the lowest on (radix sort), in one thread.
"""

import numpy as np
from numba import cuda, njit
from numba.extending import register_jitable

from robe.kernels.parts.cache import hash_token, look_up_at
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch

U32 = np.uint32
DIGIT = 11  # bits


def sort_rows_cost(ids, base, keys, order) -> Cost:
    """Ids read, keys and order written."""
    return Cost(ids.nbytes + keys.nbytes + order.nbytes, 0)


def sort_rows_reference(ids, base, keys, order):
    hashed = hash_token(base + ids.astype(np.uint64)).ravel()
    order[...] = np.argsort(hashed, kind="stable")
    keys[...] = hashed[order]


@register_jitable
def sort_pairs(pairs, turns):
    """Pairs (n, 2) uint32 by the lowest `turns` * DIGIT bits of their first numbers, equal ones in order.

    Returns them in `pairs` itself or in another array.
    """
    counts, digit = np.zeros((turns, 1 << DIGIT), np.int64), np.uint32((1 << DIGIT) - 1)
    other = np.empty_like(pairs)
    for a in range(len(pairs)):
        for turn in range(turns):
            counts[turn, pairs[a, 0] >> np.uint32(DIGIT * turn) & digit] += 1
    for turn in range(turns):
        start = 0
        for value in range(1 << DIGIT):
            count = counts[turn, value]
            counts[turn, value] = start
            start += count
        for a in range(len(pairs)):
            value = pairs[a, 0] >> np.uint32(DIGIT * turn) & digit
            target = counts[turn, value]
            counts[turn, value] = target + 1
            other[target, 0], other[target, 1] = pairs[a, 0], pairs[a, 1]
        pairs, other = other, pairs
    return pairs


@njit(nogil=True, cache=True)
def _sort_rows(ids, base, keys, order):
    rows, features = ids.shape
    pairs = np.empty((keys.size, 2), np.uint32)
    for b in range(rows):
        for f in range(features):
            a = b * features + f
            pairs[a, 0], pairs[a, 1] = hash_token(base[f] + np.uint64(ids[b, f])), a
    pairs = sort_pairs(pairs, 3)
    for a in range(keys.size):
        keys[a], order[a] = pairs[a, 0], pairs[a, 1]


def sort_rows_cpu(ids, base, keys, order):
    _sort_rows(ids, base, keys, order)


@cuda.jit(cache=True)
def _hash_rows_kernel(ids, base, hashed):
    p = U32(cuda.grid(1))
    while p < U32(hashed.size):
        b, f = look_up_at(p, ids.shape[1])
        hashed[p] = hash_token(base[f] + np.uint64(ids[b, f]))
        p = U32(p + cuda.gridsize(1))


def sort_rows_cuda(ids, base, keys, order):
    hashed = np.empty_like(keys)  # CuPy's where keys are
    launch(_hash_rows_kernel, keys.shape, ids, base, hashed)
    order[...] = np.argsort(hashed, kind="stable")
    keys[...] = hashed[order]
