"""Arrays of weights in 8, 4, 3, 2 or 1 bits, read as float32, in groups with a scale and a bias each.

Such a `memory` is (R, S) uint8: its rows are groups of G consecutive weights, each stored as the rows of
codes.py are, S = row_bytes(form). A group of a table is a row, G = D; one of a ROBE array has G = GROUP
weights, and the last one is filled up. So

    weight of a slot = element (slot mod G) of group (slot div G)

Kernels take such an array wherever they take floats, and recognise it by its dtype (uint8) when they are
compiled. The slot map gives G, and the row length S the bits: the most that fit into it. (A short group
takes as many bytes in several of them: 4 weights take two in 3 bits as well as in 4, and so they have 4.)

The functions below run on NumPy arrays, or compiled, like those of hashing.py.
"""

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from robe.kernels.parts.codes import Form, code_bytes, element_at, load_half, most_bits, scale_at
from robe.kernels.parts.half import from_half, rounding_key, widen
from robe.kernels.parts.hashing import ONE, TABLE, ZERO, divide
from robe.kernels.parts.lanes import EIGHT, SIXTEEN, copy_span, expand_lanes, prefetch_span

GROUP, SHIFT, LAST, ENDS = np.uint64(64), np.uint64(6), np.uint64(63), np.uint64(4)
BYTE = np.uint64(3)  # its bits, as a shift


def quantised(memory) -> bool:
    return memory.dtype == np.uint8


def stored_weight_bytes(memory, slot_map) -> float:
    """Bytes that must be read for each weight of a look-up, at the least: codes, and the scale and bias that
    a block or a row shares."""
    if not quantised(memory):
        return memory.itemsize
    together, codes = int(group_length(slot_map)), memory.shape[1] - 4
    block = together if slot_map.family == TABLE else min(int(slot_map.block), int(slot_map.width), together)
    return codes / together + 4 / block


def store_groups(weights, form, quantise, groups, to_device=np.asarray) -> None:
    """Write weights (n,) float32 to the first of `groups` (R, S), with a version of `quantise`.

    The last group is filled up with copies of the last weight, which change no scale. to_device: brings
    arrays to where `groups` are.
    """
    rows = np.pad(weights, (0, -weights.size % form.width), "edge").reshape(-1, form.width)
    numbers = np.arange(len(rows), dtype=np.uint32)
    quantise(to_device(rows), to_device(numbers), rounding_key(0, 0), form, groups)


@register_jitable
def group_length(slot_map):
    """G."""
    return slot_map.width if slot_map.family == TABLE else GROUP


@register_jitable
def group_of(slot_map, slot):
    """(number of the group of a slot, its element there)."""
    if slot_map.family == TABLE:  # its block is a row
        return divide(slot, slot_map.block, slot_map.block_reciprocal)
    return slot >> SHIFT, slot & LAST


@register_jitable
def form_of(memory, slot_map):
    length = np.int64(group_length(slot_map))
    return Form(most_bits(memory.shape[1] - 4, length), False, length)


@register_jitable
def fetch_code(memory, slot_map, slot):
    group, element = group_of(slot_map, slot)
    form = form_of(memory, slot_map)
    scale, bias = scale_at(memory, group, form)
    return element_at(memory, group, element, scale, bias, form)


def fetch(memory, slot_map, slot):
    """The weight of a slot, of any array, as a float."""
    return fetch_code(memory, slot_map, slot) if quantised(memory) else widen(memory[slot])


@overload(fetch)
def _fetch(memory, slot_map, slot):
    if memory.dtype == types.uint8:
        return lambda memory, slot_map, slot: fetch_code(memory, slot_map, slot)
    return lambda memory, slot_map, slot: widen(memory[slot])


@register_jitable
def expand_span(table, group, element, size, bits, ends, signs, vectors, o, length):
    """Write `length` weights, from an element of a group on, with signs to element o of the vectors and on.

    size: G; bits: of a code; ends: (scale, bias) of the group, or of it and the next if the weights may go on
    there. Each lane of a register selects its group: a branch would be mispredicted half of the time, and
    each side of it would end with weights to be written one by one. The last register overlaps with the one
    before it, and writes some weights again.
    """
    k = ZERO
    if length >= SIXTEEN:
        while k + SIXTEEN < length:
            expand_lanes(table, group, element + k, size, bits, ends, signs >> (k & LAST), vectors, o + k, 16)
            k += SIXTEEN
        k = length - SIXTEEN
        expand_lanes(table, group, element + k, size, bits, ends, signs >> (k & LAST), vectors, o + k, 16)
    elif length >= EIGHT:
        expand_lanes(table, group, element, size, bits, ends, signs, vectors, o, 8)
        k = length - EIGHT
        expand_lanes(table, group, element + k, size, bits, ends, signs >> k, vectors, o + k, 8)
    else:
        while k < length:
            expand_lanes(table, group, element + k, size, bits, ends, signs >> k, vectors, o + k, 1)
            k += ONE


