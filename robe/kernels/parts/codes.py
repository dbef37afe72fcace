"""How rows are stored in 8, 4, 3, 2, 1 or 16 bits a weight, with a scale and a bias each.

A row lies together, as in Caffe2's and FBGEMM's fused INT4 rows: its codes, then scale and bias as halves.
Codes are packed without gaps: code i of b bits takes the bits i * b .. i * b + b - 1 of these bytes, of each
byte the lowest first, so that eight codes take b bytes. Element i is

    bias + scale * code[i]       in float32, code from 0 to 2^bits - 1

    bias  = the least element, rounded down to a half
    scale = the least half for which bias + scale * (2^bits - 1) is not below the largest element
    code  = floor((x - bias) / scale + u)      u uniform in [0, 1): the element is right on average
                                               u = 1/2, to the nearest, where not form.stochastic

So the error of an element is below the scale, or at most half of it when rounded to nearest, and none is cut
off. In 2 bits and in 1 that would spend the few levels on the outermost elements, so there the levels follow
the law of the elements, and what lies beyond the outer levels is cut off:

    2 bits    scale = standard deviation of the row       the best even levels of a normal law, to 0.5%
    1 bit     scale = 2 * mean absolute deviation         levels at the mean of either half of the elements
    bias  = mean - scale * (2^bits - 1) / 2               both rounded to the nearest half

Normal elements in rows of 64 lose 0.114 and 0.352 of their variance to that, 0.202 and 2.7 to the former; in
3 bits it would be 0.035 instead of 0.037. Deviations are summed as integers, in steps of 2^-12 of the range
of the row, 64 elements at a time, so that all versions come to the same bits in whatever order they sum.

Scale and bias take 4 bytes a row as halves, 8 as float32; the error grows by at most 5% for it (INT8, D
= 16, initial weights of 10^7 rows; below 1% where rows have moved, and 0.1% for INT4). A row with an element
that is not finite reads as NaN.
With 16 bits there is no scale: each element is a half, rounded as half.py does.

u is a hash of (key, row, element), so it is the same for any number of threads and for every version. With
u = 1/2, training would lose every step that is smaller than half a scale.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import config
from numba.extending import register_jitable

from robe.kernels.parts.half import LARGEST, from_half, to_half
from robe.kernels.parts.hashing import U64, word_of
from robe.kernels.parts.launch import BLOCKS

U16, U32 = np.uint16, np.uint32
NO_ROW = U32(2**32 - 1)
# Threads of a block that work on one row: a warp.
TEAM = 4 if config.ENABLE_CUDASIM else 32
UP = U32(2**13 - 1)  # what makes to_half round away from 0
NOT_A_NUMBER = U16(0x7FFF)
NEAREST = U32(2**12)  # and what makes it round to the nearest
HALF, ONE, UNIT = np.float32(0.5), np.float32(1), np.float32(2.0**-24)
STEPS = np.float32(2.0**12)  # of the range of a row, in which deviations are summed
PART = 64  # elements the squares of whose deviations have a sum below 2^31
TINY = np.float32(2.0**-100)
ENDLESS = np.float32(np.inf)
NOTHING = np.float32(0)


class Form(NamedTuple):
    """How rows are stored; scalars only, so kernels take it as an argument."""

    bits: int  # 1, 2, 3, 4, 8 or 16
    stochastic: bool
    width: int  # D


def row_bytes(form: Form) -> int:
    """S: bytes of one row."""
    return 2 * form.width if form.bits == 16 else code_bytes(form) + 4


@register_jitable
def code_bytes(form):
    """Bytes of the codes, behind which scale and bias stand."""
    return (form.width * form.bits + 7) // 8


@register_jitable
def ordered(x):
    """float32 as int32 in the same order, whose least and largest the compiler finds in vector registers."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@register_jitable
