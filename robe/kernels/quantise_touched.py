"""Quantise again the groups that a batch touches, after its step: the codes that the next look-up reads.

    ids, base, slot_map   which slots: those that a batch touches, as in scatter_add.py
    weights (R, G) float32   the weights behind the codes, group by group (groups.py), the last one filled up
    memory  (R, S) uint8     the groups of these slots are written, to the nearest

Training in few bits keeps both (robe/embeddings/array.py): a step of the optimizer changes `weights`, and
this brings `memory` up to date. What quantise.py would make of all groups, this makes of those that may
differ.

Versions: a group depends on its weights alone, so it does no harm to write one twice, or in two threads at a
time: the bytes are the same. `reference` takes each group once. `cpu` first lists the groups of each row of
the batch, and passes over those that were seen just before: hot ones are named hundreds of times in a batch.
What was seen is kept in a table of SEEN numbers, at the last bits of each. `cuda` gives 32 pieces (pieces.py)
to a warp: each thread lists the groups of one, and then all write one group after the other.
"""

import numpy as np
from numba import config, cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.codes import (
    NO_ROW,
    TEAM,
    U32,
    Form,
    note_range,
    store_few,
    store_few_team,
    store_row,
    store_team,
    team_shape,
)
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import SHIFT, form_of, group_of
from robe.kernels.parts.half import rounding_key
from robe.kernels.parts.hashing import ONE, TABLE, U64, ZERO, slots_reference
from robe.kernels.parts.lanes import prefetch_span
from robe.kernels.parts.launch import launch
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.pieces import count_pieces, piece_at
from robe.kernels.parts.spans import most_spans, row_walk
from robe.kernels.parts.walks import nothing, of, rows
from robe.kernels.quantise import quantise_reference

SEEN = 2**14  # which stay in the second-level cache, and are enough for each group of 10^6 weights
LAST_SEEN = U64(SEEN - 1)
GROUPS = 3  # of a piece, at the most
LISTED = GROUPS * TEAM
# Of the kernel that packs eight codes at a time; the compiler would take 86 on cards of 7.5 and 8.0. Nothing
# spills. The simulator knows no such limit.
LIMITS = {} if config.ENABLE_CUDASIM else {"max_registers": 80}


def quantise_touched_cost(ids, base, slot_map, weights, memory) -> Cost:
    """When no group repeats, and rows fill their groups: weights read, codes written; as quantise.py."""
    elements = ids.size * int(slot_map.width)
    codes = elements * memory.shape[1] // weights.shape[1]
    return Cost(ids.nbytes + 4 * elements + codes, 5 * elements)