@register_jitable
def expand(table, row, form, vectors):
    """Write a row of a table of any form to vectors (D,)."""
    if form.bits == 16:
        for i in range(form.width):
            vectors[i] = load_half(table, row, 2 * i)
    else:
        row, width, ends = np.uint64(row), np.uint64(form.width), scale_at(table, row, form)
        expand_span(table, row, ZERO, width, form.bits, ends, ZERO, vectors, ZERO, width)


def expanded(table, rows, form):
    """Rows (N, D) float32 of those numbers (or a slice) of the table, on the host."""
    codes = table[rows]
    if form.bits == 16:
        return codes.view(np.float16).astype(np.float32)
    scale, bias = from_half(codes[:, code_bytes(form) :].copy().view(np.uint16)).T[:, :, None]
    codes = codes[:, : code_bytes(form)]
    if form.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), 2 * codes.shape[1])
        codes = codes[:, : form.width]
    elif form.bits < 4:
        count = int(form.width) * form.bits
        bits = np.unpackbits(codes, axis=1, count=count, bitorder="little")
        codes = bits.reshape(len(codes), int(form.width), form.bits) @ (
            1 << np.arange(form.bits, dtype=np.uint8)
        )
    return bias + scale * codes.astype(np.float32)


@register_jitable
def expand_slots(memory, slot_map, slot, signs, vectors, o, length):
    form, size = form_of(memory, slot_map), group_length(slot_map)
    while length > ZERO:
        group, element = group_of(slot_map, slot)
        ends, count = scale_at(memory, group, form), min(length, size)
        if slot_map.family == TABLE:
            expand_span(memory, group, element, size, form.bits, ends, signs, vectors, o, count)
        else:
            both = ends + scale_at(memory, group + np.uint64(element + count > size), form)
            expand_span(memory, group, element, size, form.bits, both, signs, vectors, o, count)
        slot, o, length = slot + count, o + count, length - count  # signed spans end after 64


@register_jitable
def prefetch_codes(memory, slot_map, slot, length):
    group, element = group_of(slot_map, slot)
    last, end = group_of(slot_map, slot + length - ONE)
    size, bits = np.uint64(memory.shape[1]), np.uint64(form_of(memory, slot_map).bits)
    prefetch_span(memory, group * size + (element * bits >> BYTE), (length * bits >> BYTE) + ENDS)
    # The end of the codes, and scale and bias, may each begin a line.
    prefetch_span(memory, last * size + (end * bits >> BYTE), ONE)
    prefetch_span(memory, (last + ONE) * size - ENDS, ONE)


def prefetch_slots(memory, slot_map, slot, length):
    """`prefetch_span` of lanes.py, of any array."""
    if quantised(memory):
        prefetch_codes(memory, slot_map, slot, length)
    else:
        prefetch_span(memory, slot, length)


@overload(prefetch_slots, jit_options={"forceinline": True})
def _prefetch_slots(memory, slot_map, slot, length):
    if memory.dtype == types.uint8:
        return prefetch_codes
    return lambda memory, slot_map, slot, length: prefetch_span(memory, slot, length)


def copy_slots(memory, slot_map, slot, signs, vectors, o, length):
    """`copy_span` of lanes.py, of any array."""
    if quantised(memory):
        expand_slots(memory, slot_map, slot, signs, vectors, o, length)
    else:
        copy_span(memory, slot, signs, vectors, o, length)


@overload(copy_slots, jit_options={"forceinline": True})
def _copy_slots(memory, slot_map, slot, signs, vectors, o, length):
    if memory.dtype == types.uint8:
        return expand_slots
    return lambda memory, slot_map, slot, signs, vectors, o, length: copy_span(
        memory, slot, signs, vectors, o, length
    )
