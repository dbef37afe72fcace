"""Gradient of the look-up: out[slot] += scale * sign * d_vectors[b, f, i], in the order of the batch.

    d_vectors (B, F, D) float   gradient of the loss by the vectors; may be a strided view
    ids, base, slot_map         as in gather.py, whose adjoint this is (for scale = 1)
    scale     float             1 for the gradient, -learning rate for a fused step of SGD on `memory`
    out       (M,)    float     added to

Versions: `reference` is `np.add.at`, one addition after the other. `cpu` lists the spans of the batch
(parts/spans.py) and splits `out` in as many ranges as there are threads: each goes through the list in the
order of the batch and adds what falls into its own range, so no two threads ever write the same slot, and
every slot sums in the order of the batch however many threads there are. `cuda_elements` gives one thread to
each element, which hashes where it goes and adds atomically: correct, but in no fixed order, so float sums
may differ in the last bits from run to run. `cuda` hashes once per piece (pieces.py), then adds atomically
too. `cuda_deterministic` adds up integers (parts/fixed.py), for which the order does not matter: the same
bits in every run, for every launch, and for any order of the batch. It looks for the largest gradient, adds
all of them in units to an array of M int64, which it keeps, and at last adds these sums to `out`: those of
the whole array, or of the slots of the batch where they are fewer. Where the batch is larger than the array,
pieces are first listed by bins of 4,096 slots, in any order within a bin, and a thread block adds up to 2,048
pieces of a bin in shared memory before it adds to the array. The sum of n gradients is wrong by less than n
units, 2^-40 times the power of two above the largest gradient of the batch (for up to 2^23 pieces; each
doubling of these doubles the unit), and then rounded once. What is not finite is added to its slot as it is.

The reckoning for 65,536 x 26 x 128, Z = 32, 0.87 GB of gradients in 6.8 million pieces: they are read twice,
0.4 ms at 4.2 TB/s; the list is 27 MB. On an H200 218 million atomic additions of floats took 0.74 ms to 10 MB
and 1.0 ms to 100 MB, as long as their cache lines, 2 a piece, suggest; integers of 64 bits would take 3
lines. Bins leave 16 and 40 million of them, in whole lines. Clearing and adding the sums moves 24 bytes a
weight, 0.06 and 0.6 GB. Repeated ids change nothing of this. Sorted pieces of floats would move 0.9 GB in the
sort (keys and numbers of 32 bits, 8 bits at a time), need further passes where the pieces of a slot fill many
tiles, and CuPy's sort allocates, which a CUDA graph cannot.
"""

import numpy as np
from numba import config, cuda
from numba.extending import register_jitable

from robe.kernels.gather import token_of
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.fixed import INFINITE, digits_of, finite_bits, from_units, size_bits, to_units
from robe.kernels.parts.hashing import U64, flip, slots_reference, span_at
from robe.kernels.parts.lanes import add_span, require_rows_together
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.pieces import TILE, U32, around, count_pieces, piece_at
from robe.kernels.parts.scratch import scratch, zeros
from robe.kernels.parts.walks import (
    add,
    elements,
    pieces,
    spans,
    take,
    walk_elements,
    walk_pieces,
    walk_spans,
)

BIN = U64(4 if config.ENABLE_CUDASIM else 12)
KEPT = (1 << int(BIN)) + 64  # a piece may reach into the next bin
CHUNK = 2 * TILE if config.ENABLE_CUDASIM else 2048
HALF = 20  # bits of a number in the lower half: CHUNK of them stay below 2^32, and of the rest below 2^31
SHARES = 264  # thread blocks that count and list: two on each SM of a large card
BINS_MOST = 48 * 1024 // 4 - 1  # that they can count in shared memory


def scatter_add_cost(d_vectors, ids, base, slot_map, scale, out) -> Cost:
    """Each id and gradient read, each slot read and written; a product and a sum per element."""
    return Cost(ids.nbytes + 3 * d_vectors.nbytes, 2 * d_vectors.size)


def scatter_add_reference(d_vectors, ids, base, slot_map, scale, out):
    slots, signs = slots_reference(slot_map, base + ids.astype(np.uint64))
    np.add.at(out, slots, out.dtype.type(scale) * (d_vectors * signs.astype(out.dtype)))


@register_jitable(forceinline=True)
def _add(state, b, element, slot, length, bits):
    d_vectors, scale, out = state
    add_span(d_vectors[b], element, bits, scale, out, slot, length)


_scatter_add = spans(_add)


