"""Gradient of the interaction, added up at once: the gradients by vectors are never written.

interaction_scatter, from the vectors that the forward pass kept:

    d_out (B, D + N * (N - 1) / 2), vectors (B, N, D)   as in interaction.py, N = 1 + F
    ids, base, slot_map, scale                          as in scatter_add.py
    d_first (B, D) float   gradient by vector 0, for the bottom MLP; may be a strided view
    out     (M,)   float   scale * sign * the gradients by vectors 1 .. F are added to it

gather_interaction_backward, the gradient of gather_interaction.py, whose vectors are never written either:

    memory, ids, base, slot_map, first   as in gather_interaction.py; `memory` is read once more
    d_out, d_first, out                  as above, with a scale of 1

The first is a whole step of SGD where `out` is the weights. The second must not have its `memory` as `out`:
it would gather weights that other rows of the batch have stepped already. So `out` holds sums, from which the
optimizer's step is made afterwards. robe/interaction.py reckons which of the two moves fewer bytes.

Versions: `reference`, `cpu` and `cuda_apart` are the operations one after the other, with vectors and
gradients (B, N, D) between them. (On the CPU, a batch cut in parts whose gradients stay in the cache was no
faster, and the smaller the parts the slower.) `cuda` gives each row of the batch to a thread block, which
hashes each of its pieces (pieces.py) once, to read the weights and to add their gradients, sums these from
shared memory as interaction.py does, and adds them from registers. Additions are atomic, in no fixed order,
so float sums may differ in the last bits from run to run. Where a row takes more than 48 KB, it is
`cuda_apart`. `cuda_deterministic` is `cuda_apart` with the other scatter_add: a training that repeats takes
the operations themselves, with buffers between them.
"""

from math import gcd

import numpy as np
from numba import config, cuda
from numba.extending import register_jitable

from robe.kernels.gather import gather_cpu, gather_cuda, gather_reference
from robe.kernels.interaction import (
    SUMS,
    interaction_backward_cost,
    interaction_backward_cpu,
    interaction_backward_cuda,
    interaction_backward_reference,
    interaction_backward_shape,
    stage,
    stage_factors,
    staged_sums,
)
from robe.kernels.parts.bfloat import number
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.half import words
from robe.kernels.parts.hashing import U64, flip
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.pieces import U32, around, count_pieces, piece_at, weight
from robe.kernels.parts.vector import in_fours
from robe.kernels.parts.walks import of
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


def gather_interaction_backward_cost(d_out, memory, ids, base, slot_map, first, d_first, out) -> Cost:
    """As interaction_scatter, but weights and `first` are read in place of vectors."""
    vectors = np.broadcast_to(first[:, None], (len(ids), 1 + ids.shape[1], first.shape[1]))
    read = ids.size * first.shape[1] * memory.itemsize + first.nbytes
    moved, flops = interaction_scatter_cost(d_out, vectors, ids, base, slot_map, 1, d_first, out)
    return Cost(moved - vectors.nbytes + read, flops)


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


def _again(gather, scatter, d_out, memory, ids, base, slot_map, first, d_first, out):
    vectors = np.empty_like(first, shape=(len(ids), 1 + ids.shape[1], first.shape[1]))
    vectors[:, 0] = first
    gather(memory, ids, base, slot_map, vectors[:, 1:])
    scatter(d_out, vectors, ids, base, slot_map, 1, d_first, out)


def gather_interaction_backward_reference(*arguments):
    _again(gather_reference, interaction_scatter_reference, *arguments)


def gather_interaction_backward_cpu(*arguments):
    _again(gather_cpu, interaction_scatter_cpu, *arguments)


def gather_interaction_backward_cuda_apart(*arguments):
    _again(gather_cuda, interaction_scatter_cuda_apart, *arguments)


def gather_interaction_backward_cuda_deterministic(*arguments):
    _again(gather_cuda, interaction_scatter_cuda_deterministic, *arguments)


@register_jitable
def _scatter_sum(state, b, i, d, total):
    hashed, pieces, slot_map, shift, scale, d_out, d_first, out = state
    if i == U32(0):
        d_first[b, d] = number(d_out[b, d]) + total
    else:
        part = U32(d >> shift)
        p = U32((i - U32(1)) * U32(d_first.shape[1] >> shift) + part)
        k, bits = U32(d - (part << shift)), hashed[U32(pieces + p)]
        cuda.atomic.add(out, around(hashed[p] + U64(k), slot_map), scale * flip(total, bits, k))


scatter_sums = staged_sums(_scatter_sum)


