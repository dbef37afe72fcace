"""Bias and rectifier of a dense layer, and their gradient.

    forward:  out = max(x + bias, 0)                           x, out (B, N) float; bias (N,)
    backward: d = d where out > 0, else 0, in place;           d (B, N) enters as the gradient by out and
              d_bias = sum of d over the batch                 leaves as that by x; d_bias (N,) is written

`out` may be `x`. A NaN stays a NaN, so that it is seen in the loss. On a GPU `bias` and `out` may be bfloat16
(bfloat.py); and most products do all this on the way (robe/matmul.py), by cuBLASLt: here is what they do, and
what runs where cuBLASLt knows no such product.

Versions: in `cpu` the backward pass gives each thread whole tiles of rows and then adds the sums of the tiles
in order, so d_bias does not depend on the number of threads. Tiles of columns would need no second sum, but
step through memory a page at a time: 3 times slower at (2048, 1024).
`cuda_columns` gives a whole column to each thread, which are too few: 1,024 for the widest layer of the
MLPerf model. `cuda` gives 32 rows of a column to each and adds up their sums, 32 at a time, in further
passes; the order is fixed, whatever the launch. Both directions read four rows before they write one: the
compiler cannot know that what is written is not read next, and would have each row wait for the one before.
On an H200 at (65536, 1024) the forward pass takes 138 us with it and 186 without, where a copy takes 130;
the backward pass, with more passes over the sums as well, 219 where it took 593.
"""

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.bfloat import kept, number
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.walks import of

TILE = 64  # rows that one thread of the CPU adds up
ROWS = 32  # rows that one CUDA thread adds up
ZERO, U32 = np.float32(0), np.uint32


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


@parallel()
def bias_relu_cpu(x, bias, out):
    for b in prange(x.shape[0]):
        for n in range(x.shape[1]):
            value = x[b, n] + bias[n]
            out[b, n] = ZERO if value < ZERO else value


@parallel()
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


@cuda.jit(cache=True)
def _bias_relu_kernel(x, bias, out):
    first_n, first_b = cuda.grid(2)
    step_n, step_b = cuda.gridsize(2)
    rows, n = U32(x.shape[0]), U32(first_n)  # unsigned: see sgd.py
    while n < U32(x.shape[1]):
        shift, b = number(bias[n]), U32(first_b)
        while b + U32(3 * step_b) < rows:
            b1, b2, b3 = U32(b + step_b), U32(b + 2 * step_b), U32(b + 3 * step_b)
            v0, v1, v2, v3 = x[b, n] + shift, x[b1, n] + shift, x[b2, n] + shift, x[b3, n] + shift
            out[b, n] = kept(out, ZERO if v0 < ZERO else v0)
            out[b1, n] = kept(out, ZERO if v1 < ZERO else v1)
            out[b2, n] = kept(out, ZERO if v2 < ZERO else v2)
            out[b3, n] = kept(out, ZERO if v3 < ZERO else v3)
            b = U32(b + 4 * step_b)
        while b < rows:
            value = x[b, n] + shift
            out[b, n] = kept(out, ZERO if value < ZERO else value)
            b = U32(b + step_b)
        n = U32(n + step_n)


def bias_relu_cuda(x, bias, out):
    launch(_bias_relu_kernel, x.shape[::-1], x, bias, out)


def column_sums(visit):
    """Kernel: sums[part, n] = visit(a, b, first, end, n), of the rows `first` to `end` of column n.

    A thread owns these rows, `together` of a column, so their sum needs no atomics and has one order.
    """

    @cuda.jit(cache=True)
    @of(visit)
    def walk(a, b, together, sums):
        first_n, first_part = cuda.grid(2)
        step_n, step_part = cuda.gridsize(2)
        part = U32(first_part)
        while part < U32(sums.shape[0]):
            first = U32(part * together)
            end = min(U32(first + together), U32(a.shape[0]))
            n = U32(first_n)
            while n < U32(sums.shape[1]):
                sums[part, n] = visit(a, b, first, end, n)
                n = U32(n + step_n)
            part = U32(part + step_part)

    return walk


@register_jitable
def _rectified(out, d, b, end, n):
    """The sum of the gradients d where `out` is positive, which replace d."""
    total = ZERO
    while b + U32(3) < end:
        b1, b2, b3 = U32(b + 1), U32(b + 2), U32(b + 3)
        o0, o1, o2, o3 = number(out[b, n]), number(out[b1, n]), number(out[b2, n]), number(out[b3, n])
        d0, d1, d2, d3 = d[b, n], d[b1, n], d[b2, n], d[b3, n]
        d0, d1 = d0 if o0 > ZERO else ZERO, d1 if o1 > ZERO else ZERO
        d2, d3 = d2 if o2 > ZERO else ZERO, d3 if o3 > ZERO else ZERO
        d[b, n], d[b1, n], d[b2, n], d[b3, n] = d0, d1, d2, d3
        total = total + d0 + d1 + d2 + d3
        b = U32(b + 4)
    while b < end:
        value = d[b, n] if number(out[b, n]) > ZERO else ZERO
        d[b, n] = value
        total += value
        b = U32(b + 1)
    return total


@register_jitable
def _summed(x, _, b, end, n):
    total = ZERO
    while b < end:
        total += x[b, n]
        b = U32(b + 1)
    return total


_bias_relu_backward_kernel = column_sums(_rectified)
_sum_rows_kernel = column_sums(_summed)


def bias_relu_backward_cuda_columns(out, d, d_bias):
    launch(_bias_relu_backward_kernel, (d.shape[1], 1), out, d, U32(max(1, d.shape[0])), d_bias[None])


def bias_relu_backward_cuda(out, d, d_bias):
    sums = _parts(d, len(d))
    launch(_bias_relu_backward_kernel, sums.shape[::-1], out, d, U32(ROWS), sums)
    while len(sums) > 2 * ROWS:
        longer, sums = sums, _parts(d, len(sums))
        launch(_sum_rows_kernel, sums.shape[::-1], longer, longer, U32(ROWS), sums)
    launch(_sum_rows_kernel, (d.shape[1], 1), sums, sums, U32(len(sums)), d_bias[None])


def _parts(d, rows: int):
    """Room for a sum of each ROWS of so many rows; NumPy has CuPy make it where d is CuPy's."""
    return np.empty_like(d, shape=(-(-rows // ROWS), d.shape[1]))
