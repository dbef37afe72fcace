"""Gradient of the look-up: out[slot] += scale * sign * d_vectors[b, f, i], in the order of the batch.

    d_vectors (B, F, D) float   gradient of the loss by the vectors; may be a strided view
    ids, base, slot_map         as in gather.py, whose adjoint this is (for scale = 1)
    scale     float             1 for the gradient, -learning rate for a fused step of SGD on `memory`
    out       (M,)    float     added to

Versions: `reference` is `np.add.at`, one addition after the other. `cpu` lists the spans of the batch
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
from numba import cuda
from numba.extending import register_jitable

from robe.kernels.gather import token_of
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.hashing import U64, flip, slots_reference, span_at
from robe.kernels.parts.lanes import add_span, require_rows_together
from robe.kernels.parts.launch import launch
from robe.kernels.parts.pieces import U32, around, count_pieces, piece_at
from robe.kernels.parts.walks import add, elements, pieces, spans, walk_elements, walk_pieces, walk_spans

ZERO, ONE = np.float32(0), U64(1)


def scatter_add_cost(d_vectors, ids, base, slot_map, scale, out) -> Cost:
    """Each id and gradient read, each slot read and written; a product and a sum per element."""
    return Cost(ids.nbytes + 3 * d_vectors.nbytes, 2 * d_vectors.size)


def scatter_add_reference(d_vectors, ids, base, slot_map, scale, out):
    slots, signs = slots_reference(slot_map, base + ids.astype(np.uint64))
    np.add.at(out, slots, out.dtype.type(scale) * (d_vectors * signs.astype(out.dtype)))


@register_jitable(forceinline=True)
def _add(state, b, element, slot, length, bits):
    d_vectors, scale, out = state
    add_span(d_vectors[b], element, bits, scale, out, slot, length)


_scatter_add = spans(_add)


def scatter_add_cpu(d_vectors, ids, base, slot_map, scale, out):
    require_rows_together(d_vectors)
    walk_spans(_scatter_add, ids, base, slot_map, out, (d_vectors, out.dtype.type(scale), out))


@register_jitable
def _add_element(state, token, b, f, i):
    _, _, slot_map, d_vectors, scale, out = state
    slot, _, bits = span_at(slot_map, token, np.uint64(i))
    add(out, slot, scale * flip(d_vectors[b, f, i], bits, 0))


_scatter_add_elements_kernel = elements(token_of, _add_element)


def scatter_add_cuda_elements(d_vectors, ids, base, slot_map, scale, out):
    state = (ids, base, slot_map, d_vectors, out.dtype.type(scale), out)
    walk_elements(_scatter_add_elements_kernel, d_vectors.shape, state)


@register_jitable
def _add_piece(state, slot_map, b, column, slot, bits):
    d_vectors, scale, out = state  # d_vectors (B, F * D)
    add(out, around(slot, out.size), scale * flip(d_vectors[b, column], bits, 0))


_scatter_add_kernel = pieces(_add_piece)


def scatter_add_cuda(d_vectors, ids, base, slot_map, scale, out):
    rows, features, width = d_vectors.shape
    state = (d_vectors.reshape(rows, features * width), out.dtype.type(scale), out)
    walk_pieces(_scatter_add_kernel, ids, base, slot_map, state)


@cuda.jit(cache=True)
def _sorting_keys_kernel(ids, base, slot_map, shift, slots, origins, signs):
    p = U32(cuda.grid(1))
    while p < U32(slots.size):
        slots[p], signs[p], b, f, element = piece_at(p, ids, base, slot_map, shift)
        origins[p, 0], origins[p, 1], origins[p, 2] = b, f, element
        p = U32(p + cuda.gridsize(1))


def sorted_pieces(ids, base, slot_map):
    """The pieces of a batch by slot, those of one slot in the order of the batch.

    (slots, sorted; order, which piece of the batch each is; origins (b, f, element) and sign bits of the
    pieces as the batch has them; shift)
    """
    pieces, shift = count_pieces(slot_map, ids)
    # NumPy hands these to CuPy where ids are CuPy's.
    slots, signs = np.empty_like(ids, np.uint64, shape=(2, pieces))
    origins = np.empty_like(ids, shape=(pieces, 3))
    launch(_sorting_keys_kernel, (pieces,), ids, base, slot_map, shift, slots, origins, signs)
    order = np.argsort(slots, kind="stable")
    return slots[order], order, origins, signs, shift


@register_jitable
def slot_sum(d_vectors, slots, order, origins, signs, shift, p, k, size):
    """(slot, sum of all its gradients) for element k of sorted piece p; slot = size if that is no owner."""
    pieces, length = U32(slots.size), ONE << U64(shift)
    reached, end = slots[p] + U64(k), U64(size)  # where the piece says, which may lie behind the end
    slot = around(reached, size)
    # The owner is the first piece to cover the slot; one that goes around the end comes after those at 0.
    if (p > U32(0) and slots[p - U32(1)] + length > reached) or (reached >= end and slots[0] <= slot):
        return end, ZERO
    total = ZERO
    while p < pieces and slots[p] <= reached:
        total += gradient_at(d_vectors, order[p], origins, signs, reached - slots[p])
        p = U32(p + U32(1))
    if reached < end:
        p = pieces
        while p > U32(0) and slots[p - U32(1)] + length > slot + end:
            p = U32(p - U32(1))
            total += gradient_at(d_vectors, order[p], origins, signs, slot + end - slots[p])
    return slot, total


@register_jitable
def gradient_at(d_vectors, piece, origins, signs, k):
    return flip(d_vectors[origins[piece, 0], origins[piece, 1], U64(origins[piece, 2]) + k], signs[piece], k)


@cuda.jit(cache=True)
def _scatter_sums_kernel(d_vectors, slots, order, origins, signs, shift, scale, out):
    e = U64(cuda.grid(1))
    while e < U64(slots.size) << U64(shift):
        p = U32(e >> U64(shift))
        k = e - (U64(p) << U64(shift))
        slot, total = slot_sum(d_vectors, slots, order, origins, signs, shift, p, k, out.size)
        if slot < U64(out.size):
            out[slot] += scale * total
        e += U64(cuda.gridsize(1))


def scatter_add_cuda_deterministic(d_vectors, ids, base, slot_map, scale, out):
    pieces = sorted_pieces(ids, base, slot_map)
    launch(_scatter_sums_kernel, (d_vectors.size,), d_vectors, *pieces, out.dtype.type(scale), out)
