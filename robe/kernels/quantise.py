"""Rows in 8, 4 or 16 bits a weight, with a scale and a bias each: what a mixed-precision table is made of.

    rows    (N, D) float32
    numbers (N,)   uint32   which rows of the table they are, each once; one that is NO_ROW is left out
    key                     rounding_key(seed, step) of half.py
    form                    bits, stochastic, D (below)
    table   (R, S) uint8    S = row_bytes(form); those rows are written

A row lies together, as in Caffe2's and FBGEMM's fused INT4 rows: its codes (of INT4 two in a byte, the first
in the low half), then scale and bias as halves. Element i is

    bias + scale * code[i]       in float32, code from 0 to 2^bits - 1

    bias  = the least element, rounded down to a half
    scale = the least half for which bias + scale * (2^bits - 1) is not below the largest element
    code  = floor((x - bias) / scale + u)      u uniform in [0, 1): the element is right on average
                                               u = 1/2, to the nearest, where not form.stochastic

So each element is off by less than scale, or by half of it at most, and none is cut off. Halves cost 4 bytes
a row where float32 would cost 8, and the error grows by at most 5% for it (INT8, D = 16, initial weights of
10^7 rows; below 1% where rows have moved, and 0.1% for INT4). A row with an element that is not finite reads
as NaN.
With 16 bits there is no scale: each element is a half, rounded as half.py does.

u is a hash of (key, row, element), so it is the same for any number of threads and for every version. With a
fixed u, steps smaller than half a scale would be lost each time.

Versions: `reference` works on all rows at once, `cpu` on one after the other in each thread. `cuda_rows`
gives a row to a thread, `cuda` to a thread block, whose threads read neighbouring elements.
"""

from typing import NamedTuple

import numpy as np
from numba import config, cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.cost import Cost
from robe.kernels.half import LARGEST, from_half, to_half
from robe.kernels.hashing import U64, word_of
from robe.kernels.launch import BLOCKS, launch

U16, U32 = np.uint16, np.uint32
NO_ROW = U32(2**32 - 1)
# Threads of a block that work on one row: a warp.
TEAM = 4 if config.ENABLE_CUDASIM else 32
UP = U32(2**13 - 1)  # what makes to_half round away from 0
NOT_A_NUMBER = U16(0x7FFF)
HALF, ONE, UNIT = np.float32(0.5), np.float32(1), np.float32(2.0**-24)
ENDLESS = np.float32(np.inf)
NOTHING = np.float32(0)


class Form(NamedTuple):
    """How rows are stored; scalars only, so kernels take it as an argument."""

    bits: int  # 4, 8 or 16
    stochastic: bool
    width: int  # D


def row_bytes(form: Form) -> int:
    """S: bytes of one row."""
    return 2 * form.width if form.bits == 16 else code_bytes(form) + 4


@register_jitable
def code_bytes(form):
    """Bytes of the codes, behind which scale and bias stand."""
    return (form.width * form.bits + 7) // 8


def quantise_cost(rows, numbers, key, form, table) -> Cost:
    """Rows read, codes written; least and largest, a difference, a quotient and a sum per element."""
    return Cost(rows.nbytes + numbers.nbytes + len(rows) * table.shape[1], 5 * rows.size)


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
    return U32(code if code < levels else levels)


@register_jitable
def half_of(x, key, row, element, form):
    """One element as a half. to_half takes 13 bits, and 2^12 of them round to the nearest."""
    return to_half(x, U32(np.float32(draw(key, row, element, form) * np.float32(2.0**13))))


def quantise_reference(rows, numbers, key, form, table):
    rows, numbers = rows[numbers != NO_ROW], numbers[numbers != NO_ROW]
    number, element = numbers.astype(np.uint64)[:, None], np.arange(form.width, dtype=np.uint64)
    if form.bits == 16:
        draws = np.broadcast_to(draw(key, number, element, form), rows.shape)
        bits = to_half(rows, (draws * np.float32(2.0**13)).astype(np.uint32))
        table[numbers] = bits.view(np.uint8)
        return
    levels, codes = levels_of(form), code_bytes(form)
    ends = np.zeros((len(rows), 2), np.uint16)
    for n, (low, high) in enumerate(zip(rows.min(axis=1), rows.max(axis=1), strict=True)):
        ends[n] = scale_and_bias(low, high, levels)
    scale, bias = from_half(ends).T[:, :, None]
    with np.errstate(invalid="ignore"):
        code = (rows - bias) / np.where(scale > 0, scale, ONE) + draw(key, number, element, form)
        code = np.clip(np.nan_to_num(code, nan=0.0), 0, levels).astype(np.uint8)
    if form.bits == 4:
        code = np.pad(code, ((0, 0), (0, form.width % 2)))
        code = code[:, ::2] | code[:, 1::2] << 4
    table[numbers, :codes] = code
    table[numbers, codes:] = ends.view(np.uint8)


