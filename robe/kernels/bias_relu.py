"""Bias and rectifier of a dense layer, and their gradient.

    forward:  out = max(x + bias, 0)                           x, out (B, N) float; bias (N,)
    backward: d_x = d_out where out > 0, else 0;  d_bias = sum of d_x over the batch

`out` may be `x`, and `d_x` may be `d_out`. A NaN stays a NaN, so that it is seen in the loss.

Versions: in `cpu` the backward pass gives each thread whole tiles of columns and adds their rows in the
order of the batch, so d_bias does not depend on the number of threads.
"""

import numpy as np
from numba import cuda, njit, prange

from robe.kernels.launch import launch

TILE = 64  # columns: four cache lines of float32
ZERO = np.float32(0)


def bytes_moved(rows: int, columns: int, itemsize: int = 4) -> int:
    """Bytes the forward pass must move: x read, out written. The backward pass reads `out` besides."""
    return 2 * rows * columns * itemsize


def flops(rows: int, columns: int) -> int:
    return 2 * rows * columns


def bias_relu_reference(x, bias, out):
    np.maximum(x + bias, 0, out=out)


def bias_relu_backward_reference(d_out, out, d_x, d_bias):
    d_x[...] = np.where(out > 0, d_out, 0)
    d_bias[...] = d_x.sum(axis=0)


@njit(parallel=True, nogil=True, cache=True)
def bias_relu_cpu(x, bias, out):
    for b in prange(x.shape[0]):
        for n in range(x.shape[1]):
            value = x[b, n] + bias[n]
            out[b, n] = ZERO if value < ZERO else value


@njit(parallel=True, nogil=True, cache=True)
def bias_relu_backward_cpu(d_out, out, d_x, d_bias):
    columns = d_out.shape[1]
    for tile in prange((columns + TILE - 1) // TILE):
        first, last = tile * TILE, min((tile + 1) * TILE, columns)
        d_bias[first:last] = ZERO
        for b in range(d_out.shape[0]):
            for n in range(first, last):
                d_x[b, n] = d_out[b, n] if out[b, n] > ZERO else ZERO
                d_bias[n] += d_x[b, n]


@cuda.jit
def _bias_relu_kernel(x, bias, out):
    first_n, first_b = cuda.grid(2)
    step_n, step_b = cuda.gridsize(2)
    for b in range(first_b, x.shape[0], step_b):
        for n in range(first_n, x.shape[1], step_n):
            value = x[b, n] + bias[n]
            out[b, n] = ZERO if value < ZERO else value


def bias_relu_cuda(x, bias, out):
    launch(_bias_relu_kernel, x.shape[::-1], x, bias, out)


@cuda.jit
def _bias_relu_backward_kernel(d_out, out, d_x, d_bias):
    # A thread owns a column, so the sum needs no atomics and has one order.
    for n in range(cuda.grid(1), d_out.shape[1], cuda.gridsize(1)):
        total = ZERO
        for b in range(d_out.shape[0]):
            d_x[b, n] = d_out[b, n] if out[b, n] > ZERO else ZERO
            total += d_x[b, n]
        d_bias[n] = total


def bias_relu_backward_cuda(d_out, out, d_x, d_bias):
    launch(_bias_relu_backward_kernel, d_out.shape[1:], d_out, out, d_x, d_bias)
