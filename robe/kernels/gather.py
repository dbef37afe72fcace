"""Look up: vectors[b, f, i] = sign * memory[slot], for the rows `ids` names.

    memory   (M,)    float    the shared weights; float16 is read as float32 (half.py), and so are codes in
                              groups, (R, S) uint8 (groups.py)
    ids      (B, F)  uint32   categorical values
    base     (F,)    uint64   token = base[f] + id
    slot_map                  where each element of a row lives (hashing.py)
    out      (B, F, D) float  written in full; may be a view whose rows out[b] are contiguous

Versions: `reference` makes the tensors of slots and signs, which is what the formula says and what the
published PyTorch code does. `cpu` hashes once per block and copies runs of consecutive weights; nothing
of the size of `out` is made besides it. Only the first block of a row takes a division, the next ones
follow it, and a large array is prefetched some vectors ahead. The rows of a full table are copied without
what only blocks need, which is 1.4 times as fast at 2 GB. `cuda_elements` gives one thread to each
element, which hashes where it lies, some sixty instructions for four bytes. `cuda` hashes once per piece
(pieces.py), and each thread copies four neighbours and writes them at once; it needs rows of float32 at
multiples of 16 bytes and pieces of at least four elements, and is `cuda_elements` otherwise.
"""

import numpy as np
from numba import cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import copy_slots, fetch, prefetch_slots, quantised, stored_weight_bytes
from robe.kernels.parts.half import words
from robe.kernels.parts.hashing import (
    ONE,
    TABLE,
    ZERO,
    block_of,
    flip,
    place,
    run_at,
    run_from,
    slots_reference,
)
from robe.kernels.parts.lanes import require_rows_together
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.pieces import TILE, U32, count_pieces, piece_at, weight
from robe.kernels.parts.vector import in_fours, store4

# Above this many bytes a ROBE array falls out of the caches, and waiting for memory costs more than hashing
# a vector early to prefetch it: slower by a fifth at 10 MB, twice as fast at 100 MB.
CACHE = 2**24
# Codes take longer to expand than floats to copy, so fewer reads are under way at a time: with prefetching
# slower by a seventh at 1 MB (Z = 32), faster by a fifth at 4 MB and 2.5 times at 15 MB.
CACHE_OF_CODES = 2**22
# Vectors asked for ahead of the one that is copied. 2 and 4 are alike; with 8 or a row of the batch, more
# cache lines are asked for than a core can await, and half of the gain may be lost.
AHEAD = 4


def gather_cost(memory, ids, base, slot_map, out) -> Cost:
    """Each id and weight read, each element written; a change of sign, a product and a sum per element."""
    moved = ids.nbytes + int(out.size * stored_weight_bytes(memory, slot_map)) + out.nbytes
    return Cost(moved, out.size * (int(slot_map.signed) + 2 * quantised(memory)))


def gather_reference(memory, ids, base, slot_map, out):
    slots, signs = slots_reference(slot_map, base + ids.astype(np.uint64))
    weights = fetch(memory, slot_map, slots.astype(np.uint64)) if quantised(memory) else memory[slots]
    out[...] = weights * signs.astype(weights.dtype)


def out_of_cache(memory) -> bool:
    """Whether an array is so large that it should be prefetched."""
    return memory.nbytes > (CACHE_OF_CODES if quantised(memory) else CACHE)


@register_jitable
def gather_row(memory, ids, following, base, slot_map, prefetches, out):
    """The vectors of one row of the batch: ids (F,), following (F,) those of the next row, out (F, D)."""
    if slot_map.family == TABLE:
        return gather_table_row(memory, ids, following, base, slot_map, prefetches, out)
    features = ids.size
    for f in range(features):
        if prefetches:
            g = f + AHEAD - features
            if g < 0:
                prefetch_vector(memory, base[f + AHEAD] + np.uint64(ids[f + AHEAD]), slot_map)
            elif g < features:
                prefetch_vector(memory, base[g] + np.uint64(following[g]), slot_map)
        token, element = base[f] + np.uint64(ids[f]), ZERO
        row = np.uint64(f) * slot_map.width
        block, position = block_of(slot_map, token, element)
        start, word = place(slot_map, token, block)
        while True:
            slot, length, bits = run_from(slot_map, start, word, position, element)
            copy_slots(memory, slot_map, slot, bits, out, row + element, length)
            element += length
            position += length
            if element >= slot_map.width:
                break
            if position == slot_map.block:
                block, position = block + ONE, ZERO
                start, word = place(slot_map, token, block)


