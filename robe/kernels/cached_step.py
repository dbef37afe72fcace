"""Step of the optimizer on the rows of a batch, in the cache where admit.py has found them an entry.

    d_vectors (B, F, D) float          gradient of the loss by the vectors; may be a strided view
    order, entry, before               the sorted look-ups of the batch, and what admit.py found for them
    ids, base                          as in sort_rows.py
    rate, eps                          as in adagrad.py
    key                                rounding_key(seed, step) of half.py
    form, table                        the quantised rows (codes.py), brought up to date
    values (sets * WAYS, D) float32    of the cache
    accumulator (R,) float32           one number a row for Adagrad, or (0,): the step is that of SGD

    gradient = sum over the look-ups of the row, in the order of the batch
    x <- x - rate * gradient                                                          SGD
    a <- a + mean of gradient^2;  x <- x - rate * gradient / (sqrt(a) + eps)          row-wise Adagrad

A row with an entry in the cache is stepped there, in `values`. If it is new there, the row that it replaces
is rounded and written back to the table, and its own weights are read from the table before the step. A row
without an entry is read, stepped, rounded and written back at once.

Versions: each row, and each entry, belongs to the first look-up of the row, and no two look-ups share one; so
there are no races, and each row sums in the order of the batch. `reference` and `cpu` take one row after the
other, `cpu` in each thread; `cuda` gives each to a thread block, with its gradient in shared memory.
"""

import math
from itertools import pairwise

import numpy as np
from numba import cuda, prange

from robe.kernels.admit import DIRECT, REPEAT, STAYS
from robe.kernels.parts.cache import row_at
from robe.kernels.parts.codes import TEAM, element_at, note_range, scale_at, store_row, store_team, team_shape
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import expand, expanded
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel
from robe.kernels.quantise import quantise_reference

CHUNK = 64  # look-ups that a thread of the CPU does in turn
U32 = np.uint32
ZERO, ONE = np.float32(0), np.float32(1)


def cached_step_cost(
    d_vectors, order, entry, before, ids, base, rate, eps, key, form, table, values, accumulator
) -> Cost:
    """If every row is in the cache: gradients read, what they step read and written."""
    adagrad = len(accumulator) > 0
    return Cost(3 * d_vectors.nbytes + 8 * order.size * adagrad, (2 + 2 * adagrad) * d_vectors.size)


