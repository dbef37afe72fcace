"""Look up: vectors[b, f, i] = sign * memory[slot], for the rows `ids` names.

    memory   (M,)    float    the shared weights; float16 is read as float32 (half.py), and so are codes in
                              groups, (R, S) uint8 (groups.py)
    ids      (B, F)  uint32   categorical values
    base     (F,)    uint64   token = base[f] + id
    slot_map                  where each element of a row lives (hashing.py)
    out      (B, F, D) float  written in full; may be a view whose rows out[b] are contiguous

Versions: `reference` makes the tensors of slots and signs, which is what the formula says and what the
published PyTorch code does. `cpu` hashes once per block and copies spans of consecutive weights; nothing
of the size of `out` is made besides it. Only the first block of a row takes a division, the next ones
follow it, and a large array is prefetched some vectors ahead. Full tables have a loop of their own, without
the arithmetic of blocks, which is 1.4 times as fast at 2 GB. `cuda_elements` gives one thread to each
element, which hashes where it lies, some sixty instructions for four bytes. `cuda` hashes once per piece
(pieces.py), and each thread copies four neighbours and writes them at once; it needs rows of float32 at
multiples of 16 bytes and pieces of at least four elements, and is `cuda_elements` otherwise.
"""

import numpy as np
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import copy_slots, fetch, prefetch_slots, quantised, stored_weight_bytes
from robe.kernels.parts.half import words
from robe.kernels.parts.hashing import (
    ONE,
    TABLE,
    ZERO,
    block_of,
    block_start,
    flip,
    slots_reference,
    span_at,
)
from robe.kernels.parts.lanes import require_rows_together
from robe.kernels.parts.pieces import count_pieces, weight
from robe.kernels.parts.spans import row_walk
from robe.kernels.parts.vector import in_fours, store4
from robe.kernels.parts.walks import elements, in_rows, nothing, pieces, rows, walk_elements, walk_pieces

# Above this many bytes a ROBE array falls out of a core's own caches, and waiting for it costs more than
# hashing a vector early to prefetch it. An EPYC with 0.5 MB for a core, and 32 MB that virtual machines
# share, takes with prefetching 1.1 to 1.6 times as long at 0.5 MB, 0.5 to 1.2 times at 1 MB and 0.3 to 0.7
# times from 2 to 16 MB, floats and codes (Z = 8 to 32); where the shared cache was near, 1.2 times at 10 MB.
CACHE = 2**20
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
    return memory.nbytes > CACHE


@register_jitable(forceinline=True)
def _copy(state, slot_map, kept, slot, length, bits, element):
    memory, out, first = state
    copy_slots(memory, slot_map, slot, bits, out, first + element, length)
    return kept


_copy_row = row_walk(_copy)


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
        first = np.uint64(f) * slot_map.width
        _copy_row(slot_map, base[f] + np.uint64(ids[f]), (memory, out, first), 0)


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
        start, _ = block_start(slot_map, token, block)
        length = min(slot_map.block - position, slot_map.width - element)
        prefetch_slots(memory, slot_map, start + position, length)
        block, position, element = block + ONE, ZERO, element + length


@register_jitable
def _read(state, slot_map, base, kept, b, ids, following):
    memory, prefetches, out = state
    gather_row(memory, ids, following, base, slot_map, prefetches, out[b])


_gather = rows(nothing, _read)


def gather_cpu(memory, ids, base, slot_map, out):
    require_rows_together(out)
    for longer, bases, written in in_rows(ids, base, out):
        _gather((words(memory), out_of_cache(memory), written), slot_map, longer, bases)


@register_jitable
def token_of(state, b, f):
    """Elements of a row share nothing but its token: each is hashed by itself."""
    ids, base = state[0], state[1]
    return base[f] + np.uint64(ids[b, f])


@register_jitable
def _read_element(state, token, b, f, i):
    _, _, slot_map, memory, out = state
    slot, _, bits = span_at(slot_map, token, np.uint64(i))
    out[b, f, i] = flip(fetch(memory, slot_map, slot), bits, 0)


_gather_elements_kernel = elements(token_of, _read_element)


def gather_cuda_elements(memory, ids, base, slot_map, out):
    walk_elements(_gather_elements_kernel, out.shape, (ids, base, slot_map, words(memory), out))


@register_jitable
def _read_four(state, slot_map, b, column, slot, bits):
    memory, out = state  # out (B, F * D)
    store4(
        out,
        b,
        column,
        weight(memory, slot_map, slot, bits, 0),
        weight(memory, slot_map, slot, bits, 1),
        weight(memory, slot_map, slot, bits, 2),
        weight(memory, slot_map, slot, bits, 3),
    )


_gather_kernel = pieces(_read_four, together=4)


def gather_cuda(memory, ids, base, slot_map, out):
    _, shift = count_pieces(slot_map, ids)
    if shift < 2 or not in_fours(out):
        return gather_cuda_elements(memory, ids, base, slot_map, out)
    rows, features, width = out.shape
    walk_pieces(_gather_kernel, ids, base, slot_map, (words(memory), out.reshape(rows, features * width)))
