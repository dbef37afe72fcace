"""Pairwise dot interaction of the DLRM (Naumov et al., 2019), and its gradient.

    vectors (B, N, D)      row 0 the output of the bottom MLP, rows 1 .. F the embeddings (N = 1 + F)
    out     (B, D + N * (N - 1) / 2)
            row 0, then <vectors[b, i], vectors[b, j]> for i = 1 .. N - 1 and j < i

    backward: d_vectors[b, i] = sum over the pairs of i of d_out[b, pair] * vectors[b, the other one],
              and row 0 also receives d_out[b, :D]. d_vectors is written in full.

Versions: `reference` is batched matrix products. `cpu` gives each row of the batch to one thread and
keeps its N vectors in the first-level cache; sums may be reassociated by the compiler, which lets it use
vector registers, and once compiled their order is fixed. Its gradient multiplies with the matrix of the
factors of all pairs and keeps the sums in registers: twice as fast as adding both ways, pair by pair.
`cuda` gives one thread to each element written.
"""

import numpy as np
from numba import cuda, njit, prange

from robe.kernels.cost import Cost
from robe.kernels.lanes import combine
from robe.kernels.launch import launch

TILE = 16  # rows of a batch that a thread does in turn

# The compiler may reorder sums and fuse products into them, but not assume that no NaN occurs.
REORDER = {"reassoc", "contract"}
ZERO = np.float32(0)  # sums start here; they become float64 where the arrays are


def out_width(n: int, width: int) -> int:
    """Columns of the output for n vectors of `width` elements."""
    return width + n * (n - 1) // 2


def interaction_cost(vectors, out) -> Cost:
    """Vectors read, output written; a product and a sum per pair and element."""
    rows, n, width = vectors.shape
    return Cost(vectors.nbytes + out.nbytes, rows * n * (n - 1) * width)


def interaction_backward_cost(d_out, vectors, d_vectors) -> Cost:
    """Vectors and d_out read, d_vectors written; twice the operations of the forward pass."""
    rows, n, width = vectors.shape
    return Cost(2 * vectors.nbytes + d_out.nbytes, 2 * rows * n * (n - 1) * width)


def interaction_reference(vectors, out):
    width = vectors.shape[2]
    i, j = np.tril_indices(vectors.shape[1], -1)
    out[:, :width] = vectors[:, 0]
    out[:, width:] = (vectors @ vectors.transpose(0, 2, 1))[:, i, j]


def interaction_backward_reference(d_out, vectors, d_vectors):
    n, width = vectors.shape[1:]
    i, j = np.tril_indices(n, -1)
    d_products = np.zeros((len(vectors), n, n), vectors.dtype)
    d_products[:, i, j] = d_out[:, width:]
    d_vectors[...] = (d_products + d_products.transpose(0, 2, 1)) @ vectors
    d_vectors[:, 0] += d_out[:, :width]


@njit(nogil=True, fastmath=REORDER)
def interact_row(vectors, out):
    """The output of one row of the batch: vectors (N, D)."""
    n, width = vectors.shape
    out[:width] = vectors[0]
    pair = width
    for i in range(1, n):
        for j in range(i):
            x, y = vectors[i], vectors[j]
            total = ZERO
            for d in range(width):
                total += x[d] * y[d]
            out[pair] = total
            pair += 1


@njit(parallel=True, nogil=True, cache=True, fastmath=REORDER)
def interaction_cpu(vectors, out):
    for b in prange(vectors.shape[0]):
        interact_row(vectors[b], out[b])


@njit(parallel=True, nogil=True, cache=True)
def interaction_backward_cpu(d_out, vectors, d_vectors):
    rows, n, width = vectors.shape
    for tile in prange((rows + TILE - 1) // TILE):
        factors = np.zeros((n, n), d_out.dtype)  # of the products, symmetric; 0 on the diagonal
        for b in range(tile * TILE, min((tile + 1) * TILE, rows)):
            pair = width
            for i in range(1, n):
                for j in range(i):
                    factors[i, j] = factors[j, i] = d_out[b, pair]
                    pair += 1
            for i in range(n):
                combine(factors[i], vectors[b], d_vectors[b], i)
            for d in range(width):
                d_vectors[b, 0, d] += d_out[b, d]


@cuda.jit
def _interaction_kernel(vectors, out):
    width = vectors.shape[2]
    first_column, first_b = cuda.grid(2)
    step_column, step_b = cuda.gridsize(2)
    b = first_b
    while b < out.shape[0]:
        column = first_column
        while column < out.shape[1]:
            if column < width:
                out[b, column] = vectors[b, 0, column]
            else:
                i, pair = 1, column - width
                while pair >= i:  # row i of the triangle holds i pairs
                    pair -= i
                    i += 1
                total = ZERO
                for d in range(width):
                    total += vectors[b, i, d] * vectors[b, pair, d]
                out[b, column] = total
            column += step_column
        b += step_b


def interaction_cuda(vectors, out):
    launch(_interaction_kernel, out.shape[::-1], vectors, out)


@cuda.jit
def _interaction_backward_kernel(d_out, vectors, d_vectors):
    n, width = vectors.shape[1], vectors.shape[2]
    first_d, first_i, first_b = cuda.grid(3)
    step_d, step_i, step_b = cuda.gridsize(3)
    b = first_b
    while b < vectors.shape[0]:
        i = first_i
        while i < n:
            d = first_d
            while d < width:
                # Nobody else writes this element, so the pairs of vector i are simply summed up.
                total = d_out[b, d] if i == 0 else ZERO
                for other in range(n):
                    if other != i:
                        high, low = max(i, other), min(i, other)
                        total += d_out[b, width + high * (high - 1) // 2 + low] * vectors[b, other, d]
                d_vectors[b, i, d] = total
                d += step_d
            i += step_i
        b += step_b


def interaction_backward_cuda(d_out, vectors, d_vectors):
    launch(_interaction_backward_kernel, d_vectors.shape[::-1], d_out, vectors, d_vectors)
