"""Look up: vectors[b, f, i] = sign * memory[slot], for the rows `ids` names.

    memory   (M,)    float    the shared weights
    ids      (B, F)  uint32   categorical values
    base     (F,)    uint64   token = base[f] + id
    slot_map                  where each element of a row lives (hashing.py)
    out      (B, F, D) float  written in full; may be a strided view

Versions: `reference` makes the tensors of slots and signs, which is what the formula says and what the
published PyTorch code does. `cpu` hashes once per block and copies runs of consecutive weights; nothing
of the size of `out` is made besides it. `cuda` gives one thread to each element.
"""

import numpy as np
from numba import cuda, njit, prange

from robe.kernels.cost import Cost
from robe.kernels.hashing import flip, run_at, slots_reference
from robe.kernels.launch import launch


def gather_cost(memory, ids, base, slot_map, out) -> Cost:
    """Each id and weight read, each element written; one change of sign per element."""
    return Cost(ids.nbytes + 2 * out.nbytes, out.size if slot_map.signed else 0)


def gather_reference(memory, ids, base, slot_map, out):
    slots, signs = slots_reference(slot_map, base + ids.astype(np.uint64))
    out[...] = memory[slots] * signs.astype(memory.dtype)


@njit(nogil=True)
def gather_row(memory, ids, base, slot_map, out):
    """The vectors of one row of the batch: ids (F,), out (F, D)."""
    for f in range(ids.size):
        token = base[f] + np.uint64(ids[f])
        row = out[f]
        element = np.uint64(0)
        while element < slot_map.width:
            slot, length, bits = run_at(slot_map, token, element)
            for k in range(length):
                row[element + k] = flip(memory[slot + k], bits, k)
            element += length


@njit(parallel=True, nogil=True, cache=True)
def gather_cpu(memory, ids, base, slot_map, out):
    for b in prange(ids.shape[0]):
        gather_row(memory, ids[b], base, slot_map, out[b])


@cuda.jit
def _gather_kernel(memory, ids, base, slot_map, out):
    first_i, first_b, first_f = cuda.grid(3)
    step_i, step_b, step_f = cuda.gridsize(3)
    f = first_f
    while f < out.shape[1]:
        b = first_b
        while b < out.shape[0]:
            token = base[f] + np.uint64(ids[b, f])
            i = first_i
            while i < out.shape[2]:
                slot, _, bits = run_at(slot_map, token, np.uint64(i))
                out[b, f, i] = flip(memory[slot], bits, 0)
                i += step_i
            b += step_b
        f += step_f


def gather_cuda(memory, ids, base, slot_map, out):
    launch(_gather_kernel, (out.shape[2], out.shape[0], out.shape[1]), memory, ids, base, slot_map, out)
