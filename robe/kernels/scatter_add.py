"""Gradient of the look-up: out[slot] += scale * sign * d_vectors[b, f, i], in the order of the batch.

    d_vectors (B, F, D) float   gradient of the loss by the vectors; may be a strided view
    ids, base, slot_map         as in gather.py, whose adjoint this is (for scale = 1)
    scale     float             1 for the gradient, -learning rate for a fused step of SGD on `memory`
    out       (M,)    float     added to

Versions: `reference` is `np.add.at`, one addition after the other. `cpu` splits `out` in as many ranges
as there are threads: a thread walks the whole batch in order and adds what falls into its own range, so
no two threads ever write the same slot, and every slot sums in the order of the batch however many
threads there are. Hashing each block once per thread costs far less than moving it. `cuda` gives one
thread to each element and adds atomically: correct, but in no fixed order, so float sums may differ in
the last bits from run to run.
"""

import numpy as np
from numba import cuda, get_num_threads, njit, prange

from robe.kernels.cost import Cost
from robe.kernels.hashing import flip, run_at, slots_reference
from robe.kernels.lanes import add_run, require_rows_together
from robe.kernels.launch import launch
from robe.kernels.runs import find_runs, most_runs, own_runs

CHUNK = 256  # rows of a batch whose runs are listed at a time: some megabytes


def scatter_add_cost(d_vectors, ids, base, slot_map, scale, out) -> Cost:
    """Each id and gradient read, each slot read and written; a product and a sum per element."""
    return Cost(ids.nbytes + 3 * d_vectors.nbytes, 2 * d_vectors.size)


def scatter_add_reference(d_vectors, ids, base, slot_map, scale, out):
    slots, signs = slots_reference(slot_map, base + ids.astype(np.uint64))
    np.add.at(out, slots, out.dtype.type(scale) * (d_vectors * signs.astype(out.dtype)))


@njit(parallel=True, nogil=True, cache=True)
def _scatter_add(d_vectors, ids, base, slot_map, scale, most, owners, out):
    rows = ids.shape[0]
    runs = np.empty((min(CHUNK, rows), most, 4), np.uint64)
    counts = np.empty(len(runs), np.int64)
    for chunk in range(0, rows, CHUNK):
        size = min(CHUNK, rows - chunk)
        for k in prange(size):
            counts[k] = find_runs(ids[chunk + k], base, slot_map, runs[k])
        for owner in prange(owners):
            low, high = np.uint64(owner * out.size // owners), np.uint64((owner + 1) * out.size // owners)
            mine = np.empty(most, np.int64)
            for k in range(size):
                for r in range(own_runs(runs[k], counts[k], low, high, out, mine)):
                    slot, length, bits, element = runs[k, mine[r]]
                    first, last = max(slot, low), min(slot + length, high)
                    skipped = first - slot
                    add_run(
                        *(d_vectors[chunk + k], element + skipped, bits >> skipped),
                        *(scale, out, first, last - first),
                    )


def scatter_add_cpu(d_vectors, ids, base, slot_map, scale, out):
    require_rows_together(d_vectors)
    # The number of owners is an argument since Numba cannot cache a kernel that asks for it.
    most = most_runs(slot_map) * ids.shape[1]
    _scatter_add(d_vectors, ids, base, slot_map, out.dtype.type(scale), most, get_num_threads(), out)


@cuda.jit
def _scatter_add_kernel(d_vectors, ids, base, slot_map, scale, out):
    first_i, first_b, first_f = cuda.grid(3)
    step_i, step_b, step_f = cuda.gridsize(3)
    f = first_f
    while f < d_vectors.shape[1]:
        b = first_b
        while b < d_vectors.shape[0]:
            token = base[f] + np.uint64(ids[b, f])
            i = first_i
            while i < d_vectors.shape[2]:
                slot, _, bits = run_at(slot_map, token, np.uint64(i))
                cuda.atomic.add(out, slot, scale * flip(d_vectors[b, f, i], bits, 0))
                i += step_i
            b += step_b
        f += step_f


def scatter_add_cuda(d_vectors, ids, base, slot_map, scale, out):
    rows, features, width = d_vectors.shape
    scale = out.dtype.type(scale)
    launch(_scatter_add_kernel, (width, rows, features), d_vectors, ids, base, slot_map, scale, out)
