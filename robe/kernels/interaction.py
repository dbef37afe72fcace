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
`cuda_elements` gives one thread to each element written, which reads 2 D numbers for it. `cuda` gives each
row of the batch to a thread block, which reads its N vectors into shared memory once; a thread then has 3 x 3
pairs in registers, so that a number read serves three products; backward it has 4 x 4 elements of d_vectors.
Numbers are read 16 bytes at a time where they may be (D a multiple of 4, and for reads from global memory
rows at multiples of 16 bytes): from there all of a row's in one to four turns of a block, each of which waits
for memory once; from shared memory 6 reads for 36 products forward, and 20 for 64 backward, whose columns
are read one by one so that neighbouring threads add to neighbouring weights in interaction_scatter.py. Sums
keep their order. Where a row's vectors take more than 48 KB, it is `cuda_elements`.
"""

import numpy as np
from numba import cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.parts.bfloat import kept, number
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.lanes import combine
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.vector import in_fours, load4, load4_shared, store4_shared
from robe.kernels.parts.walks import ROWS, elements, nothing, walk_elements

# The compiler may reorder sums and fuse products into them, but not assume that no NaN occurs.
REORDER = {"reassoc", "contract"}
ZERO = np.float32(0)  # sums start here; they become float64 where the arrays are
U32 = np.uint32
PAIRS = 3  # a thread has PAIRS x PAIRS pairs at a time: 6 numbers read for 9 products
SUMS = 4  # a thread has SUMS x SUMS sums of the gradient at a time: 8 numbers read for 16 products
SHARED = 48 * 1024  # bytes of shared memory that every device gives a thread block unasked


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
    for d in range(width):
        out[d] = vectors[0, d]
    pair = width
    for i in range(1, n):
        for j in range(i):
            x, y = vectors[i], vectors[j]
            total = ZERO
            for d in range(width):
                total += x[d] * y[d]
            out[pair] = total
            pair += 1


@parallel(fastmath=REORDER)
def interaction_cpu(vectors, out):
    for b in prange(vectors.shape[0]):
        interact_row(vectors[b], out[b])


@parallel()
def interaction_backward_cpu(d_out, vectors, d_vectors):
    rows, n, width = vectors.shape
    for tile in prange((rows + ROWS - 1) // ROWS):
        factors = np.zeros((n, n), d_out.dtype)  # of the products, symmetric; 0 on the diagonal
        for b in range(tile * ROWS, min((tile + 1) * ROWS, rows)):
            pair = width
            for i in range(1, n):
                for j in range(i):
                    factors[i, j] = factors[j, i] = d_out[b, pair]
                    pair += 1
            for i in range(n):
                combine(factors[i], vectors[b], d_vectors[b], i)
            for d in range(width):
                d_vectors[b, 0, d] += d_out[b, d]


@register_jitable
def _write_column(state, found, b, n, column):
    vectors, out = state
    width = vectors.shape[2]
    if column < width:
        out[b, column] = kept(out, vectors[b, 0, column])
        return
    i, pair = 1, column - width
    while pair >= i:  # row i of the triangle holds i pairs
        pair -= i
        i += 1
    total = ZERO
    for d in range(width):
        total += vectors[b, i, d] * vectors[b, pair, d]
    out[b, column] = kept(out, total)


_interaction_elements_kernel = elements(nothing, _write_column)


def interaction_cuda_elements(vectors, out):
    rows, columns = out.shape
    walk_elements(_interaction_elements_kernel, (rows, 1, columns), (vectors, out))


@register_jitable
def quads_of(width):
    """Fours in a vector, where they can be read from shared memory by one instruction."""
    return U32(width >> 2) if width & 3 == 0 else U32(0)


@register_jitable
def stride_of(width):
    """Distance of the vectors in shared memory: an odd number of fours, or of elements, so that those at the
    same place of eight vectors, or of 32, lie in different banks."""
    return U32((U32(width >> 2) | 1) << 2) if width & 3 == 0 else U32(width | 1)


@register_jitable
def stage(vectors, fours, b, staged, stride, thread, threads):
    """Copy vectors[b] to shared memory, shared out among the threads of a block.

    fours: whether they can be read by fours. Four reads are under way at a time. What lies behind the last
    vector is the last one again.
    """
    n, width = U32(vectors.shape[1]), U32(vectors.shape[2])
    last, d = U32(n - U32(1)), thread
    if fours:
        stage_fours(vectors, b, staged, stride, thread, threads)
        d = width
    while d < width:
        i = U32(0)
        while i < n:
            i1, i2, i3 = min(U32(i + 1), last), min(U32(i + 2), last), min(U32(i + 3), last)
            x0, x1, x2, x3 = vectors[b, i, d], vectors[b, i1, d], vectors[b, i2, d], vectors[b, i3, d]
            staged[i * stride + d] = x0
            staged[i1 * stride + d] = x1
            staged[i2 * stride + d] = x2
            staged[i3 * stride + d] = x3
            i = U32(i + U32(4))
        d = U32(d + threads)


@register_jitable
def stage_fours(vectors, b, staged, stride, thread, threads):
    """`stage` by 16 bytes at a time."""
    n, quads = U32(vectors.shape[1]), U32(vectors.shape[2] >> 2)
    last, down = U32(n - U32(1)), U32(threads // quads)
    right = U32(threads - down * quads)
    i = U32(thread // quads)
    q = U32(thread - i * quads)
    while i < n:
        i1, q1 = further(i, q, down, right, quads)
        i2, q2 = further(i1, q1, down, right, quads)
        i3, q3 = further(i2, q2, down, right, quads)
        x0, x1 = load4(vectors, b, i, q << 2), load4(vectors, b, min(i1, last), q1 << 2)
        x2, x3 = load4(vectors, b, min(i2, last), q2 << 2), load4(vectors, b, min(i3, last), q3 << 2)
        store4_shared(staged, i * stride + (q << 2), *x0)
        store4_shared(staged, min(i1, last) * stride + (q1 << 2), *x1)
        store4_shared(staged, min(i2, last) * stride + (q2 << 2), *x2)
        store4_shared(staged, min(i3, last) * stride + (q3 << 2), *x3)
        i, q = further(i3, q3, down, right, quads)


@register_jitable
def further(i, q, down, right, quads):
    """Vector and number of a thread's next four: so many of both on, which may lead into the next vector."""
    i, q = U32(i + down), U32(q + right)
    return (U32(i + U32(1)), U32(q - quads)) if q >= quads else (i, q)


