"""Write rows of float32 into a table of few bits (parts/codes.py tells how each is stored).

    rows    (N, D) float32
    numbers (N,)   uint32   which rows of the table they are, each once; one that is NO_ROW is left out
    key                     rounding_key(seed, step) of parts/half.py
    form                    bits, stochastic, D
    table   (R, S) uint8    S = row_bytes(form); those rows are written

Versions: `reference` works on all rows at once, `cpu` on one after the other in each thread. `cuda_rows`
gives a row of 4 bits or more to a thread, `cuda` to a thread block, whose threads read neighbouring elements.
"""

import numpy as np
from numba import cuda, prange

from robe.kernels.parts.codes import (
    ENDLESS,
    NO_ROW,
    NOTHING,
    ONE,
    PART,
    STEPS,
    TEAM,
    U32,
    code_bytes,
    draw,
    fitted_ends,
    levels_of,
    middle_of,
    note_range,
    scale_and_bias,
    steps_of,
    store_any_row,
    store_any_team,
    store_row,
    team_shape,
)
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.half import from_half, to_half
from robe.kernels.parts.launch import launch
from robe.kernels.parts.parallel import parallel


def quantise_cost(rows, numbers, key, form, table) -> Cost:
    """Rows read, codes written; least and largest, a difference, a quotient and a sum per element."""
    return Cost(rows.nbytes + numbers.nbytes + len(rows) * table.shape[1], 5 * rows.size)


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
    for n, row in enumerate(rows):
        ends[n] = _ends_reference(row, row.min(), row.max(), form)
    scale, bias = from_half(ends).T[:, :, None]
    with np.errstate(invalid="ignore"):
        code = (rows - bias) / np.where(scale > 0, scale, ONE) + draw(key, number, element, form)
        code = np.clip(np.nan_to_num(code, nan=0.0), 0, levels).astype(np.uint8)
    if form.bits < 8:
        bits = code[:, :, None] >> np.arange(form.bits, dtype=np.uint8) & 1
        code = np.packbits(bits.reshape(len(rows), form.width * form.bits), axis=1, bitorder="little")
    table[numbers, :codes] = code
    table[numbers, codes:] = ends.view(np.uint8)


def _ends_reference(row, low, high, form):
    """`ends_of` of codes.py."""
    width = high - low
    if form.bits > 2 or not width < ENDLESS:
        return scale_and_bias(low, high, levels_of(form))
    at = ((row - low) * steps_of(width)).astype(np.int64)
    off = at - middle_of(_sum_reference(at), form)
    total = _sum_reference(abs(off) if form.bits == 1 else off * off)
    return fitted_ends(low, width / STEPS, middle_of(_sum_reference(at), form), total, form)


def _sum_reference(numbers):
    """As of `deviations`: sums of PART integers are exact, and then added up as floats."""
    parts = (numbers[start : start + PART].sum() for start in range(0, numbers.size, PART))
    return sum(map(np.float32, parts), NOTHING)


@parallel()
def _quantise(rows, numbers, key, form, table):
    for n in prange(rows.shape[0]):
        if numbers[n] != NO_ROW:
            store_any_row(rows[n], numbers[n], key, form, table[numbers[n]])


def quantise_cpu(rows, numbers, key, form, table):
    _quantise(rows, numbers, key, form, table)


@cuda.jit(cache=True)
def _quantise_rows_kernel(rows, numbers, key, form, table):
    n = U32(cuda.grid(1))
    while n < U32(rows.shape[0]):
        if numbers[n] != NO_ROW:
            store_row(rows[n], numbers[n], key, form, table[numbers[n]])
        n = U32(n + cuda.gridsize(1))


def quantise_cuda_rows(rows, numbers, key, form, table):
    if form.bits < 4:
        return quantise_cuda(rows, numbers, key, form, table)
    launch(_quantise_rows_kernel, (len(rows),), rows, numbers, key, form, table)


@cuda.jit(cache=True)
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
            store_any_team(rows[n], number, key, form, table[number], lows, highs, thread, threads)
            cuda.syncthreads()  # the next row takes the same memory
        n = U32(n + cuda.gridDim.x)


def quantise_cuda(rows, numbers, key, form, table):
    shape = team_shape(len(rows))
    launch(_quantise_kernel, (len(rows),), rows, numbers, key, form, table, shape=shape)