def cached_step_reference(
    d_vectors, order, entry, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    number = values.dtype.type
    flat, rows = d_vectors.reshape(-1, form.width), (base + ids.astype(np.uint64)).ravel()[order]
    for p, end in pairwise([*np.flatnonzero(entry != REPEAT).tolist(), len(entry)]):
        slot, row = entry[p], rows[p : p + 1].astype(np.uint32)
        if slot == DIRECT or before[p] != STAYS:
            if before[p] >= 0:
                quantise_reference(values[slot][None], before[p : p + 1], key, form, table)
            x = expanded(table, row, form)[0]
        else:
            x = values[slot].copy()
        gradient = np.zeros(form.width, values.dtype)
        for look_up in order[p:end]:
            gradient += flat[look_up]
        step = number(rate) * gradient
        if len(accumulator):
            accumulator[row] += (gradient * gradient).sum() / number(form.width)
            step /= np.sqrt(accumulator[row]) + number(eps)
        x -= step
        if slot == DIRECT:
            quantise_reference(x[None], row, key, form, table)
        else:
            values[slot] = x


# Division in NumPy's way does not look for 0, so loops become vector code.
@parallel()
def _cached_step(
    d_vectors, order, entry, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    n, features, width, adagrad = order.size, ids.shape[1], form.width, accumulator.size > 0
    for chunk in prange((n + CHUNK - 1) // CHUNK):
        gradient, outside = np.empty(width, values.dtype), np.empty(width, values.dtype)
        for p in range(chunk * CHUNK, min((chunk + 1) * CHUNK, n)):
            slot = entry[p]
            if slot == REPEAT:
                continue
            row, f = row_at(ids, base, order[p])
            x = outside if slot == DIRECT else values[slot]
            if before[p] >= 0:
                store_row(x, before[p], key, form, table[before[p]])
            if slot == DIRECT or before[p] != STAYS:
                expand(table, row, form, x)
            first = d_vectors[order[p] // features, f]
            for i in range(width):
                gradient[i] = first[i]
            end = p + 1
            while end < n and entry[end] == REPEAT:
                more = d_vectors[order[end] // features, f]
                for i in range(width):
                    gradient[i] += more[i]
                end += 1
            if adagrad:
                total = ZERO
                for i in range(width):
                    total += gradient[i] * gradient[i]
                accumulator[row] += total / np.float32(width)
                root = np.float32(math.sqrt(accumulator[row])) + eps
                for i in range(width):
                    x[i] -= rate * gradient[i] / root
            else:
                for i in range(width):
                    x[i] -= rate * gradient[i]
            if slot == DIRECT:
                store_row(x, row, key, form, table[row])


def cached_step_cpu(
    d_vectors, order, entry, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    number = values.dtype.type
    settings = (number(rate), number(eps), key, form)
    _cached_step(d_vectors, order, entry, before, ids, base, *settings, table, values, accumulator)


@cuda.jit(cache=True)
def _cached_step_kernel(
    d_vectors, order, entry, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    gradient = cuda.shared.array(0, np.float32)
    squares = cuda.shared.array(TEAM, np.float32)
    lows = cuda.shared.array(TEAM, np.int32)
    highs = cuda.shared.array(TEAM, np.int32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    n, features = U32(order.size), U32(ids.shape[1])
    p, rate, key = U32(cuda.blockIdx.x), value_of(rate), value_of(key)
    while p < n:
        slot, old = entry[p], before[p]
        if slot != REPEAT:
            row, f = row_at(ids, base, order[p])
            if old >= 0:
                note_range(values[slot], form, lows, highs, thread, threads)
                cuda.syncthreads()
                store_team(values[slot], old, key, form, table[old], lows, highs, thread, threads)
                cuda.syncthreads()
            square = ZERO
            i = thread
            while i < form.width:
                total = d_vectors[U32(order[p] // features), f, i]
                q = U32(p + U32(1))
                while q < n and entry[q] == REPEAT:
                    total += d_vectors[U32(order[q] // features), f, i]
                    q = U32(q + U32(1))
                gradient[i] = total
                square += total * total
                i += threads
            root = ONE
            if accumulator.size > 0:
                squares[thread] = square
                cuda.syncthreads()
                square = ZERO
                for t in range(threads):
                    square += squares[t]
                square = accumulator[row] + square / np.float32(form.width)
                root = math.sqrt(square) + eps
                cuda.syncthreads()
                if thread == 0:
                    accumulator[row] = square
            scale, bias = scale_at(table, row, form)
            i = thread
            while i < form.width:
                step = rate * gradient[i] / root
                if slot >= 0 and old == STAYS:
                    values[slot, i] -= step
                elif slot >= 0:
                    values[slot, i] = element_at(table, row, i, scale, bias, form) - step
                else:
                    gradient[i] = element_at(table, row, i, scale, bias, form) - step
                i += threads
            cuda.syncthreads()
            if slot == DIRECT:
                note_range(gradient, form, lows, highs, thread, threads)
                cuda.syncthreads()
                store_team(gradient, row, key, form, table[row], lows, highs, thread, threads)
                cuda.syncthreads()  # the next row takes the same memory
        p = U32(p + cuda.gridDim.x)


def cached_step_cuda(
    d_vectors, order, entry, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    launch(
        _cached_step_kernel,
        order.shape,
        d_vectors,
        order,
        entry,
        before,
        ids,
        base,
        typed(rate, values.dtype),
        values.dtype.type(eps),
        key,
        form,
        table,
        values,
        accumulator,
        shape=team_shape(order.size, form.width * values.itemsize),
    )
