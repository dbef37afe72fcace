"""Adagrad on the shared array: sum the gradients of a batch per slot, then step the touched slots.

Adagrad needs the whole gradient of a slot before it steps, so two walks over the batch: the first adds
into `gradient`, the second steps each slot it meets and clears its gradient; a slot met again finds a
gradient of 0 and stays. Slots that no row of the batch touches are never read.

    d_vectors, ids, base, slot_map       as in scatter_add.py
    rate, eps                            as in adagrad.py
    gradient    (M,) float               scratch, all 0 before and after
    accumulator (M,) float, out (M,)     state and weights, stepped in place

Versions: in `cpu` each thread owns a range of the array in both walks, as in scatter_add.py. `reference` and
`cuda` scatter, then step the whole array, which is the same since a gradient of 0 changes nothing.
"""

import numpy as np
from numba import get_num_threads, njit, prange

from robe.kernels.adagrad import adagrad_cuda, adagrad_reference
from robe.kernels.cost import Cost
from robe.kernels.lanes import adagrad_run
from robe.kernels.runs import find_runs, most_runs, own_runs
from robe.kernels.scatter_add import CHUNK, scatter_add_cpu, scatter_add_cuda, scatter_add_reference


def adagrad_scatter_cost(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out) -> Cost:
    """Both walks when no slot repeats: scatter_add's, then five passes over what was touched."""
    return Cost(2 * ids.nbytes + (3 + 5) * d_vectors.nbytes, (1 + 7) * d_vectors.size)


def adagrad_scatter_reference(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_reference(d_vectors, ids, base, slot_map, 1, gradient)
    adagrad_reference(gradient, rate, eps, accumulator, out)
    gradient[...] = 0


@njit(parallel=True, nogil=True, cache=True)
def _adagrad_touched(ids, base, slot_map, rate, eps, most, owners, gradient, accumulator, out):
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
                for r in range(own_runs(runs[k], counts[k], low, high, gradient, mine)):
                    slot, length = runs[k, mine[r], 0], runs[k, mine[r], 1]
                    first, last = max(slot, low), min(slot + length, high)
                    adagrad_run(gradient, rate, eps, accumulator, out, first, last - first)


def adagrad_scatter_cpu(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_cpu(d_vectors, ids, base, slot_map, 1, gradient)
    number, most = out.dtype.type, most_runs(slot_map) * ids.shape[1]
    _adagrad_touched(
        *(ids, base, slot_map, number(rate), number(eps), most, get_num_threads()),
        *(gradient, accumulator, out),
    )


def adagrad_scatter_cuda(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_cuda(d_vectors, ids, base, slot_map, 1, gradient)
    adagrad_cuda(gradient, rate, eps, accumulator, out)
    gradient[...] = 0