def scatter_add_cpu(d_vectors, ids, base, slot_map, scale, out):
    require_rows_together(d_vectors)
    walk_spans(_scatter_add, ids, base, slot_map, out, (out.dtype.type(scale), out), d_vectors)


@register_jitable
def _add_element(state, token, b, f, i):
    _, _, slot_map, d_vectors, scale, out = state
    slot, _, bits = span_at(slot_map, token, np.uint64(i))
    add(out, slot, value_of(scale) * flip(d_vectors[b, f, i], bits, 0))


_scatter_add_elements_kernel = elements(token_of, _add_element)


def scatter_add_cuda_elements(d_vectors, ids, base, slot_map, scale, out):
    state = (ids, base, slot_map, d_vectors, typed(scale, out.dtype), out)
    walk_elements(_scatter_add_elements_kernel, d_vectors.shape, state)


@register_jitable
def _begin(state):
    d_vectors, scale, out = state
    return d_vectors, value_of(scale), out


@register_jitable
def _add_piece(state, slot_map, b, column, slot, bits):
    d_vectors, scale, out = state  # d_vectors (B, F * D)
    add(out, around(slot, slot_map), scale * flip(d_vectors[b, column], bits, 0))


_scatter_add_kernel = pieces(_add_piece, _begin)


def scatter_add_cuda(d_vectors, ids, base, slot_map, scale, out):
    rows, features, width = d_vectors.shape
    state = (d_vectors.reshape(rows, features * width), typed(scale, out.dtype), out)
    walk_pieces(_scatter_add_kernel, ids, base, slot_map, state)


@cuda.jit(cache=True)
def _largest_kernel(d_vectors, largest):
    """largest (1,), 0 before: the bits of the largest finite |number| of d_vectors (B, F * D)."""
    block = cuda.shared.array(1, np.uint32)
    rows, columns = U32(d_vectors.shape[0]), U32(d_vectors.shape[1])
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    if thread == U32(0):
        block[0] = 0
    cuda.syncthreads()
    found, last = U32(0), U32(columns - U32(1))
    b = U32(cuda.blockIdx.x)
    while b < rows:
        c = thread
        while c < columns:
            # Four reads under way at a time. What lies behind the last number is the last one again.
            c1, c2, c3 = U32(c + threads), U32(c + U32(2) * threads), U32(c + U32(3) * threads)
            x0, x1 = d_vectors[b, c], d_vectors[b, min(c1, last)]
            x2, x3 = d_vectors[b, min(c2, last)], d_vectors[b, min(c3, last)]
            found = max(found, finite_bits(x0), finite_bits(x1), finite_bits(x2), finite_bits(x3))
            c = U32(c + U32(4) * threads)
        b = U32(b + U32(cuda.gridDim.x))
    cuda.atomic.max(block, 0, found)
    cuda.syncthreads()
    if thread == U32(0):
        cuda.atomic.max(largest, 0, block[0])


@register_jitable
def _add_units(state, slot_map, b, column, slot, bits):
    d_vectors, largest, digits, scale, sums, out = state
    x, slot = flip(d_vectors[b, column], bits, 0), around(slot, slot_map)
    if size_bits(x) < INFINITE:
        add(sums, slot, to_units(x, largest[0], digits))
    else:
        add(out, slot, value_of(scale) * x)


_add_units_kernel = pieces(_add_units)


@register_jitable
def add_sum(slot, total, largest, digits, scale, out):
    out[slot] += value_of(scale) * from_units(total, largest[0], digits)


@cuda.jit(cache=True)
def _add_sums_kernel(largest, digits, scale, sums, out):
    slot = U64(cuda.grid(1))
    while slot < U64(out.size):
        total = sums[slot]
        if total != 0:
            sums[slot] = 0
            add_sum(slot, total, largest, digits, scale, out)
        slot += U64(cuda.gridsize(1))


@register_jitable
def _take_sum(state, slot_map, b, column, slot, bits):
    largest, digits, scale, sums, out = state
    slot = around(slot, slot_map)
    if sums[slot] != 0:
        total = take(sums, slot).view(np.int64)
        if total != 0:
            add_sum(slot, total, largest, digits, scale, out)


_take_sums_kernel = pieces(_take_sum)


