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


@njit(nogil=True, cache=True)
def _sort_rows(ids, base, keys, order):
    rows, features = ids.shape
    counts = np.zeros((3, 1 << DIGIT), np.int64)
    first, digit = np.empty((keys.size, 2), np.uint32), np.uint32((1 << DIGIT) - 1)
    second = np.empty_like(first)
    for b in range(rows):
        for f in range(features):
            a = b * features + f
            key = np.uint32(hash_token(base[f] + np.uint64(ids[b, f])))
            first[a, 0], first[a, 1] = key, a
            for turn in range(3):
                counts[turn, key >> np.uint32(DIGIT * turn) & digit] += 1
    for turn in range(3):
        start = 0
        for value in range(1 << DIGIT):
            count = counts[turn, value]
            counts[turn, value] = start
            start += count
        for a in range(keys.size):
            value = first[a, 0] >> np.uint32(DIGIT * turn) & digit
            target = counts[turn, value]
            counts[turn, value] = target + 1
            second[target, 0], second[target, 1] = first[a, 0], first[a, 1]
        first, second = second, first
    for a in range(keys.size):
        keys[a], order[a] = first[a, 0], first[a, 1]


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
