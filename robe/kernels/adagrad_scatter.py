"""Adagrad on the shared array: sum the gradients of a batch per slot, then step the touched slots.

Adagrad needs the whole gradient of a slot before it steps, so two walks over the batch: the first adds
into `gradient`, the second steps each slot it meets and clears its gradient; a slot met again finds a
gradient of 0 and stays. Slots that no row of the batch touches are never read.

    d_vectors, ids, base, slot_map       as in scatter_add.py
    rate, eps                            as in adagrad.py
    gradient    (M,) float               scratch, all 0 before and after
    accumulator (M,) float, out (M,)     state and weights, stepped in place

Versions: in `cpu` each thread owns a range of the array in both walks, as in scatter_add.py. `reference` and
`cuda_sweep` scatter, then step the whole array, which is the same since a gradient of 0 changes nothing, but
costs as much as the array is large. `cuda` scatters and walks the batch again: each thread exchanges the
gradient of its slot with 0, atomically, so of all threads that meet a slot exactly one gets its gradient, and
that one steps it. `cuda_deterministic` needs no second walk: the thread that has the whole sum of a slot
(scatter_add.py) steps it.
"""

import numpy as np
from numba import cuda, get_num_threads, njit, prange

from robe.kernels.adagrad import adagrad_cuda, adagrad_reference, adagrad_step
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.hashing import U64
from robe.kernels.parts.lanes import adagrad_run
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.pieces import TILE, U32, around, count_pieces, piece_at
from robe.kernels.parts.spans import find_runs, most_runs, own_runs, room_for_runs
from robe.kernels.scatter_add import (
    scatter_add_cpu,
    scatter_add_cuda,
    scatter_add_reference,
    slot_sum,
    sorted_pieces,
)


def adagrad_scatter_cost(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out) -> Cost:
    """Both walks when no slot repeats: scatter_add's, then five passes over what was touched."""
    return Cost(2 * ids.nbytes + (3 + 5) * d_vectors.nbytes, (1 + 7) * d_vectors.size)


def adagrad_scatter_reference(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_reference(d_vectors, ids, base, slot_map, 1, gradient)
    adagrad_reference(gradient, rate, eps, accumulator, out)
    gradient[...] = 0


@njit(parallel=True, nogil=True, cache=True)
def _adagrad_scatter(ids, base, slot_map, rate, eps, most, owners, gradient, accumulator, out):
    rows = ids.shape[0]
    runs, counts = room_for_runs(rows, most)
    for chunk in range(0, rows, len(runs)):
        size = min(len(runs), rows - chunk)
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
    _adagrad_scatter(
        *(ids, base, slot_map, number(rate), number(eps), most, get_num_threads()),
        *(gradient, accumulator, out),
    )


def adagrad_scatter_cuda_sweep(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_cuda(d_vectors, ids, base, slot_map, 1, gradient)
    adagrad_cuda(gradient, rate, eps, accumulator, out)
    gradient[...] = 0


@cuda.jit
def _adagrad_scatter_kernel(ids, base, slot_map, pieces, shift, rate, eps, gradient, accumulator, out):
    slots = cuda.shared.array(TILE, np.uint64)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    first = U32(cuda.blockIdx.x * TILE)
    while first < pieces:
        count = min(U32(TILE), U32(pieces - first))
        p = thread
        while p < count:
            slots[p], _, _, _, _ = piece_at(U32(first + p), ids, base, slot_map, shift)
            p = U32(p + threads)
        cuda.syncthreads()
        e = thread
        while e < count << shift:
            p = U32(e >> shift)
            slot = around(slots[p] + U64(e - (p << shift)), out.size)
            taken = cuda.atomic.exch(gradient, slot, 0).view(out.dtype)
            if taken != 0:
                adagrad_step(slot, taken, rate, eps, accumulator, out)
            e = U32(e + threads)
        cuda.syncthreads()  # the next tile takes the same place
        first = U32(first + cuda.gridDim.x * TILE)


def adagrad_scatter_cuda(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    scatter_add_cuda(d_vectors, ids, base, slot_map, 1, gradient)
    pieces, shift = count_pieces(slot_map, ids)
    number = out.dtype.type
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    arguments = (number(rate), number(eps), gradient.view(f"u{gradient.itemsize}"), accumulator, out)
    shape = block_shape(-(-pieces // TILE))
    launch(
        _adagrad_scatter_kernel, (pieces,), ids, base, slot_map, U32(pieces), shift, *arguments, shape=shape
    )


@cuda.jit
def _adagrad_sums_kernel(d_vectors, slots, order, places, signs, shift, rate, eps, accumulator, out):
    e = U64(cuda.grid(1))
    while e < U64(slots.size) << U64(shift):
        p = U32(e >> U64(shift))
        k = e - (U64(p) << U64(shift))
        slot, total = slot_sum(d_vectors, slots, order, places, signs, shift, p, k, out.size)
        if slot < U64(out.size):
            adagrad_step(slot, total, rate, eps, accumulator, out)
        e += U64(cuda.gridsize(1))


def adagrad_scatter_cuda_deterministic(d_vectors, ids, base, slot_map, rate, eps, gradient, accumulator, out):
    pieces = sorted_pieces(ids, base, slot_map)
    number = out.dtype.type
    arguments = (d_vectors, *pieces, number(rate), number(eps), accumulator, out)
    launch(_adagrad_sums_kernel, (d_vectors.size,), *arguments)