@register_jitable
def count_in_bins(ids, base, slot_map, shift, first, end, mine):
    """mine (bins,), in shared memory: how many of the pieces first .. end - 1 begin in each bin."""
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    i = thread
    while i < U32(mine.size):
        mine[i] = 0
        i = U32(i + threads)
    cuda.syncthreads()
    p = U32(first + thread)
    while p < end:
        slot, _, _, _, _ = piece_at(p, ids, base, slot_map, shift)
        cuda.atomic.add(mine, slot >> BIN, U32(1))
        p = U32(p + threads)
    cuda.syncthreads()


@cuda.jit(cache=True)
def _count_pieces_kernel(ids, base, slot_map, shift, pieces, share, counts):
    """counts (bins + 1,), 0 before: the pieces that begin in each bin; share: of a thread block."""
    mine = cuda.shared.array(0, np.uint32)
    first = min(U32(U32(cuda.blockIdx.x) * share), pieces)
    end = min(U32(first + share), pieces)
    bins = mine[: U32(counts.size - 1)]
    count_in_bins(ids, base, slot_map, shift, first, end, bins)
    i = U32(cuda.threadIdx.x)
    while i < U32(bins.size):
        if bins[i] > U32(0):
            cuda.atomic.add(counts, i, bins[i])
        i = U32(i + U32(cuda.blockDim.x))


@cuda.jit(cache=True)
def _reserve_kernel(counts):
    """Where each bin's part of the list begins, in place of its count; the last number is what is taken."""
    i, bins = U32(cuda.grid(1)), U32(counts.size - 1)
    while i < bins:
        counts[i] = cuda.atomic.add(counts, bins, counts[i])
        i = U32(i + U32(cuda.gridsize(1)))


@cuda.jit(cache=True)
def _list_pieces_kernel(ids, base, slot_map, shift, pieces, share, ends, listed):
    """listed (pieces,): those of each bin side by side, up to ends[bin], which was its beginning before."""
    mine = cuda.shared.array(0, np.uint32)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    first = min(U32(U32(cuda.blockIdx.x) * share), pieces)
    end = min(U32(first + share), pieces)
    bins = mine[: U32(ends.size - 1)]
    count_in_bins(ids, base, slot_map, shift, first, end, bins)
    i = thread
    while i < U32(bins.size):
        if bins[i] > U32(0):
            bins[i] = cuda.atomic.add(ends, i, bins[i])
        i = U32(i + threads)
    cuda.syncthreads()
    p = U32(first + thread)
    while p < end:
        slot, _, _, _, _ = piece_at(p, ids, base, slot_map, shift)
        listed[cuda.atomic.add(bins, slot >> BIN, U32(1))] = p
        p = U32(p + threads)


@cuda.jit(cache=True)
def _add_bins_kernel(ids, base, slot_map, shift, listed, ends, d_vectors, largest, digits, scale, sums, out):
    """Thread blocks take the list in chunks, and add up what lies in one bin of a chunk before they go on."""
    low = cuda.shared.array(KEPT, np.uint32)
    high = cuda.shared.array(KEPT, np.int32)
    slots = cuda.shared.array(TILE, np.uint64)
    signs = cuda.shared.array(TILE, np.uint64)
    rows = cuda.shared.array(TILE, np.uint32)
    columns = cuda.shared.array(TILE, np.uint32)
    thread, threads, pieces = U32(cuda.threadIdx.x), U32(cuda.blockDim.x), U32(listed.size)
    size = largest[0]
    s = thread
    while s < U32(KEPT):
        low[s], high[s] = 0, 0
        s = U32(s + threads)
    chunk = U32(cuda.blockIdx.x)
    while chunk * U32(CHUNK) < pieces:
        first = U32(chunk * U32(CHUNK))
        stop = min(U32(first + U32(CHUNK)), pieces)
        while first < stop:
            slot, _, _, _, _ = piece_at(listed[first], ids, base, slot_map, shift)
            begin, until = slot >> BIN << BIN, min(stop, ends[slot >> BIN])
            while first < until:
                here = min(U32(TILE), U32(until - first))
                p = thread
                while p < here:
                    slot, signs[p], rows[p], f, element = piece_at(
                        listed[U32(first + p)], ids, base, slot_map, shift
                    )
                    slots[p], columns[p] = slot - begin, f * U32(slot_map.width) + element
                    p = U32(p + threads)
                cuda.syncthreads()
                e, last = thread, U32(U32(here << shift) - U32(1))
                while e <= last:
                    # Four reads under way at a time.
                    e1, e2 = U32(e + threads), U32(e + U32(2) * threads)
                    e3 = U32(e + U32(3) * threads)
                    x0 = gradient_at(d_vectors, signs, rows, columns, shift, e)
                    x1 = gradient_at(d_vectors, signs, rows, columns, shift, min(e1, last))
                    x2 = gradient_at(d_vectors, signs, rows, columns, shift, min(e2, last))
                    x3 = gradient_at(d_vectors, signs, rows, columns, shift, min(e3, last))
                    state = (slots, slot_map, shift, begin, size, digits, scale, low, high, out)
                    keep(state, e, last, x0)
                    keep(state, e1, last, x1)
                    keep(state, e2, last, x2)
                    keep(state, e3, last, x3)
                    e = U32(e + U32(4) * threads)
                cuda.syncthreads()  # the next tile takes the same memory
                first = U32(first + here)
            s = thread
            while s < U32(KEPT):
                total = (np.int64(high[s]) << np.int64(HALF)) + np.int64(low[s])
                if total != 0:
                    cuda.atomic.add(sums, around(begin + U64(s), slot_map), total)
                    low[s], high[s] = 0, 0
                s = U32(s + threads)
            cuda.syncthreads()
        chunk = U32(chunk + U32(cuda.gridDim.x))


