"""Bias and rectifier of a dense layer, and their gradient.

    forward:  out = max(x + bias, 0)                           x, out (B, N) float; bias (N,)
    backward: d = d where out > 0, else 0, in place;           d (B, N) enters as the gradient by out and
              d_bias = sum of d over the batch                 leaves as that by x; d_bias (N,) is written

`out` may be `x`. A NaN stays a NaN, so that it is seen in the loss.

Versions: in `cpu` the backward pass gives each thread whole tiles of rows and then adds the sums of the tiles
in order, so d_bias does not depend on the number of threads. Tiles of columns would need no second sum, but
step through memory a page at a time: 3 times slower at (2048, 1024).
"""

import numpy as np
from numba import cuda, njit, prange

from robe.kernels.cost import Cost
from robe.kernels.launch import launch

TILE = 64  # rows
ZERO = np.float32(0)


def bias_relu_cost(x, bias, out) -> Cost:
    """x read, out written; a sum and a comparison."""
    return Cost(2 * x.nbytes, 2 * x.size)


def bias_relu_backward_cost(out, d, d_bias) -> Cost:
    """d and out read, d written; a comparison and a sum."""
    return Cost(3 * out.nbytes, 2 * out.size)


def bias_relu_reference(x, bias, out):
    np.maximum(x + bias, 0, out=out)


def bias_relu_backward_reference(out, d, d_bias):
    d[...] = np.where(out > 0, d, 0)
    d_bias[...] = d.sum(axis=0)


@njit(parallel=True, nogil=True, cache=True)
def bias_relu_cpu(x, bias, out):
    for b in prange(x.shape[0]):
        for n in range(x.shape[1]):
            value = x[b, n] + bias[n]
            out[b, n] = ZERO if value < ZERO else value


@njit(parallel=True, nogil=True, cache=True)
def bias_relu_backward_cpu(out, d, d_bias):
    rows = d.shape[0]
    tiles = (rows + TILE - 1) // TILE
    partial = np.zeros((tiles, d.shape[1]), d.dtype)
    for tile in prange(tiles):
        sums = partial[tile]
        for b in range(tile * TILE, min((tile + 1) * TILE, rows)):
            # Slices, so that the inner loop is a plain one and uses vector registers: 30 times faster than
            # indexing the matrices at (2048, 512). One array to read and write for the same reason: with
            # two that may be the same, the compiled loop finds them overlapping and goes one by one.
            rectified, gradient = out[b], d[b]
            for n in range(sums.size):
                value = gradient[n] if rectified[n] > ZERO else ZERO
                gradient[n] = value
                sums[n] += value
    d_bias[:] = ZERO
    for tile in range(tiles):
        for n in range(d_bias.size):
            d_bias[n] += partial[tile, n]


@cuda.jit
def _bias_relu_kernel(x, bias, out):
    first_n, first_b = cuda.grid(2)
    step_n, step_b = cuda.gridsize(2)
    b = first_b
    while b < x.shape[0]:
        n = first_n
        while n < x.shape[1]:
            value = x[b, n] + bias[n]
            out[b, n] = ZERO if value < ZERO else value
            n += step_n
        b += step_b


def bias_relu_cuda(x, bias, out):
    launch(_bias_relu_kernel, x.shape[::-1], x, bias, out)


@cuda.jit
def _bias_relu_backward_kernel(out, d, d_bias):
    # A thread owns a column, so the sum needs no atomics and has one order.
    n = cuda.grid(1)
    while n < d.shape[1]:
        total = ZERO
        for b in range(d.shape[0]):
            value = d[b, n] if out[b, n] > ZERO else ZERO
            d[b, n] = value
            total += value
        d_bias[n] = total
        n += cuda.gridsize(1)


def bias_relu_backward_cuda(out, d, d_bias):
    launch(_bias_relu_backward_kernel, d.shape[1:], out, d, d_bias)
