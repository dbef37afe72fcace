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
atomically too. `cuda_deterministic` adds up integers (parts/fixed.py), for which the order does not matter:
the same bits in every run, for every launch, and for any order of the batch. It looks for the largest
gradient, adds all of them in units to an array of M int64, which it keeps, and at last adds these sums to
`out`: those of the whole array, or of the slots of the batch where they are fewer. The sum of n gradients is
wrong by less than n units, 2^-40 times the power of two above the largest gradient of the batch (for up to
2^23 pieces; each doubling of these doubles the unit), and then rounded once. What is not finite is added to
its slot as it is.
"""

import numpy as np
from numba import cuda
from numba.extending import register_jitable

from robe.kernels.gather import token_of
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.fixed import INFINITE, digits_of, finite_bits, from_units, size_bits, to_units
from robe.kernels.parts.hashing import U64, flip, slots_reference, span_at
from robe.kernels.parts.lanes import add_span, require_rows_together
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.pieces import U32, around, count_pieces
from robe.kernels.parts.scratch import scratch, zeros
from robe.kernels.parts.walks import (
    add,
    elements,
    pieces,
    spans,
    take,
    walk_elements,
    walk_pieces,
    walk_spans,
)


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


@cuda.jit
def _largest_kernel(d_vectors, largest):
    """largest (1,), 0 before: the bits of the largest finite |number| of d_vectors (B, F * D)."""
    block = cuda.shared.array(1, np.uint32)
    rows, columns = U32(d_vectors.shape[0]), U32(d_vectors.shape[1])
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    if thread == U32(0):
        block[0] = 0
    cuda.syncthreads()
    found, last = U32(0), U32(columns - U32(1))
    b = U32(cuda.blockIdx.x)
    while b < rows:
        c = thread
        while c < columns:
            # Four reads under way at a time. What lies behind the last number is the last one again.
            c1, c2, c3 = U32(c + threads), U32(c + U32(2) * threads), U32(c + U32(3) * threads)
            x0, x1 = d_vectors[b, c], d_vectors[b, min(c1, last)]
            x2, x3 = d_vectors[b, min(c2, last)], d_vectors[b, min(c3, last)]
            found = max(found, finite_bits(x0), finite_bits(x1), finite_bits(x2), finite_bits(x3))
            c = U32(c + U32(4) * threads)
        b = U32(b + U32(cuda.gridDim.x))
    cuda.atomic.max(block, 0, found)
    cuda.syncthreads()
    if thread == U32(0):
        cuda.atomic.max(largest, 0, block[0])


@register_jitable
def _add_units(state, slot_map, b, column, slot, bits):
    d_vectors, largest, digits, scale, sums, out = state
    x, slot = flip(d_vectors[b, column], bits, 0), around(slot, out.size)
    if size_bits(x) < INFINITE:
        add(sums, slot, to_units(x, largest[0], digits))
    else:
        add(out, slot, scale * x)


_add_units_kernel = pieces(_add_units)


@register_jitable
def add_sum(slot, total, largest, digits, scale, out):
    out[slot] += scale * from_units(total, largest[0], digits)


@cuda.jit
def _add_sums_kernel(largest, digits, scale, sums, out):
    slot = U64(cuda.grid(1))
    while slot < U64(out.size):
        total = sums[slot]
        if total != 0:
            sums[slot] = 0
            add_sum(slot, total, largest, digits, scale, out)
        slot += U64(cuda.gridsize(1))


@register_jitable
def _take_sum(state, slot_map, b, column, slot, bits):
    largest, digits, scale, sums, out = state
    slot = around(slot, out.size)
    if sums[slot] != 0:
        total = take(sums, slot).view(np.int64)
        if total != 0:
            add_sum(slot, total, largest, digits, scale, out)


_take_sums_kernel = pieces(_take_sum)


def scatter_add_cuda_deterministic(d_vectors, ids, base, slot_map, scale, out):
    rows, features, width = d_vectors.shape
    d_vectors, scale = d_vectors.reshape(rows, features * width), out.dtype.type(scale)
    digits = digits_of(count_pieces(slot_map, ids)[0])  # a piece adds to a slot once at most
    largest = scratch(out, "largest", (1,), np.uint32)
    largest[...] = 0
    launch(_largest_kernel, d_vectors.shape, d_vectors, largest, shape=block_shape(rows, features * width))
    with zeros(out, "sums", out.shape, np.int64) as sums:
        walk_pieces(_add_units_kernel, ids, base, slot_map, (d_vectors, largest, digits, scale, sums, out))
        if out.size <= d_vectors.size:
            launch(_add_sums_kernel, out.shape, largest, digits, scale, sums, out)
        else:
            state = (largest, digits, scale, sums.view("uint64"), out)
            walk_pieces(_take_sums_kernel, ids, base, slot_map, state)