@register_jitable
def gradient_at(d_vectors, signs, rows, columns, shift, e):
    """Element e of the pieces in shared memory, with its sign."""
    p = U32(e >> shift)
    k = U32(e - (p << shift))
    return flip(d_vectors[rows[p], U32(columns[p] + k)], signs[p], k)


@register_jitable
def keep(state, e, last, x):
    """Add element e of the pieces in shared memory to the sums there, in two halves, which need no carry."""
    slots, slot_map, shift, begin, size, digits, scale, low, high, out = state
    if e <= last:
        p = U32(e >> shift)
        s = slots[p] + U64(e - (p << shift))
        if size_bits(x) < INFINITE:
            units = to_units(x, size, digits)
            cuda.atomic.add(low, s, U32(units & np.int64((1 << HALF) - 1)))
            cuda.atomic.add(high, s, np.int32(units >> np.int64(HALF)))
        else:
            cuda.atomic.add(out, around(begin + s, slot_map), value_of(scale) * x)


def add_bins(d_vectors, ids, base, slot_map, largest, digits, scale, sums, out):
    """What walk_pieces and `_add_units` do, with fewer additions to memory."""
    pieces, shift = count_pieces(slot_map, ids)
    counts = scratch(out, "counts", (bins_of(out) + 1,), np.uint32)
    # In few sizes, as batches of bags, and what several processes exchange, have another number each time.
    listed = scratch(out, "listed", (1 << (pieces - 1).bit_length(),), np.uint32)[:pieces]
    counts[...] = 0
    rows, few = (ids, base, slot_map, shift), block_shape(SHARES, shared=counts.nbytes)
    share = U32(-(-pieces // few[0]))
    launch(_count_pieces_kernel, (pieces,), *rows, U32(pieces), share, counts, shape=few)
    launch(_reserve_kernel, (bins_of(out),), counts)
    launch(_list_pieces_kernel, (pieces,), *rows, U32(pieces), share, counts, listed, shape=few)
    rest = (listed, counts, d_vectors, largest, digits, scale, sums, out)
    launch(_add_bins_kernel, (pieces,), *rows, *rest, shape=block_shape(-(-pieces // CHUNK)))


def bins_of(out) -> int:
    return (out.size >> int(BIN)) + 1


def scatter_add_cuda_deterministic(d_vectors, ids, base, slot_map, scale, out):
    rows, features, width = d_vectors.shape
    d_vectors, scale = d_vectors.reshape(rows, features * width), typed(scale, out.dtype)
    digits = digits_of(count_pieces(slot_map, ids)[0])  # a piece adds to a slot once at most
    largest = scratch(out, "largest", (1,), np.uint32)
    largest[...] = 0
    launch(_largest_kernel, d_vectors.shape, d_vectors, largest, shape=block_shape(rows, features * width))
    with zeros(out, "sums", out.shape, np.int64) as sums:
        state, many = (d_vectors, largest, digits, scale, sums, out), out.size <= d_vectors.size
        if many and bins_of(out) <= BINS_MOST:
            add_bins(d_vectors, ids, base, slot_map, largest, digits, scale, sums, out)
        else:
            walk_pieces(_add_units_kernel, ids, base, slot_map, state)
        if many:
            launch(_add_sums_kernel, out.shape, largest, digits, scale, sums, out)
        else:
            state = (largest, digits, scale, sums.view("uint64"), out)
            walk_pieces(_take_sums_kernel, ids, base, slot_map, state)
