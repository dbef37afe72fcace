"""Look up and interact in one: the pairwise products of vectors that are never written to memory.

    memory, ids, base, slot_map   as in gather.py
    first (B, D) float            vector 0 of each row, the output of the bottom MLP
    out   (B, D + N * (N - 1) / 2) float   as in interaction.py, N = 1 + F

What inference does; training needs the vectors again for the gradient, and looks them up with gather.py.

Versions: `reference` is the two operations one after the other. `cpu` gathers a row of the batch into a few
kilobytes that stay in the first-level cache, and interacts them there. `cuda` looks every element up where
it is multiplied.
"""

import numpy as np
from numba import cuda, njit, prange

from robe.kernels.cost import Cost
from robe.kernels.gather import CACHE, TILE, gather_reference, gather_row, prefetch_row
from robe.kernels.hashing import flip, run_at
from robe.kernels.interaction import REORDER, ZERO, interact_row, interaction_cost, interaction_reference
from robe.kernels.launch import launch


def gather_interaction_cost(memory, ids, base, slot_map, first, out) -> Cost:
    """Each id and weight read, output written; the operations of the interaction."""
    rows, features = ids.shape
    vectors = np.broadcast_to(first[:1, None], (rows, 1 + features, first.shape[1]))
    _, flops = interaction_cost(vectors, out)
    return Cost(ids.nbytes + vectors.nbytes + out.nbytes, flops)


def gather_interaction_reference(memory, ids, base, slot_map, first, out):
    rows, features = ids.shape
    vectors = np.empty((rows, 1 + features, first.shape[1]), first.dtype)
    vectors[:, 0] = first
    gather_reference(memory, ids, base, slot_map, vectors[:, 1:])
    interaction_reference(vectors, out)


@njit(parallel=True, nogil=True, cache=True, fastmath=REORDER)
def _gather_interaction(memory, ids, base, slot_map, prefetches, first, out):
    rows = ids.shape[0]
    for tile in prange((rows + TILE - 1) // TILE):
        last = min((tile + 1) * TILE, rows)
        vectors = np.empty((1 + ids.shape[1], first.shape[1]), first.dtype)
        for b in range(tile * TILE, last):
            if prefetches and b + 1 < last:
                prefetch_row(memory, ids[b + 1], base, slot_map)
            vectors[0] = first[b]
            gather_row(memory, ids[b], base, slot_map, vectors[1:])
            interact_row(vectors, out[b])


def gather_interaction_cpu(memory, ids, base, slot_map, first, out):
    _gather_interaction(memory, ids, base, slot_map, memory.nbytes > CACHE, first, out)


@cuda.jit
def _gather_interaction_kernel(memory, ids, base, slot_map, first, out):
    width = first.shape[1]
    first_column, first_b = cuda.grid(2)
    step_column, step_b = cuda.gridsize(2)
    b = first_b
    while b < out.shape[0]:
        column = first_column
        while column < out.shape[1]:
            if column < width:
                out[b, column] = first[b, column]
            else:
                i, j = 1, column - width
                while j >= i:  # row i of the triangle holds i pairs
                    j -= i
                    i += 1
                x_token = base[i - 1] + np.uint64(ids[b, i - 1])
                y_token = base[max(j, 1) - 1] + np.uint64(ids[b, max(j, 1) - 1])
                total = ZERO
                for d in range(width):
                    slot, _, bits = run_at(slot_map, x_token, np.uint64(d))
                    x = flip(memory[slot], bits, 0)
                    y = first[b, d]
                    if j > 0:
                        slot, _, bits = run_at(slot_map, y_token, np.uint64(d))
                        y = flip(memory[slot], bits, 0)
                    total += x * y
                out[b, column] = total
            column += step_column
        b += step_b


def gather_interaction_cuda(memory, ids, base, slot_map, first, out):
    launch(_gather_interaction_kernel, out.shape[::-1], memory, ids, base, slot_map, first, out)