def scattering(stage_vectors):
    """Kernel: the gradients of the rows of a batch, each by a thread block, added to `out`.

    stage_vectors(source, slot_map, hashed, pieces, shift, b, vectors, thread, threads): copy the vectors
    (N, D) of row b to shared memory. Once the threads have met, `hashed` holds the slots of the row's pieces,
    and their sign bits behind them.
    """

    @cuda.jit(cache=True, **LIMITS)
    @of(stage_vectors)
    def scatter(d_out, n, source, ids, base, slot_map, shift, scale, d_first, out):
        # All dynamic arrays begin at the same memory: slots and signs of the row's pieces, then the numbers.
        hashed = cuda.shared.array(0, np.uint64, alignment=16)
        numbers = cuda.shared.array(0, out.dtype, alignment=16)
        sums = cuda.local.array((SUMS, SUMS), out.dtype)
        factors = cuda.local.array((SUMS, 4), out.dtype)
        thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
        rows, width = U32(d_first.shape[0]), U32(d_first.shape[1])
        pieces = U32((n - U32(1)) * U32(width >> shift))
        staged = numbers[U32(PIECE * pieces) // U32(out.itemsize) :]
        b, scale = U32(cuda.blockIdx.x), value_of(scale)
        while b < rows:
            p = thread
            while p < pieces:
                slot, signs, _, _, _ = piece_at(U32(b * pieces + p), ids, base, slot_map, shift)
                hashed[p], hashed[U32(pieces + p)] = slot, signs
                p = U32(p + threads)
            vectors = staged[stage_factors(d_out, n, width, b, staged, thread, threads) :]
            stage_vectors(source, slot_map, hashed, pieces, shift, b, vectors, thread, threads)
            cuda.syncthreads()
            state = (hashed, pieces, slot_map, shift, scale, d_out, d_first, out)
            scatter_sums(staged, n, width, sums, factors, thread, threads, b, state)
            cuda.syncthreads()  # the next row takes the same memory
            b = U32(b + U32(cuda.gridDim.x))

    return scatter


@register_jitable
def _stage_kept(source, slot_map, hashed, pieces, shift, b, vectors, thread, threads):
    kept, fours = source
    stage(kept, fours, b, vectors, U32(kept.shape[2]), thread, threads)


@register_jitable
def _stage_gathered(source, slot_map, hashed, pieces, shift, b, vectors, thread, threads):
    memory, first = source
    width, signs, elements = U32(first.shape[1]), hashed[pieces:], U32(pieces << shift)
    d, last = thread, U32(max(elements, U32(1)) - U32(1))
    while d < width:
        vectors[d] = first[b, d]
        d = U32(d + threads)
    cuda.syncthreads()  # for the slots
    e = thread
    while e < elements:
        # Four reads under way at a time. What lies behind the last element is the last one again.
        e1, e2 = min(U32(e + threads), last), min(U32(e + U32(2) * threads), last)
        e3 = min(U32(e + U32(3) * threads), last)
        x0 = weight_of(memory, slot_map, hashed, signs, shift, e)
        x1 = weight_of(memory, slot_map, hashed, signs, shift, e1)
        x2 = weight_of(memory, slot_map, hashed, signs, shift, e2)
        x3 = weight_of(memory, slot_map, hashed, signs, shift, e3)
        vectors[U32(width + e)], vectors[U32(width + e1)] = x0, x1
        vectors[U32(width + e2)], vectors[U32(width + e3)] = x2, x3
        e = U32(e + U32(4) * threads)


@register_jitable
def weight_of(memory, slot_map, slots, signs, shift, e):
    """Element e of the pieces in shared memory."""
    p = U32(e >> shift)
    return weight(memory, slot_map, slots[p], signs[p], U32(e - (p << shift)))


_interaction_scatter_kernel = scattering(_stage_kept)
_gather_interaction_backward_kernel = scattering(_stage_gathered)


def fits(features: int, width: int, block: int, itemsize: int = 4) -> bool:
    """Whether a row of the batch is small enough for these kernels; block: Z, which is D for a table."""
    taken = PIECE * features * (width // gcd(width, block, 64))
    return interaction_backward_shape(1, 1 + features, width, itemsize, taken) is not None


def interaction_scatter_cuda(d_out, vectors, ids, base, slot_map, scale, d_first, out):
    source, where = (vectors, in_fours(vectors)), (ids, base, slot_map)
    if not _start(_interaction_scatter_kernel, d_out, vectors.shape[1], source, *where, scale, d_first, out):
        interaction_scatter_cuda_apart(d_out, vectors, *where, scale, d_first, out)


def gather_interaction_backward_cuda(d_out, memory, ids, base, slot_map, first, d_first, out):
    source, where, n = (words(memory), first), (ids, base, slot_map), 1 + ids.shape[1]
    if not _start(_gather_interaction_backward_kernel, d_out, n, source, *where, 1, d_first, out):
        gather_interaction_backward_cuda_apart(d_out, memory, *where, first, d_first, out)


def _start(kernel, d_out, n, source, ids, base, slot_map, scale, d_first, out) -> bool:
    """Start a kernel of `scattering`; False where a row of the batch is too large for it."""
    pieces, shift = count_pieces(slot_map, ids)
    taken = PIECE * pieces // max(len(ids), 1)
    shape = interaction_backward_shape(len(ids), n, d_first.shape[1], out.itemsize, taken)
    if shape is not None:
        rest = (source, ids, base, slot_map, shift, typed(scale, out.dtype), d_first, out)
        launch(kernel, (len(ids),), d_out, U32(n), *rest, shape=shape)
    return shape is not None