def unordered(order):
    return np.int32(order ^ np.int32((order >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


MOST, LEAST = np.int32(2**31 - 1), np.int32(-(2**31))


@register_jitable
def most_bits(codes, width):
    """The bits of `width` codes that take so many bytes; the most, where it could be several."""
    if codes == width:
        return 8
    if codes == (width + 1) >> 1:
        return 4
    return 3 if codes == (3 * width + 7) >> 3 else 2 if codes == (2 * width + 7) >> 3 else 1


@register_jitable
def levels_of(form):
    return np.float32((1 << form.bits) - 1)


@register_jitable
def scale_and_bias(low, high, levels):
    """The halves, as bits, for a row of elements from `low` to `high`."""
    if not high - low < ENDLESS:
        return NOT_A_NUMBER, NOT_A_NUMBER
    bias = to_half(low, UP if low < NOTHING else U32(0))
    least = from_half(bias)
    scale = U32(to_half(np.float32(np.float32(high - least) / levels), U32(0)))
    if np.float32(least + np.float32(from_half(scale) * levels)) < high and scale < LARGEST:
        scale = U32(scale + U32(1))
    return U16(scale), bias


@register_jitable
def fitted(values, low, high, form):
    """The halves, as bits, for a row in 2 bits or 1, whose levels follow the law of its elements."""
    width = np.float32(high - low)
    if not width < ENDLESS:
        return NOT_A_NUMBER, NOT_A_NUMBER
    steps, total, middle = steps_of(width), NOTHING, np.int32(0)
    for bits in (0, form.bits):
        middle, total = middle_of(total, form), NOTHING
        for start in range(0, form.width, PART):
            total += np.float32(deviations(values[start : start + PART], low, steps, middle, bits))
    return fitted_ends(low, np.float32(width / STEPS), middle, total, form)


@register_jitable
def steps_of(width):
    """How many steps a difference of 1 is in a row of that range; 0 if halves could not tell it from 0."""
    return np.float32(STEPS / width) if width > TINY else NOTHING


@register_jitable
def middle_of(total, form):
    """The mean of that sum, to the nearest step."""
    return np.int32(np.float32(total / np.float32(form.width)) + HALF)


@register_jitable
def deviations(values, low, steps, middle, bits):
    """The sum of the distances from `middle` of up to PART elements, in steps above `low`; of two bits that
    of their squares. In int32, so that it becomes vector code."""
    total = np.int32(0)
    if bits == 2:
        for i in range(values.size):
            off = np.int32(np.int32(np.float32(values[i] - low) * steps) - middle)
            total = np.int32(total + np.int32(off * off))
    else:
        for i in range(values.size):
            off = np.int32(np.int32(np.float32(values[i] - low) * steps) - middle)
            total = np.int32(total + abs(off))
    return total


@register_jitable
def fitted_ends(low, step, middle, total, form):
    """`fitted`, from the mean and the sum of the deviations, or of their squares, in steps of the range."""
    spread = np.float32(total / np.float32(form.width))
    spread = np.float32(spread + spread) if form.bits == 1 else np.float32(math.sqrt(spread))
    scale = to_half(np.float32(step * spread), NEAREST)
    reach = np.float32(np.float32(from_half(scale) * levels_of(form)) * HALF)
    mean = np.float32(low + np.float32(step * np.float32(middle)))
    return scale, to_half(np.float32(mean - reach), NEAREST)


@register_jitable
def ends_of(values, low, high, form):
    """The halves, as bits, for a row of elements from `low` to `high`."""
    if form.bits > 2:
        return scale_and_bias(low, high, levels_of(form))
    return fitted(values, low, high, form)


@register_jitable
def draw(key, row, element, form):
    """u of one element."""
    if not form.stochastic:
        return HALF
    return np.float32(word_of(key, U64(row) * U64(form.width) + U64(element)) >> U64(40)) * UNIT


@register_jitable
def code_of(x, scale, bias, levels, u):
    """One element as 0 .. levels; scale and bias as floats. A scale of 0 leaves nothing to tell apart."""
    step = scale if scale > NOTHING else ONE
    code = np.float32(np.float32(x - bias) / step) + u
    code = code if code > NOTHING else NOTHING  # NaN is not
    # Not to U32 at once, for which many CPUs have no vector instruction.
    return U32(np.int32(code if code < levels else levels))


@register_jitable
def half_of(x, key, row, element, form):
    """One element as a half. to_half takes 13 bits, and 2^12 of them round to the nearest."""
    return to_half(x, U32(np.float32(draw(key, row, element, form) * np.float32(2.0**13))))


@register_jitable
def store_half(out, at, bits):
    """Write 16 bits to two bytes, the low one first."""
    out[at], out[at + 1] = U32(bits) & U32(0xFF), U32(bits) >> U32(8)


@register_jitable
def load_half(table, row, at):
    return from_half(U32(table[row, at]) | U32(table[row, at + 1]) << U32(8))


@register_jitable
def store_eight(values, row, key, form, scale, bias, k, out):
    """Write the codes 8 k .. 8 k + 7 of a row in fewer than 4 bits, as many as it has."""
    levels, word = levels_of(form), U32(0)
    for i in range(8 * k, min(8 * k + 8, form.width)):
        code = code_of(values[i], scale, bias, levels, draw(key, row, i, form))
        word |= code << U32(form.bits * (i - 8 * k))
    for i in range(form.bits * k, min(form.bits * (k + 1), code_bytes(form))):
        out[i] = word & U32(0xFF)
        word >>= U32(8)


@register_jitable
def row_ends(values, form):
    """`ends_of` of a row of 8 bits or fewer."""
    low, high = range_of(values, form)
    return ends_of(values, low, high, form)


@register_jitable
def range_of(values, form):
    """(least, largest) element of a row."""
    low, high = MOST, LEAST
    for i in range(form.width):
        order = ordered(values[i])
        low, high = min(low, order), max(high, order)
    return unordered(low), unordered(high)


@register_jitable
def store_ends(ends, form, out):
    """Write scale and bias behind the codes."""
    store_half(out, code_bytes(form), ends[0])
    store_half(out, code_bytes(form) + 2, ends[1])


@register_jitable
def store_row(values, row, key, form, out):
    """Write the row of that number, values (D,), to its bytes in the table, out (S,); of 4 bits or more."""
    if form.bits == 16:
        for i in range(form.width):
            store_half(out, 2 * i, half_of(values[i], key, row, i, form))
        return
    low, high = range_of(values, form)
    levels = levels_of(form)
    ends = scale_and_bias(low, high, levels)
    scale, bias = from_half(ends[0]), from_half(ends[1])
    store_ends(ends, form, out)
    if form.bits == 8:
        for i in range(form.width):
            out[i] = code_of(values[i], scale, bias, levels, draw(key, row, i, form))
    else:
        for i in range(form.width // 2):
            even = code_of(values[2 * i], scale, bias, levels, draw(key, row, 2 * i, form))
            odd = code_of(values[2 * i + 1], scale, bias, levels, draw(key, row, 2 * i + 1, form))
            out[i] = even | odd << U32(4)
        if form.width % 2:
            i = form.width - 1
            out[i // 2] = code_of(values[i], scale, bias, levels, draw(key, row, i, form))


@register_jitable
def store_any_row(values, row, key, form, out):
    """`store_row` of any number of bits."""
    if form.bits < 4:
        ends = row_ends(values, form)
        store_ends(ends, form, out)
        for k in range((form.width + 7) // 8):
            store_eight(values, row, key, form, from_half(ends[0]), from_half(ends[1]), k, out)
    else:
        store_row(values, row, key, form, out)


@register_jitable
def store_few(values, form, codes, out):
    """`store_row` to the nearest, of fewer than 4 bits; codes: scratch, zeros behind the width.

    A loop that writes whole bytes becomes vector code, as those of store_eight do not. Eight codes are
    written as four bytes; those that are too many are written again by the next eight, and at last by the
    ends.
    """
    levels, ends = levels_of(form), row_ends(values, form)
    scale, bias = from_half(ends[0]), from_half(ends[1])
    for i in range(form.width):
        codes[i] = code_of(values[i], scale, bias, levels, HALF)
    for k in range((form.width + 7) // 8):
        word, at = U32(0), form.bits * k
        for i in range(8):
            word |= U32(codes[8 * k + i]) << U32(form.bits * i)
        store_half(out, at, word & U32(0xFFFF))
        store_half(out, at + 2, word >> U32(16))
    store_ends(ends, form, out)


@register_jitable
def scale_at(table, row, form):
    """(scale, bias) of a row of the table as floats; (1, 0) where there are none."""
    if form.bits == 16:
        return ONE, NOTHING
    at = code_bytes(form)
    return load_half(table, row, at), load_half(table, row, at + 2)


@register_jitable
def element_at(table, row, i, scale, bias, form):
    """Element i of a row of the table."""
    if form.bits == 16:
        return load_half(table, row, 2 * i)
    if form.bits == 8:
        return bias + scale * np.float32(table[row, i])
    at = U32(i) * U32(form.bits)
    byte = at >> U32(3)  # a code may go on in the next one; scale and bias stand behind the last
    both = U32(table[row, byte]) | U32(table[row, byte + U32(1)]) << U32(8)
    code = both >> (at & U32(7)) & U32((1 << form.bits) - 1)
    return bias + scale * np.float32(code)


@register_jitable
def note_range(values, form, lows, highs, thread, threads):
    """A thread of a team notes the least and largest of its elements; the caller synchronises then."""
    low, high = MOST, LEAST
    i = thread
    while i < form.width:
        order = ordered(values[i])
        low, high = min(low, order), max(high, order)
        i += threads
    lows[thread], highs[thread] = low, high


@register_jitable
def store_team(values, row, key, form, out, lows, highs, thread, threads):
    """`store_row` by a team, after `note_range`; of 4 bits or more."""
    levels, codes = levels_of(form), code_bytes(form)
    scale, bias = ONE, NOTHING
    if form.bits != 16:
        low, high = MOST, LEAST
        for t in range(threads):
            low, high = min(low, lows[t]), max(high, highs[t])
        scale_bits, bias_bits = scale_and_bias(unordered(low), unordered(high), levels)
        scale, bias = from_half(scale_bits), from_half(bias_bits)
        if thread == 0:
            store_half(out, codes, scale_bits)
            store_half(out, codes + 2, bias_bits)
    i = thread
    if form.bits == 16:
        while i < form.width:
            store_half(out, 2 * i, half_of(values[i], key, row, i, form))
            i += threads
    elif form.bits == 8:
        while i < form.width:
            out[i] = code_of(values[i], scale, bias, levels, draw(key, row, i, form))
            i += threads
    else:
        while i < codes:
            code = code_of(values[2 * i], scale, bias, levels, draw(key, row, 2 * i, form))
            if 2 * i + 1 < form.width:
                odd = code_of(values[2 * i + 1], scale, bias, levels, draw(key, row, 2 * i + 1, form))
                code = code | odd << U32(4)
            out[i] = code
            i += threads


@register_jitable
def store_few_team(values, row, key, form, out, lows, highs, thread, threads):
    """The same of fewer bits, apart from `store_team` since it takes more registers."""
    low, high = MOST, LEAST
    for t in range(threads):
        low, high = min(low, lows[t]), max(high, highs[t])
    scale_bits, bias_bits = ends_of(values, unordered(low), unordered(high), form)
    if thread == 0:
        store_ends((scale_bits, bias_bits), form, out)
    k = thread
    while 8 * k < form.width:
        store_eight(values, row, key, form, from_half(scale_bits), from_half(bias_bits), k, out)
        k += threads


@register_jitable
def store_any_team(values, row, key, form, out, lows, highs, thread, threads):
    """`store_team` of any number of bits."""
    if form.bits < 4:
        store_few_team(values, row, key, form, out, lows, highs, thread, threads)
    else:
        store_team(values, row, key, form, out, lows, highs, thread, threads)


def team_shape(rows: int, shared: int = 0) -> tuple[int, int, int, int]:
    """Launch of a team for each row, with `shared` bytes of dynamic shared memory."""
    return min(BLOCKS, rows), TEAM, 0, shared
