"""Look up and interact in one: the pairwise products of vectors that are never written to memory.

    memory, ids, base, slot_map   as in gather.py
    first (B, D) float            vector 0 of each row, the output of the bottom MLP
    out   (B, D + N * (N - 1) / 2) float   as in interaction.py, N = 1 + F

What inference does; training needs the vectors again for the gradient, and looks them up with gather.py.

Versions: `reference` is the two operations one after the other. `cpu` gathers a row of the batch into a few
kilobytes that stay in the first-level cache, and interacts them there. `cuda_apart` is `reference` in CUDA:
it writes the vectors and reads them again. `cuda` gives each row of the batch to a thread block, which hashes
each piece (pieces.py) once, gathers the vectors into shared memory and interacts them there as in
interaction.py; where they take more than 48 KB, it is `cuda_apart`.
"""

import numpy as np
from numba import config, cuda
from numba.extending import register_jitable

from robe.kernels.gather import gather_cuda, gather_reference, gather_row, out_of_cache
from robe.kernels.interaction import (
    PAIRS,
    interact_row,
    interact_staged,
    interaction_cost,
    interaction_cuda,
    interaction_reference,
    interaction_shape,
    stride_of,
)
from robe.kernels.parts.bfloat import kept
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import stored_weight_bytes
from robe.kernels.parts.half import words
from robe.kernels.parts.launch import launch
from robe.kernels.parts.pieces import TILE, U32, count_pieces, piece_at, weight
from robe.kernels.parts.walks import rows

PIECES = TILE // 2  # hashed at a time: the model's rows have some hundred, and shared memory is short
# For codes the compiler would take up to 69 on cards of 7.5 and 8.0. The simulator knows no such limit.
LIMITS = {} if config.ENABLE_CUDASIM else {"max_registers": 60}


def gather_interaction_cost(memory, ids, base, slot_map, first, out) -> Cost:
    """Each id and weight read, output written; the operations of the interaction."""
    rows, features = ids.shape
    vectors = np.broadcast_to(first[:1, None], (rows, 1 + features, first.shape[1]))
    _, flops = interaction_cost(vectors, out)
    read = ids.nbytes + int(ids.size * first.shape[1] * stored_weight_bytes(memory, slot_map)) + first.nbytes
    return Cost(read + out.nbytes, flops)


def gather_interaction_reference(memory, ids, base, slot_map, first, out):
    rows, features = ids.shape
    vectors = np.empty((rows, 1 + features, first.shape[1]), first.dtype)
    vectors[:, 0] = first
    gather_reference(memory, ids, base, slot_map, vectors[:, 1:])
    interaction_reference(vectors, out)


@register_jitable
def _vectors(state, slot_map, base, b, ids):
    first = state[2]
    return np.empty((1 + ids.size, first.shape[1]), first.dtype)


@register_jitable
def _interact(state, slot_map, base, vectors, b, ids, following):
    memory, prefetches, first, out = state
    for d in range(first.shape[1]):
        vectors[0, d] = first[b, d]
    gather_row(memory, ids, following, base, slot_map, prefetches, vectors[1:])
    interact_row(vectors, out[b])


_gather_interaction = rows(_vectors, _interact)


def gather_interaction_cpu(memory, ids, base, slot_map, first, out):
    _gather_interaction((words(memory), out_of_cache(memory), first, out), slot_map, ids, base)


def gather_interaction_cuda_apart(memory, ids, base, slot_map, first, out):
    rows, features = ids.shape
    vectors = np.empty_like(first, shape=(rows, 1 + features, first.shape[1]))  # CuPy's where `first` is
    vectors[:, 0] = first
    gather_cuda(memory, ids, base, slot_map, vectors[:, 1:])
    interaction_cuda(vectors, out)


@cuda.jit(cache=True, **LIMITS)
def _gather_interaction_kernel(memory, ids, base, slot_map, shift, first, out):
    staged = cuda.shared.array(0, first.dtype, alignment=16)
    slots = cuda.shared.array(PIECES, np.uint64)
    signs = cuda.shared.array(PIECES, np.uint64)
    columns = cuda.shared.array(PIECES, np.uint32)  # in `staged`
    products = cuda.local.array((PAIRS, PAIRS), first.dtype)
    numbers = cuda.local.array((PAIRS, 4), first.dtype)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    rows, n, width = U32(ids.shape[0]), U32(ids.shape[1] + 1), U32(first.shape[1])
    stride, pieces = stride_of(width), U32(ids.shape[1] * U32(width >> shift))  # of a row of the batch
    b = U32(cuda.blockIdx.x)
    while b < rows:
        d = thread
        while d < width:
            staged[d] = first[b, d]
            out[b, d] = kept(out, first[b, d])
            d = U32(d + threads)
        done = U32(0)
        while done < pieces:
            count = min(U32(PIECES), U32(pieces - done))
            p = thread
            while p < count:
                piece = U32(b * pieces + done + p)
                slots[p], signs[p], _, f, element = piece_at(piece, ids, base, slot_map, shift)
                columns[p] = U32(f + U32(1)) * stride + element
                p = U32(p + threads)
            cuda.syncthreads()
            e, elements = thread, U32(count << shift)
            while e < elements:
                # Four reads under way at a time. What lies behind the last element is the last one again.
                e1 = min(U32(e + threads), U32(elements - U32(1)))
                e2 = min(U32(e1 + threads), U32(elements - U32(1)))
                e3 = min(U32(e2 + threads), U32(elements - U32(1)))
                i0, x0 = element_of(memory, slot_map, slots, signs, columns, shift, e)
                i1, x1 = element_of(memory, slot_map, slots, signs, columns, shift, e1)
                i2, x2 = element_of(memory, slot_map, slots, signs, columns, shift, e2)
                i3, x3 = element_of(memory, slot_map, slots, signs, columns, shift, e3)
                staged[i0], staged[i1], staged[i2], staged[i3] = x0, x1, x2, x3
                e = U32(e + 4 * threads)
            cuda.syncthreads()
            done = U32(done + U32(PIECES))
        cuda.syncthreads()  # for `first`, where there are no pieces
        interact_staged(staged, n, width, products, numbers, thread, threads, out, b)
        cuda.syncthreads()  # the next row takes the same memory
        b = U32(b + U32(cuda.gridDim.x))


@register_jitable
def element_of(memory, slot_map, slots, signs, columns, shift, e):
    """(index in `staged`, value) of element e of the pieces in shared memory."""
    p = U32(e >> shift)
    k = U32(e - (p << shift))
    return columns[p] + k, weight(memory, slot_map, slots[p], signs[p], k)


def gather_interaction_cuda(memory, ids, base, slot_map, first, out):
    rows, width = first.shape
    shape = interaction_shape(rows, 1 + ids.shape[1], width, first.itemsize, PIECES * 20)
    if shape is None:
        return gather_interaction_cuda_apart(memory, ids, base, slot_map, first, out)
    _, shift = count_pieces(slot_map, ids)
    arguments = (words(memory), ids, base, slot_map, shift, first, out)
    launch(_gather_interaction_kernel, (rows,), *arguments, shape=shape)
