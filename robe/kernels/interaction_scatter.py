"""Gradient of the interaction, added to the weights at once: the gradients by vectors are never written.

    d_out (B, D + N * (N - 1) / 2), vectors (B, N, D)   as in interaction.py, N = 1 + F
    ids, base, slot_map, scale                          as in scatter_add.py
    d_first (B, D) float   gradient by vector 0, for the bottom MLP; may be a strided view
    out     (M,)   float   scale * sign * the gradients by vectors 1 .. F are added to it

The backward twin of gather_interaction.py, for a step of SGD, which needs no sums of gradients first. The
vectors are those that the forward pass kept. To gather them again instead, where `out` is what they were
gathered from, would find weights that other rows of the batch have stepped already, so gradients would have
to be summed in an array of their own. By bytes, for 65,536 x 26 x 128 at 4.2 TB/s: vectors written once and
read twice are 2.6 GB, 0.62 ms. From 10 MB, which stay in the second-level cache, at most that is to be
saved, less hashing twice. From 100 MB it is 0.4 ms: blocks of 32 weights at any slot are 4.9 sectors of 32
bytes, 0.5 GB with half of them cached, and clearing and adding 100 MB of sums moves 0.4 GB, as much for small
batches, which would lose.

Versions: `reference`, `cpu` and `cuda_apart` are the two operations one after the other, with the gradients
(B, N, D) between them. (On the CPU, a batch cut in parts whose gradients stay in the cache was no faster, and
the smaller the parts the slower.) `cuda` gives each row of the batch to a thread block, which hashes each of
its pieces (pieces.py) once, sums the gradients from shared memory as interaction.py does, and adds them from
registers. Additions are atomic, in no fixed order, so float sums may differ in the last bits from run to run.
Where a row takes more than 48 KB, it is `cuda_apart`. `cuda_deterministic` is `cuda_apart` with the other
scatter_add: a training that repeats takes the two operations themselves, with a buffer between them.
"""

import numpy as np
from numba import config, cuda
from numba.extending import register_jitable

from robe.kernels.interaction import (
    SUMS,
    interaction_backward_cost,
    interaction_backward_cpu,
    interaction_backward_cuda,
    interaction_backward_reference,
    interaction_backward_shape,
    stage_backward,
    staged_sums,
)
from robe.kernels.parts.bfloat import number
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.hashing import U64, flip
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.pieces import U32, around, count_pieces, piece_at
from robe.kernels.parts.vector import in_fours
from robe.kernels.scatter_add import (
    scatter_add_cpu,
    scatter_add_cuda,
    scatter_add_cuda_deterministic,
    scatter_add_reference,
)

PIECE = 16  # bytes of shared memory: slot and sign bits
# Five thread blocks of 224 threads fit on an SM with so many registers a thread; nothing spills. The compiler
# would take 72 for cards of 7.5 and 8.0. The simulator knows no such limit.
LIMITS = {} if config.ENABLE_CUDASIM else {"max_registers": 56}


def interaction_scatter_cost(d_out, vectors, ids, base, slot_map, scale, d_first, out) -> Cost:
    """All inputs read, d_first written, each slot read and written; the operations of both."""
    elements = ids.size * vectors.shape[2]
    _, flops = interaction_backward_cost(d_out, vectors, None)
    moved = d_out.nbytes + vectors.nbytes + ids.nbytes + d_first.nbytes + 2 * elements * out.itemsize
    return Cost(moved, flops + 2 * elements)


def _apart(backward, scatter_add, d_out, vectors, ids, base, slot_map, scale, d_first, out):
    d_vectors = np.empty_like(vectors)  # CuPy's where `vectors` is
    backward(d_out, vectors, d_vectors)
    d_first[...] = d_vectors[:, 0]
    # A vector may be made of several rows, each of which `ids` names.
    d_rows = d_vectors[:, 1:].reshape(*ids.shape, int(slot_map.width))
    scatter_add(d_rows, ids, base, slot_map, scale, out)


def interaction_scatter_reference(*arguments):
    _apart(interaction_backward_reference, scatter_add_reference, *arguments)


def interaction_scatter_cpu(*arguments):
    _apart(interaction_backward_cpu, scatter_add_cpu, *arguments)


def interaction_scatter_cuda_apart(*arguments):
    _apart(interaction_backward_cuda, scatter_add_cuda, *arguments)


def interaction_scatter_cuda_deterministic(*arguments):
    _apart(interaction_backward_cuda, scatter_add_cuda_deterministic, *arguments)


@register_jitable
def _scatter_sum(state, b, i, d, total):
    hashed, pieces, shift, scale, d_out, d_first, out = state
    if i == U32(0):
        d_first[b, d] = number(d_out[b, d]) + total
    else:
        part = U32(d >> shift)
        p = U32((i - U32(1)) * U32(d_first.shape[1] >> shift) + part)
        k, bits = U32(d - (part << shift)), hashed[U32(pieces + p)]
        cuda.atomic.add(out, around(hashed[p] + U64(k), out.size), scale * flip(total, bits, k))


scatter_sums = staged_sums(_scatter_sum)


@cuda.jit(cache=True, **LIMITS)
def _interaction_scatter_kernel(d_out, vectors, fours, ids, base, slot_map, shift, scale, d_first, out):
    # All dynamic arrays begin at the same memory: slots and signs of the row's pieces, then the numbers.
    hashed = cuda.shared.array(0, np.uint64, alignment=16)
    numbers = cuda.shared.array(0, vectors.dtype, alignment=16)
    sums = cuda.local.array((SUMS, SUMS), vectors.dtype)
    factors = cuda.local.array((SUMS, 4), vectors.dtype)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    rows, n, width = U32(vectors.shape[0]), U32(vectors.shape[1]), U32(vectors.shape[2])
    pieces = U32((n - U32(1)) * U32(width >> shift))
    staged = numbers[U32(PIECE * pieces) // U32(vectors.itemsize) :]
    b, scale = U32(cuda.blockIdx.x), value_of(scale)
    while b < rows:
        p = thread
        while p < pieces:
            slot, signs, _, _, _ = piece_at(U32(b * pieces + p), ids, base, slot_map, shift)
            hashed[p], hashed[U32(pieces + p)] = slot, signs
            p = U32(p + threads)
        stage_backward(d_out, vectors, fours, b, staged, thread, threads)
        cuda.syncthreads()
        state = (hashed, pieces, shift, scale, d_out, d_first, out)
        scatter_sums(staged, n, width, sums, factors, thread, threads, b, state)
        cuda.syncthreads()  # the next row takes the same memory
        b = U32(b + U32(cuda.gridDim.x))


def interaction_scatter_cuda(d_out, vectors, ids, base, slot_map, scale, d_first, out):
    pieces, shift = count_pieces(slot_map, ids)
    shape = interaction_backward_shape(*vectors.shape, vectors.itemsize, PIECE * pieces // max(len(ids), 1))
    if shape is None:
        return interaction_scatter_cuda_apart(d_out, vectors, ids, base, slot_map, scale, d_first, out)
    rows = (ids, base, slot_map, shift)
    arguments = (d_out, vectors, in_fours(vectors), *rows, typed(scale, out.dtype), d_first, out)
    launch(_interaction_scatter_kernel, (len(ids),), *arguments, shape=shape)