@register_jitable
def store_half(out, at, bits):
    """Write 16 bits to two bytes, the low one first."""
    out[at], out[at + 1] = U32(bits) & U32(0xFF), U32(bits) >> U32(8)


@register_jitable
def load_half(table, row, at):
    return from_half(U32(table[row, at]) | U32(table[row, at + 1]) << U32(8))


@register_jitable
def store_row(values, row, key, form, out):
    """Write the row of that number, values (D,), to its place in the table, out (S,)."""
    if form.bits == 16:
        for i in range(form.width):
            store_half(out, 2 * i, half_of(values[i], key, row, i, form))
        return
    low, high = MOST, LEAST
    for i in range(form.width):
        order = ordered(values[i])
        low, high = min(low, order), max(high, order)
    levels, behind = levels_of(form), code_bytes(form)
    scale_bits, bias_bits = scale_and_bias(unordered(low), unordered(high), levels)
    store_half(out, behind, scale_bits)
    store_half(out, behind + 2, bias_bits)
    scale, bias = from_half(scale_bits), from_half(bias_bits)
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


@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _quantise(rows, numbers, key, form, table):
    for n in prange(rows.shape[0]):
        if numbers[n] != NO_ROW:
            store_row(rows[n], numbers[n], key, form, table[numbers[n]])


def quantise_cpu(rows, numbers, key, form, table):
    _quantise(rows, numbers, key, form, table)


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
    i = U32(i)
    code = U32(table[row, i >> U32(1)]) >> U32(U32(4) * (i & U32(1))) & U32(15)
    return bias + scale * np.float32(code)


@cuda.jit
def _quantise_rows_kernel(rows, numbers, key, form, table):
    n = U32(cuda.grid(1))
    while n < U32(rows.shape[0]):
        if numbers[n] != NO_ROW:
            store_row(rows[n], numbers[n], key, form, table[numbers[n]])
        n = U32(n + cuda.gridsize(1))


def quantise_cuda_rows(rows, numbers, key, form, table):
    launch(_quantise_rows_kernel, (len(rows),), rows, numbers, key, form, table)


@register_jitable
def note_range(values, form, lows, highs, thread, threads):
    """A thread of a team tells the least and largest of its elements; then all wait for each other."""
    low, high = MOST, LEAST
    i = thread
    while i < form.width:
        order = ordered(values[i])
        low, high = min(low, order), max(high, order)
        i += threads
    lows[thread], highs[thread] = low, high


@register_jitable
def store_team(values, row, key, form, out, lows, highs, thread, threads):
    """`store_row` by a team, after `note_range`."""
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


@cuda.jit
def _quantise_kernel(rows, numbers, key, form, table):
    lows = cuda.shared.array(TEAM, np.int32)
    highs = cuda.shared.array(TEAM, np.int32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    n = U32(cuda.blockIdx.x)
    while n < U32(rows.shape[0]):
        number = numbers[n]
        if number != NO_ROW:
            note_range(rows[n], form, lows, highs, thread, threads)
            cuda.syncthreads()
            store_team(rows[n], number, key, form, table[number], lows, highs, thread, threads)
            cuda.syncthreads()  # the next row takes the same place
        n = U32(n + cuda.gridDim.x)


def quantise_cuda(rows, numbers, key, form, table):
    shape = team_shape(len(rows))
    launch(_quantise_kernel, (len(rows),), rows, numbers, key, form, table, shape=shape)


def team_shape(rows: int, shared: int = 0) -> tuple[int, int, int, int]:
    """Launch of a team for each row, with `shared` bytes of dynamic shared memory."""
    return min(BLOCKS, rows), TEAM, 0, shared