@register_jitable
def interact_staged(vectors, n, width, products, numbers, thread, threads, out, b):
    """All pairs of the n vectors in shared memory, shared out among the threads of a block, to out[b]."""
    stride, last, groups = stride_of(width), U32(n - U32(1)), U32((n + U32(PAIRS - 1)) // U32(PAIRS))
    tile = thread
    while tile < groups * (groups + U32(1)) // U32(2):
        i, j = U32(0), tile
        while j > i:  # row i of the triangle holds i + 1 tiles
            i = U32(i + U32(1))
            j = U32(j - i)
        i, j = U32(i * U32(PAIRS)), U32(j * U32(PAIRS))
        for a in range(PAIRS):
            for c in range(PAIRS):
                products[a, c] = 0
        d, fours_end = U32(0), U32(quads_of(width) << 2)
        while d < fours_end:
            for c in range(PAIRS):
                y = load4_shared(vectors, U32(min(U32(j + U32(c)), last) * stride + d))
                numbers[c, 0], numbers[c, 1], numbers[c, 2], numbers[c, 3] = y
            for a in range(PAIRS):
                x0, x1, x2, x3 = load4_shared(vectors, U32(min(U32(i + U32(a)), last) * stride + d))
                for c in range(PAIRS):
                    products[a, c] += x0 * numbers[c, 0]
                    products[a, c] += x1 * numbers[c, 1]
                    products[a, c] += x2 * numbers[c, 2]
                    products[a, c] += x3 * numbers[c, 3]
            d = U32(d + U32(4))
        while d < width:
            for a in range(PAIRS):
                x = vectors[U32(min(U32(i + U32(a)), last) * stride + d)]
                for c in range(PAIRS):
                    products[a, c] += x * vectors[U32(min(U32(j + U32(c)), last) * stride + d)]
            d = U32(d + U32(1))
        for a in range(PAIRS):
            for c in range(PAIRS):
                x, y = U32(i + U32(a)), U32(j + U32(c))
                if y < x < n:
                    out[b, width + U32(x * (x - U32(1))) // U32(2) + y] = kept(out, products[a, c])
        tile = U32(tile + threads)


def interaction_shape(rows: int, n: int, width: int, itemsize: int, taken: int = 0):
    """Launch with the vectors of a row of the batch in shared memory; None if they do not fit.

    taken: bytes of the shared memory that the kernel needs for itself.
    """
    groups, shared = -(-n // PAIRS), n * int(stride_of(width)) * itemsize
    return block_shape(rows, groups * (groups + 1) // 2, shared) if shared + taken <= SHARED else None


@cuda.jit(cache=True)
def _interaction_kernel(vectors, fours, out):
    staged = cuda.shared.array(0, vectors.dtype, alignment=16)
    products = cuda.local.array((PAIRS, PAIRS), vectors.dtype)
    numbers = cuda.local.array((PAIRS, 4), vectors.dtype)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    rows, n, width = U32(vectors.shape[0]), U32(vectors.shape[1]), U32(vectors.shape[2])
    b = U32(cuda.blockIdx.x)
    while b < rows:
        stage(vectors, fours, b, staged, stride_of(width), thread, threads)
        d = thread
        while d < width:
            out[b, d] = kept(out, vectors[b, 0, d])
            d = U32(d + threads)
        cuda.syncthreads()
        interact_staged(staged, n, width, products, numbers, thread, threads, out, b)
        cuda.syncthreads()  # the next row takes the same memory
        b = U32(b + U32(cuda.gridDim.x))


def interaction_cuda(vectors, out):
    shape = interaction_shape(*vectors.shape, vectors.itemsize)
    if shape is None:
        return interaction_cuda_elements(vectors, out)
    launch(_interaction_kernel, (len(vectors),), vectors, in_fours(vectors), out, shape=shape)


@register_jitable
def _write_gradient(state, found, b, i, d):
    d_out, vectors, d_vectors = state
    n, width = vectors.shape[1], vectors.shape[2]
    total = number(d_out[b, d]) if i == 0 else ZERO
    for other in range(n):
        if other != i:
            high, low = max(i, other), min(i, other)
            total += number(d_out[b, width + high * (high - 1) // 2 + low]) * vectors[b, other, d]
    d_vectors[b, i, d] = total


_interaction_backward_elements_kernel = elements(nothing, _write_gradient)


def interaction_backward_cuda_elements(d_out, vectors, d_vectors):
    state = (d_out, vectors, d_vectors)
    walk_elements(_interaction_backward_elements_kernel, d_vectors.shape, state)


@register_jitable
def stage_backward(d_out, vectors, fours, b, staged, thread, threads):
    """Copy the gradients of all products of row b (N, `padded` N), and the vectors behind them, to shared
    memory."""
    n, width = U32(vectors.shape[1]), U32(vectors.shape[2])
    size = stage_factors(d_out, n, width, b, staged, thread, threads)
    stage(vectors, fours, b, staged[size:], width, thread, threads)


@register_jitable
def stage_factors(d_out, n, width, b, staged, thread, threads):
    """The first part of `stage_backward`; returns how many numbers it is."""
    size, e = U32(n * padded(n)), thread
    last = U32(size - U32(1))
    while e < size:
        e1, e2 = min(U32(e + threads), last), min(U32(e + U32(2) * threads), last)
        e3 = min(U32(e + U32(3) * threads), last)
        x0, x1 = factor(d_out, b, e, n, width), factor(d_out, b, e1, n, width)
        x2, x3 = factor(d_out, b, e2, n, width), factor(d_out, b, e3, n, width)
        staged[e], staged[e1], staged[e2], staged[e3] = x0, x1, x2, x3
        e = U32(e + U32(4) * threads)
    return size


@register_jitable
def padded(n):
    """The next multiple of 4."""
    return U32(n + U32(3)) & U32(0xFFFFFFFC)


@register_jitable
def factor(d_out, b, e, n, width):
    """Element e of the matrix (N, `padded` N) by which the gradient multiplies the vectors of a row."""
    i = U32(e // padded(n))
    j = U32(e - i * padded(n))
    high, low = max(i, j), min(i, j)
    if low < high < n:
        return number(d_out[b, width + (U32(high * high - high) // U32(2) + low)])
    return ZERO


def staged_sums(visit):
    """Device function: sums of the gradients by the vectors of a row, from what `stage_backward` copied.

    visit(state, b, i, d, total): `total` sums the products for element d of vector i. A thread has
    SUMS x SUMS elements at a time, its columns a quarter of D apart, so that neighbouring threads read (and
    may add to) neighbouring elements. Factors are read four at a time; those behind the last vector are 0.
    """

    @register_jitable
    def walk(staged, n, width, sums, factors, thread, threads, b, state):
        last, step, row = U32(n - U32(1)), columns_of(width), padded(n)
        tile = thread
        while tile < tiles_of(n, width):
            group = U32(tile // step)
            first_i, first_d = U32(group * U32(SUMS)), U32(tile - group * step)
            for a in range(SUMS):
                for c in range(SUMS):
                    sums[a, c] = 0
            other = U32(0)
            while other < n:
                for a in range(SUMS):
                    x = load4_shared(staged, U32(min(U32(first_i + U32(a)), last) * row + other))
                    factors[a, 0], factors[a, 1], factors[a, 2], factors[a, 3] = x
                for k in range(4):
                    vector = U32(n * row + min(U32(other + U32(k)), last) * width)
                    for c in range(SUMS):
                        y = staged[U32(vector + min(U32(first_d + step * U32(c)), U32(width - U32(1))))]
                        for a in range(SUMS):
                            sums[a, c] += factors[a, k] * y
                other = U32(other + U32(4))
            for a in range(SUMS):
                for c in range(SUMS):
                    i, d = U32(first_i + U32(a)), U32(first_d + step * U32(c))
                    if i < n and d < width:
                        visit(state, b, i, d, sums[a, c])
            tile = U32(tile + threads)

    return walk


@register_jitable
def columns_of(width):
    """Tiles of the gradient side by side."""
    return U32((width + U32(SUMS - 1)) // U32(SUMS))


@register_jitable
def tiles_of(n, width):
    """Tiles of the gradient (N, D) of a row of the batch."""
    return columns_of(width) * U32((n + U32(SUMS - 1)) // U32(SUMS))


@register_jitable
def _write_sum(state, b, i, d, total):
    d_out, d_vectors = state
    d_vectors[b, i, d] = total + (number(d_out[b, d]) if i == U32(0) else ZERO)


write_sums = staged_sums(_write_sum)


@cuda.jit(cache=True)
def _interaction_backward_kernel(d_out, vectors, fours, d_vectors):
    staged = cuda.shared.array(0, vectors.dtype, alignment=16)
    sums = cuda.local.array((SUMS, SUMS), vectors.dtype)
    factors = cuda.local.array((SUMS, 4), vectors.dtype)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    rows, n, width = U32(vectors.shape[0]), U32(vectors.shape[1]), U32(vectors.shape[2])
    b = U32(cuda.blockIdx.x)
    while b < rows:
        stage_backward(d_out, vectors, fours, b, staged, thread, threads)
        cuda.syncthreads()
        write_sums(staged, n, width, sums, factors, thread, threads, b, (d_out, d_vectors))
        cuda.syncthreads()  # the next row takes the same memory
        b = U32(b + U32(cuda.gridDim.x))


def interaction_backward_shape(rows: int, n: int, width: int, itemsize: int, taken: int = 0):
    """Launch with what `stage_backward` copies, and `taken` bytes more; None if that is too much."""
    shared = n * (int(padded(U32(n))) + width) * itemsize + taken
    return block_shape(rows, int(tiles_of(n, width)), shared) if shared <= SHARED else None


def interaction_backward_cuda(d_out, vectors, d_vectors):
    shape = interaction_backward_shape(*vectors.shape, vectors.itemsize)
    if shape is None:
        return interaction_backward_cuda_elements(d_out, vectors, d_vectors)
    arguments = (d_out, vectors, in_fours(vectors), d_vectors)
    launch(_interaction_backward_kernel, (len(vectors),), *arguments, shape=shape)