@register_jitable
def gather_table_row(memory, ids, following, base, slot_map, prefetches, out):
    """The same of a full table."""
    features, width = ids.size, slot_map.width
    for f in range(features):
        g = f + AHEAD - features
        if prefetches and g < features:
            if g < 0:
                token = base[f + AHEAD] + np.uint64(ids[f + AHEAD])
            else:
                token = base[g] + np.uint64(following[g])
            prefetch_slots(memory, slot_map, token * width, width)
        start = (base[f] + np.uint64(ids[f])) * width
        copy_slots(memory, slot_map, start, ZERO, out, np.uint64(f) * width, width)


@register_jitable
def prefetch_vector(memory, token, slot_map):
    """Ask for the weights of one vector. Hashing it twice costs less than waiting for it."""
    element = ZERO
    block, position = block_of(slot_map, token, element)
    while element < slot_map.width:
        start, _ = place(slot_map, token, block)
        length = min(slot_map.block - position, slot_map.width - element)
        prefetch_slots(memory, slot_map, start + position, length)
        block, position, element = block + ONE, ZERO, element + length


@njit(parallel=True, nogil=True, cache=True)
def _gather(memory, ids, base, slot_map, prefetches, out):
    rows = ids.shape[0]
    for b in prange(rows):
        gather_row(memory, ids[b], ids[min(b + 1, rows - 1)], base, slot_map, prefetches, out[b])


def gather_cpu(memory, ids, base, slot_map, out):
    require_rows_together(out)
    _gather(words(memory), ids, base, slot_map, out_of_cache(memory), out)


@cuda.jit
def _gather_elements_kernel(memory, ids, base, slot_map, out):
    first_i, first_b, first_f = cuda.grid(3)
    step_i, step_b, step_f = cuda.gridsize(3)
    f = first_f
    while f < out.shape[1]:
        b = first_b
        while b < out.shape[0]:
            token = base[f] + np.uint64(ids[b, f])
            i = first_i
            while i < out.shape[2]:
                slot, _, bits = run_at(slot_map, token, np.uint64(i))
                out[b, f, i] = flip(fetch(memory, slot_map, slot), bits, 0)
                i += step_i
            b += step_b
        f += step_f


def gather_cuda_elements(memory, ids, base, slot_map, out):
    rows, features, width = out.shape
    launch(_gather_elements_kernel, (width, rows, features), words(memory), ids, base, slot_map, out)


@cuda.jit
def _gather_kernel(memory, ids, base, slot_map, pieces, shift, out):  # out (B, F * D)
    slots = cuda.shared.array(TILE, np.uint64)
    signs = cuda.shared.array(TILE, np.uint64)
    rows = cuda.shared.array(TILE, np.uint32)
    columns = cuda.shared.array(TILE, np.uint32)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    first = U32(cuda.blockIdx.x * TILE)
    while first < pieces:
        count = min(U32(TILE), U32(pieces - first))
        p = thread
        while p < count:
            slots[p], signs[p], rows[p], f, element = piece_at(U32(first + p), ids, base, slot_map, shift)
            columns[p] = f * U32(slot_map.width) + element
            p = U32(p + threads)
        cuda.syncthreads()
        e = U32(4 * thread)
        while e < count << shift:
            p = U32(e >> shift)
            k = U32(e - (p << shift))
            slot, bits = slots[p] + k, signs[p] >> k
            store4(
                out,
                rows[p],
                columns[p] + k,
                weight(memory, slot_map, slot, bits, 0),
                weight(memory, slot_map, slot, bits, 1),
                weight(memory, slot_map, slot, bits, 2),
                weight(memory, slot_map, slot, bits, 3),
            )
            e = U32(e + 4 * threads)
        cuda.syncthreads()  # the next tile takes the same place
        first = U32(first + cuda.gridDim.x * TILE)


def gather_cuda(memory, ids, base, slot_map, out):
    pieces, shift = count_pieces(slot_map, ids)
    if shift < 2 or not in_fours(out):
        return gather_cuda_elements(memory, ids, base, slot_map, out)
    arguments = (words(memory), ids, base, slot_map, U32(pieces), shift, out.reshape(len(out), -1))
    launch(_gather_kernel, (pieces,), *arguments, shape=block_shape(-(-pieces // TILE)))
