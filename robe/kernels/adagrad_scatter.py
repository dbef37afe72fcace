"""Adagrad on the shared array: sum the gradients of a batch per slot, then step the touched slots.

Adagrad needs the whole gradient of a slot before it steps, so two walks over the batch: the first adds
into `gradient`, the second steps each slot it meets and clears its gradient; a slot met again finds a
gradient of 0 and stays. Slots that no row of the batch touches are never read.

    d_vectors, ids, base, slot_map       as in scatter_add.py
    rate, eps                            as in adagrad.py
    gradient    (M,) float               scratch, all 0 before and after
    accumulator (M,) float, out (M,)     state and weights, stepped in place

Versions: in `cpu` each thread owns a range of the array, as in scatter_add.py, and makes both walks for
its own range, so there is nothing to wait for in between. `reference` and `cuda` scatter, then step the
whole array, which is the same since a gradient of 0 changes nothing.
"""

import numpy as np
from numba import get_num_threads, njit, prange

from robe.kernels.adagrad import adagrad_cuda, adagrad_reference, adagrad_step
from robe.kernels.cost import Cost
from robe.kernels.hashing import flip, run_at
from robe.kernels.scatter_add import scatter_add_cuda, scatter_add_reference


def adagrad_scatter_cost(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out) -> Cost:
    """Both walks when no slot repeats: scatter_add's, then five passes over what was touched."""
    return Cost(2 * ids.nbytes + (3 + 5) * d_vectors.nbytes, (1 + 7) * d_vectors.size)


def adagrad_scatter_reference(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_reference(d_vectors, ids, base, slot_map, 1, gradient)
    adagrad_reference(gradient, rate, eps, accumulator, out)
    gradient[...] = 0


@njit(parallel=True, nogil=True, cache=True)
def _adagrad_scatter(d_vectors, ids, base, slot_map, rate, eps, owners, gradient, accumulator, out):
    for owner in prange(owners):
        low, high = np.uint64(owner * out.size // owners), np.uint64((owner + 1) * out.size // owners)
        for walk in range(2):
            for b in range(ids.shape[0]):
                for f in range(ids.shape[1]):
                    token = base[f] + np.uint64(ids[b, f])
                    row = d_vectors[b, f]
                    element = np.uint64(0)
                    while element < slot_map.width:
                        slot, length, bits = run_at(slot_map, token, element)
                        for s in range(max(slot, low), min(slot + length, high)):
                            if walk == 0:
                                gradient[s] += flip(row[element + (s - slot)], bits, s - slot)
                            else:
                                adagrad_step(s, gradient[s], rate, eps, accumulator, out)
                                gradient[s] = 0
                        element += length


def adagrad_scatter_cpu(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    rate, eps, owners = out.dtype.type(rate), out.dtype.type(eps), get_num_threads()
    _adagrad_scatter(d_vectors, ids, base, slot_map, rate, eps, owners, gradient, accumulator, out)


def adagrad_scatter_cuda(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_cuda(d_vectors, ids, base, slot_map, 1, gradient)
    adagrad_cuda(gradient, rate, eps, accumulator, out)
    gradient[...] = 0
