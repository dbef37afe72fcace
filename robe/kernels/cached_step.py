"""Step of the optimizer on the rows of a batch, in the cache where admit.py has found them a place.

    d_vectors (B, F, D) float          gradient of the loss by the vectors; may be a strided view
    order, place, before               the sorted look-ups of the batch, and what admit.py said of them
    ids, base                          as in sort_rows.py
    rate, eps                          as in adagrad.py
    key                                rounding_key(seed, step) of half.py
    form, table                        the quantised rows (quantise.py), brought up to date
    values (sets * WAYS, D) float32    of the cache
    accumulator                        of the same shape for Adagrad, or (0, D): the step is that of SGD

    gradient = sum over the look-ups of the row, in the order of the batch
    x <- x - rate * gradient                                                          SGD
    a <- a + gradient^2;  x <- x - rate * gradient / (sqrt(a) + eps)                  Adagrad

x and a are a row of `values` and `accumulator` if the row has a place. One that comes to a place is read from the
table first, with a = 0, and the one it replaces is rounded and written back; its a is forgotten. A row without a
place is read, stepped with a = 0 before, and rounded, at once.

Versions: each row, and each place, belongs to the first look-up of the row, and no two look-ups share one; so
there are no races, and each row sums in the order of the batch. `reference` and `cpu` take one row after the
other, `cpu` in each thread; `cuda` gives each to a thread block, with the stepped row in shared memory.
"""

import math

import numpy as np
from numba import cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.admit import DIRECT, NOBODY, REPEAT, STAYS
from robe.kernels.cache import row_at
from robe.kernels.cached_gather import expand, expanded
from robe.kernels.cost import Cost
from robe.kernels.launch import launch
from robe.kernels.quantise import (
    TEAM,
    element_at,
    note_range,
    quantise_reference,
    scale_at,
    store_row,
    store_team,
    team_shape,
)

CHUNK = 64  # look-ups that a thread of the CPU does in turn
U32, U64 = np.uint32, np.uint64


def cached_step_cost(
    d_vectors, order, place, before, ids, base, rate, eps, key, form, table, values, accumulator
) -> Cost:
    """If every row is in the cache: gradients read, and what they step read and written."""
    adagrad = len(accumulator) > 0
    return Cost((3 + 2 * adagrad) * d_vectors.nbytes, (2 + 5 * adagrad) * d_vectors.size)


