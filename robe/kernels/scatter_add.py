"""Gradient of the look-up: out[slot] += scale * sign * d_vectors[b, f, i], in the order of the batch.

    d_vectors (B, F, D) float   gradient of the loss by the vectors; may be a strided view
    ids, base, slot_map         as in gather.py, whose adjoint this is (for scale = 1)
    scale     float             1 for the gradient, -learning rate for a fused step of SGD on `memory`
    out       (M,)    float     added to

Versions: `reference` is `np.add.at`, one addition after the other. `cpu` lists the runs of the batch
(parts/spans.py) and splits `out` in as many ranges as there are threads: each goes through the list in the
order of the batch and adds what falls into its own range, so no two threads ever write the same slot, and
every slot sums in the order of the batch however many threads there are. `cuda_elements` gives one thread
to each element, which hashes where it goes and adds atomically: correct, but in no fixed order, so float
sums may differ in the last bits from run to run. `cuda` hashes once per piece (pieces.py), then adds
atomically too. `cuda_deterministic` sorts the pieces by their slots; the first of the sorted pieces that
cover a slot owns it, and its thread adds up all of them in that order: the same bits in every run and for
every launch, for the price of a sort and of one slow thread where many rows share a slot.
"""

import numpy as np
from numba import cuda, get_num_threads, njit, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.hashing import U64, flip, run_at, slots_reference
from robe.kernels.parts.lanes import add_run, require_rows_together
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.pieces import TILE, U32, around, count_pieces, piece_at
from robe.kernels.parts.spans import find_runs, most_runs, own_runs, room_for_runs

ZERO, ONE = np.float32(0), U64(1)


def scatter_add_cost(d_vectors, ids, base, slot_map, scale, out) -> Cost:
    """Each id and gradient read, each slot read and written; a product and a sum per element."""
    return Cost(ids.nbytes + 3 * d_vectors.nbytes, 2 * d_vectors.size)


def scatter_add_reference(d_vectors, ids, base, slot_map, scale, out):
    slots, signs = slots_reference(slot_map, base + ids.astype(np.uint64))
    np.add.at(out, slots, out.dtype.type(scale) * (d_vectors * signs.astype(out.dtype)))


@njit(parallel=True, nogil=True, cache=True)
def _scatter_add(d_vectors, ids, base, slot_map, scale, most, owners, out):
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
def _scatter_add_elements_kernel(d_vectors, ids, base, slot_map, scale, out):
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


def scatter_add_cuda_elements(d_vectors, ids, base, slot_map, scale, out):
    rows, features, width = d_vectors.shape
    scale = out.dtype.type(scale)
    launch(_scatter_add_elements_kernel, (width, rows, features), d_vectors, ids, base, slot_map, scale, out)


@cuda.jit
def _scatter_add_kernel(d_vectors, ids, base, slot_map, pieces, shift, scale, out):
    slots = cuda.shared.array(TILE, np.uint64)
    signs = cuda.shared.array(TILE, np.uint64)
    rows = cuda.shared.array(TILE, np.uint32)
    features = cuda.shared.array(TILE, np.uint32)
    elements = cuda.shared.array(TILE, np.uint32)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    first = U32(cuda.blockIdx.x * TILE)
    while first < pieces:
        count = min(U32(TILE), U32(pieces - first))
        p = thread
        while p < count:
            place = piece_at(U32(first + p), ids, base, slot_map, shift)
            slots[p], signs[p], rows[p], features[p], elements[p] = place
            p = U32(p + threads)
        cuda.syncthreads()
        e = thread
        while e < count << shift:
            p = U32(e >> shift)
            k = U32(e - (p << shift))
            value = flip(d_vectors[rows[p], features[p], elements[p] + k], signs[p], k)
            cuda.atomic.add(out, around(slots[p] + U64(k), out.size), scale * value)
            e = U32(e + threads)
        cuda.syncthreads()  # the next tile takes the same place
        first = U32(first + cuda.gridDim.x * TILE)


def scatter_add_cuda(d_vectors, ids, base, slot_map, scale, out):
    pieces, shift = count_pieces(slot_map, ids)
    arguments = (d_vectors, ids, base, slot_map, U32(pieces), shift, out.dtype.type(scale), out)
    launch(_scatter_add_kernel, (pieces,), *arguments, shape=block_shape(-(-pieces // TILE)))


@cuda.jit
def _sorting_keys_kernel(ids, base, slot_map, shift, slots, places, signs):
    p = U32(cuda.grid(1))
    while p < U32(slots.size):
        slots[p], signs[p], b, f, element = piece_at(p, ids, base, slot_map, shift)
        places[p, 0], places[p, 1], places[p, 2] = b, f, element
        p = U32(p + cuda.gridsize(1))


def sorted_pieces(ids, base, slot_map):
    """The pieces of a batch by slot, those of one slot in the order of the batch.

    (slots, which piece it is; of each piece in the order of the batch: (b, f, element), sign bits; shift)
    """
    pieces, shift = count_pieces(slot_map, ids)
    # NumPy hands these to CuPy where ids are CuPy's.
    slots, signs = np.empty_like(ids, np.uint64, shape=(2, pieces))
    places = np.empty_like(ids, shape=(pieces, 3))
    launch(_sorting_keys_kernel, (pieces,), ids, base, slot_map, shift, slots, places, signs)
    order = np.argsort(slots, kind="stable")
    return slots[order], order, places, signs, shift


@register_jitable
def slot_sum(d_vectors, slots, order, places, signs, shift, p, k, size):
    """(slot, sum of all its gradients) for element k of sorted piece p; slot = size if that is no owner."""
    pieces, length = U32(slots.size), ONE << U64(shift)
    place, end = slots[p] + U64(k), U64(size)
    slot = around(place, size)
    # The owner is the first piece to cover the slot; one that goes around the end comes after those at 0.
    if (p > U32(0) and slots[p - U32(1)] + length > place) or (place >= end and slots[0] <= slot):
        return end, ZERO
    total = ZERO
    while p < pieces and slots[p] <= place:
        total += gradient_at(d_vectors, order[p], places, signs, place - slots[p])
        p = U32(p + U32(1))
    if place < end:
        p = pieces
        while p > U32(0) and slots[p - U32(1)] + length > slot + end:
            p = U32(p - U32(1))
            total += gradient_at(d_vectors, order[p], places, signs, slot + end - slots[p])
    return slot, total


@register_jitable
def gradient_at(d_vectors, piece, places, signs, k):
    return flip(d_vectors[places[piece, 0], places[piece, 1], U64(places[piece, 2]) + k], signs[piece], k)


@cuda.jit
def _scatter_sums_kernel(d_vectors, slots, order, places, signs, shift, scale, out):
    e = U64(cuda.grid(1))
    while e < U64(slots.size) << U64(shift):
        p = U32(e >> U64(shift))
        k = e - (U64(p) << U64(shift))
        slot, total = slot_sum(d_vectors, slots, order, places, signs, shift, p, k, out.size)
        if slot < U64(out.size):
            out[slot] += scale * total
        e += U64(cuda.gridsize(1))


def scatter_add_cuda_deterministic(d_vectors, ids, base, slot_map, scale, out):
    pieces = sorted_pieces(ids, base, slot_map)
    launch(_scatter_sums_kernel, (d_vectors.size,), d_vectors, *pieces, out.dtype.type(scale), out)
