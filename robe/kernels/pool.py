"""Pool the rows that each feature holds: vectors[b, f] = sum, mean or maximum of the rows of bag (b, f).

    rows    (N, D)       float    what was looked up, bag after bag
    offsets (B * F + 1,) int64    from 0 to N, never falling: bag k = b * F + f has rows offsets[k] and on, up
                                  to offsets[k + 1]
    weights (N,)         float32  w of each row, or (0,): all 1
    modes   (F,)         uint8    the number in POOLINGS that a feature is pooled by
    out     (B, F, D)    float    written in full; may be a strided view

    sum    sum of w * row, in order
    mean   that over the number of rows in the bag (not over the sum of w), as FBGEMM has it
    max    the largest row, element by element; weights are not looked at

The vector of an empty bag is 0. `pool_backward` is the gradient by the rows:

    d_vectors (B, F, D) float     gradient of the loss by the vectors; may be a strided view
    d_rows    (N, D)    float     written in full
    sum, mean: w * d_vectors, and that over the number of rows
    max: d_vectors for the first row that attains it, element by element; 0 for the others

Versions: in all of them one thread owns a bag (on a GPU, an element of one), and adds up in its order, so
results are the same for any number of threads.
"""

import numpy as np
from numba import prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.walks import elements, walk_elements

POOLINGS = ("sum", "mean", "max")
SUM, MEAN, MAX = range(len(POOLINGS))
ONE, U32 = np.float32(1), np.uint32


def pool_cost(rows, offsets, weights, modes, out) -> Cost:
    """Rows, offsets and weights read, vectors written; a product and a sum per element of a row."""
    return Cost(rows.nbytes + offsets.nbytes + weights.nbytes + out.nbytes, 2 * rows.size)


def pool_backward_cost(d_vectors, rows, offsets, weights, modes, d_rows) -> Cost:
    """Gradients, offsets and weights read, gradients written, if nothing is a maximum; a product each."""
    return Cost(d_vectors.nbytes + offsets.nbytes + weights.nbytes + d_rows.nbytes, d_rows.size)


def _bags(offsets, modes):
    """(b, f, mode, first row, last row but one) of each bag that is not empty."""
    for bag in np.flatnonzero(np.diff(offsets)).tolist():
        b, f = divmod(bag, len(modes))
        yield b, f, modes[f], int(offsets[bag]), int(offsets[bag + 1])


def pool_reference(rows, offsets, weights, modes, out):
    out[...] = 0
    for b, f, mode, first, last in _bags(offsets, modes):
        members = rows[first:last]
        if mode == MAX:
            out[b, f] = members.max(axis=0)
            continue
        if len(weights):
            members = members * weights[first:last, None]
        out[b, f] = members.sum(axis=0)
        if mode == MEAN:
            out[b, f] /= np.float32(last - first)


def pool_backward_reference(d_vectors, rows, offsets, weights, modes, d_rows):
    for b, f, mode, first, last in _bags(offsets, modes):
        if mode == MAX:
            members = rows[first:last]
            attains = np.arange(last - first)[:, None] == members.argmax(axis=0)
            d_rows[first:last] = np.where(attains, d_vectors[b, f], 0)
            continue
        d_rows[first:last] = d_vectors[b, f]
        if len(weights):
            d_rows[first:last] *= weights[first:last, None]
        if mode == MEAN:
            d_rows[first:last] /= np.float32(last - first)


@register_jitable
def weight_of(weights, n):
    return weights[n] if weights.size else ONE


@parallel()
def _pool(rows, offsets, weights, modes, out):
    features, width = modes.size, rows.shape[1]
    for b in prange(out.shape[0]):
        total = np.empty(width, rows.dtype)
        for f in range(features):
            first, last = offsets[b * features + f], offsets[b * features + f + 1]
            total[:] = 0
            if modes[f] == MAX:
                for n in range(first, last):
                    for i in range(width):
                        if n == first or rows[n, i] > total[i]:
                            total[i] = rows[n, i]
            else:
                for n in range(first, last):
                    weight = weight_of(weights, n)
                    for i in range(width):
                        total[i] += weight * rows[n, i]
                if modes[f] == MEAN and last > first:
                    count = np.float32(last - first)
                    for i in range(width):
                        total[i] /= count
            for i in range(width):
                out[b, f, i] = total[i]


def pool_cpu(rows, offsets, weights, modes, out):
    _pool(rows, offsets, weights, modes, out)


@parallel()
def _pool_backward(d_vectors, rows, offsets, weights, modes, d_rows):
    features, width = modes.size, rows.shape[1]
    for b in prange(d_vectors.shape[0]):
        gradient = np.empty(width, d_rows.dtype)
        for f in range(features):
            first, last = offsets[b * features + f], offsets[b * features + f + 1]
            for i in range(width):
                gradient[i] = d_vectors[b, f, i]
            if modes[f] == MAX:
                for i in range(width):
                    best = first
                    for n in range(first, last):
                        d_rows[n, i] = 0
                        if rows[n, i] > rows[best, i]:
                            best = n
                    if last > first:
                        d_rows[best, i] = gradient[i]
                continue
            count = np.float32(last - first) if modes[f] == MEAN else ONE
            for n in range(first, last):
                weight = weight_of(weights, n)
                for i in range(width):
                    d_rows[n, i] = gradient[i] * weight / count


def pool_backward_cpu(d_vectors, rows, offsets, weights, modes, d_rows):
    _pool_backward(d_vectors, rows, offsets, weights, modes, d_rows)


@register_jitable
def _bag(state, b, f):
    """(first row, last but one, mode) of a bag."""
    offsets, modes = state[0], state[1]
    bag = b * modes.size + f
    return U32(offsets[bag]), U32(offsets[bag + 1]), modes[f]  # of fewer registers than 64 bits


@register_jitable
def _pool_element(state, bag, b, f, i):
    _, _, weights, rows, out = state
    first, last, mode = bag
    total, n = rows.dtype.type(0), first
    while n < last:
        number = rows[n, i]
        if mode == MAX:
            total = number if n == first else max(total, number)
        else:
            total += weight_of(weights, n) * number
        n = U32(n + U32(1))
    out[b, f, i] = total / np.float32(last - first) if mode == MEAN and last > first else total


_pool_kernel = elements(_bag, _pool_element)


def pool_cuda(rows, offsets, weights, modes, out):
    walk_elements(_pool_kernel, out.shape, (offsets, modes, weights, rows, out))


@register_jitable
def _backward_element(state, bag, b, f, i):
    _, _, weights, d_vectors, rows, d_rows = state
    first, last, mode = bag
    gradient, best, n = d_vectors[b, f, i], first, first
    if mode == MAX:
        while n < last:
            best = n if rows[n, i] > rows[best, i] else best
            n = U32(n + U32(1))
    count, n = np.float32(last - first) if mode == MEAN else ONE, first
    while n < last:
        pull = gradient * weight_of(weights, n) / count
        if mode == MAX:
            pull = gradient if n == best else rows.dtype.type(0)
        d_rows[n, i] = pull
        n = U32(n + U32(1))


_backward_kernel = elements(_bag, _backward_element)


def pool_backward_cuda(d_vectors, rows, offsets, weights, modes, d_rows):
    walk_elements(_backward_kernel, d_vectors.shape, (offsets, modes, weights, d_vectors, rows, d_rows))