def cached_step_reference(
    d_vectors, order, place, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    width, number = form.width, values.dtype.type
    flat = d_vectors.reshape(-1, width)
    rows = (base + ids.astype(np.uint64)).ravel()
    starts = [*np.flatnonzero(place != REPEAT).tolist(), len(place)]
    for p, end in zip(starts[:-1], starts[1:], strict=True):
        row, slot = int(rows[order[p]]), int(place[p])
        gradient = np.zeros(width, values.dtype)
        for look_up in order[p:end]:
            gradient += flat[look_up]
        if slot == DIRECT:
            x, a = expanded(table, [row], form)[0], np.zeros(width, values.dtype)
        else:
            x, a = values[slot], accumulator[slot] if len(accumulator) else None
            if before[p] != STAYS:
                if before[p] != NOBODY:
                    quantise_reference(x[None], before[p : p + 1], key, form, table)
                x[...] = expanded(table, [row], form)[0]
                if len(accumulator):
                    a[...] = 0
        step = number(rate) * gradient
        if len(accumulator):
            a += gradient * gradient
            step /= np.sqrt(a) + number(eps)
        x -= step
        if slot == DIRECT:
            quantise_reference(x[None], rows[order[p] : order[p] + 1], key, form, table)


@register_jitable
def step_of(gradient, total, rate, eps, adagrad):
    """What is taken from an element; total: its a, with this gradient's square."""
    if adagrad:
        return rate * gradient / (math.sqrt(total) + eps)
    return rate * gradient


# Division in NumPy's way does not look for 0, so loops become vector code.
@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _cached_step(
    d_vectors, order, place, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    n, features, adagrad = order.size, ids.shape[1], accumulator.shape[0] > 0
    for chunk in prange((n + CHUNK - 1) // CHUNK):
        gradient, x = np.empty(form.width, values.dtype), np.empty(form.width, values.dtype)
        for p in range(chunk * CHUNK, min((chunk + 1) * CHUNK, n)):
            if place[p] == REPEAT:
                continue
            row, f = row_at(ids, base, order[p])
            gradient[:] = d_vectors[order[p] // features, f]
            end = p + 1
            while end < n and place[end] == REPEAT:
                more = d_vectors[order[end] // features, f]
                for i in range(form.width):
                    gradient[i] += more[i]
                end += 1
            slot = place[p]
            if slot == DIRECT:
                expand(table[row], form, x)
                for i in range(form.width):
                    x[i] -= step_of(gradient[i], gradient[i] * gradient[i], rate, eps, adagrad)
                store_row(x, row, key, form, table[row])
                continue
            here = values[slot]
            if before[p] != STAYS:
                if before[p] != NOBODY:
                    store_row(here, before[p], key, form, table[before[p]])
                expand(table[row], form, here)
                if adagrad:
                    accumulator[slot] = 0
            if adagrad:
                total = accumulator[slot]
                for i in range(form.width):
                    total[i] += gradient[i] * gradient[i]
                    here[i] -= step_of(gradient[i], total[i], rate, eps, True)
            else:
                for i in range(form.width):
                    here[i] -= rate * gradient[i]


def cached_step_cpu(
    d_vectors, order, place, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    number = values.dtype.type
    settings = (number(rate), number(eps), key, form)
    _cached_step(d_vectors, order, place, before, ids, base, *settings, table, values, accumulator)


@cuda.jit
def _cached_step_kernel(
    d_vectors, order, place, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    stepped = cuda.shared.array(0, np.float32)
    lows = cuda.shared.array(TEAM, np.int32)
    highs = cuda.shared.array(TEAM, np.int32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    n, features, adagrad = U32(order.size), U32(ids.shape[1]), accumulator.shape[0] > 0
    p = U32(cuda.blockIdx.x)
    while p < n:
        slot = place[p]
        if slot != REPEAT:
            row, f = row_at(ids, base, order[p])
            if before[p] >= 0:
                old = before[p]
                note_range(values[slot], form, lows, highs, thread, threads)
                cuda.syncthreads()
                store_team(values[slot], old, key, form, table[old], lows, highs, thread, threads)
                cuda.syncthreads()
            scale, bias = scale_at(table, row, form)
            i = thread
            while i < form.width:
                gradient = d_vectors[U32(order[p] // features), f, i]
                q = U32(p + U32(1))
                while q < n and place[q] == REPEAT:
                    gradient += d_vectors[U32(order[q] // features), f, i]
                    q = U32(q + U32(1))
                total = gradient * gradient
                if slot >= 0 and before[p] == STAYS:
                    x = values[slot, i]
                    if adagrad:
                        total += accumulator[slot, i]
                else:
                    x = element_at(table, row, i, scale, bias, form)
                x -= step_of(gradient, total, rate, eps, adagrad)
                if slot >= 0:
                    values[slot, i] = x
                    if adagrad:
                        accumulator[slot, i] = total
                else:
                    stepped[i] = x
                i += threads
            if slot == DIRECT:
                cuda.syncthreads()
                note_range(stepped, form, lows, highs, thread, threads)
                cuda.syncthreads()
                store_team(stepped, row, key, form, table[row], lows, highs, thread, threads)
                cuda.syncthreads()  # the next row takes the same place
        p = U32(p + cuda.gridDim.x)


def cached_step_cuda(
    d_vectors, order, place, before, ids, base, rate, eps, key, form, table, values, accumulator
):
    number = values.dtype.type
    settings = (number(rate), number(eps), key, form)
    launch(
        *(_cached_step_kernel, order.shape, d_vectors, order, place, before, ids, base, *settings),
        *(table, values, accumulator),
        shape=team_shape(order.size, form.width * values.itemsize),
    )