def quantise_touched_reference(ids, base, slot_map, weights, memory):
    slots, _ = slots_reference(slot_map, base + ids.astype(np.uint64))
    groups = np.unique(slots // weights.shape[1]).astype(np.uint32)
    quantise_reference(weights[groups], groups, rounding_key(0, 0), form_of(memory, slot_map), memory)


@register_jitable(forceinline=True)
def _list_span(state, slot_map, count, slot, length, bits, element):
    """List the groups of a span that were not seen just now."""
    seen, listed = state
    last, _ = group_of(slot_map, slot + length - ONE)
    group, _ = group_of(slot_map, slot)
    while group <= last:
        if seen[group & LAST_SEEN] != group:
            seen[group & LAST_SEEN] = listed[count] = group
            count += 1
        group += ONE
    return count


_list_row = row_walk(_list_span)


@register_jitable
def _list_groups(state, slot_map, base, kept, b, ids, following):
    seen, listed, counts = state
    count = 0
    for f in range(ids.size):
        count = _list_row(slot_map, base[f] + U64(ids[f]), (seen, listed[b]), count)
    counts[b] = count


_list_touched = rows(nothing, _list_groups)


# In a walk, the loops over a group would not become vector code. What the next row needs is asked for while
# this one is worked on: in a large table, waiting for it took longer than all else.
@parallel()
def _quantise_listed(listed, counts, code_bits, weights, memory):
    form, rows = Form(code_bits, False, weights.shape[1]), listed.shape[0]
    size, row = U64(weights.shape[1]), U64(memory.shape[1])
    for b in prange(rows):
        following = min(b + 1, rows - 1)
        for i in range(counts[following]):
            prefetch_span(weights, U64(listed[following, i]) * size, size)
            prefetch_span(memory, U64(listed[following, i]) * row, row)
        codes = np.zeros((form.width + 7) // 8 * 8, np.uint8)
        for i in range(counts[b]):
            group = listed[b, i]
            if code_bits < 4:
                store_few(weights[group], form, codes, memory[group])
            else:
                store_row(weights[group], group, ZERO, form, memory[group])


def touched_groups(ids, base, slot_map, size):
    """(listed (B, n), counts (B,)): the groups, of `size` weights, that each row of a batch touches, but for
    most of those that were listed just before."""
    seen = np.full(SEEN, NO_ROW, np.uint32)
    width = int(slot_map.width)
    most = min(width, 2 * most_spans(slot_map) + width // size)  # groups of a row
    listed = np.empty((len(ids), most * ids.shape[1]), np.uint32)
    counts = np.empty(len(ids), np.int64)
    _list_touched((seen, listed, counts), slot_map, ids, base)
    return listed, counts


def quantise_touched_cpu(ids, base, slot_map, weights, memory):
    listed, counts = touched_groups(ids, base, slot_map, weights.shape[1])
    _quantise_listed(listed, counts, form_of(memory, slot_map).bits, weights, memory)


@register_jitable
def note_groups(slot_map, slot, length, groups, at):
    """List the groups of a piece: that of its first slot, of the last before the end of the array, and of
    those that go on at the beginning of the ring, which begins a group."""
    end = slot + U64(length) - ONE
    first, _ = group_of(slot_map, slot)
    last, _ = group_of(slot_map, min(end, slot_map.memory - ONE))
    groups[at], groups[at + 1] = first, last
    groups[at + 2] = U32(slot_map.front >> SHIFT) if end >= slot_map.memory else NO_ROW


def _listed(store, **limits):
    """The kernel that writes groups by `store`; in one kernel for all bits, registers would be short."""

    @cuda.jit(cache=True, **limits)
    @of(store)
    def quantise_listed(ids, base, slot_map, count, shift, code_bits, weights, memory):
        lows = cuda.shared.array(TEAM, np.int32)
        highs = cuda.shared.array(TEAM, np.int32)
        groups = cuda.shared.array(LISTED, np.uint32)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        form = Form(code_bits, False, weights.shape[1])
        first, step = U32(cuda.blockIdx.x * threads), U32(cuda.gridDim.x * threads)
        while first < count:
            piece, at = U32(first + thread), GROUPS * thread
            groups[at] = groups[at + 1] = groups[at + 2] = NO_ROW
            if piece < count:
                slot, _, _, _, element = piece_at(piece, ids, base, slot_map, shift)
                # A row of a table is one group, which its first piece stands for.
                if slot_map.family != TABLE or element == 0:
                    note_groups(slot_map, slot, U32(1) << shift, groups, at)
            cuda.syncthreads()
            last = NO_ROW
            for i in range(GROUPS * threads):
                group = groups[i]
                if group != NO_ROW and group != last:
                    note_range(weights[group], form, lows, highs, thread, threads)
                    cuda.syncthreads()
                    row, out = weights[group], memory[group]
                    store(row, group, ZERO, form, out, lows, highs, thread, threads)
                    cuda.syncthreads()  # the next group takes the same memory
                    last = group
            cuda.syncthreads()  # and the next pieces theirs
            first = U32(first + step)

    return quantise_listed


_quantise_touched_kernel = _listed(store_team)
_quantise_few_kernel = _listed(store_few_team, **LIMITS)


def quantise_touched_cuda(ids, base, slot_map, weights, memory):
    count, shift = count_pieces(slot_map, ids)
    bits, shape = form_of(memory, slot_map).bits, team_shape(-(-count // TEAM))
    where = ids, base, slot_map, U32(count), shift
    kernel = _quantise_few_kernel if bits < 4 else _quantise_touched_kernel
    launch(kernel, (count,), *where, bits, weights, memory, shape=shape)
