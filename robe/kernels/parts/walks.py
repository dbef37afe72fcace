"""The loops of the kernels, once each: walks over a batch, that call a visitor at every stop.

An operation hands in `visit`, plain Python under `register_jitable`, and gets a kernel; the compiler puts the
visitor into the innermost loop. A kernel takes `state`, a tuple of whatever the visitor needs, and all but
those of `elements` take the batch (`ids`, `base`) and a `layout` that tells where rows lie (a SlotMap or a
Form).

    rows(begin, visit)    CPU    once for each row of the batch, with scratch memory of the thread
    spans(visit)          CPU    once for each span of slots; threads own ranges of the array, so none collide
    elements(find, visit) CUDA   once for each element of some vectors, by a thread of its own
    pieces(visit)         CUDA   once for each element, or for four, hashed once per piece (pieces.py)

The layout stays outside of `state`, since a NamedTuple within a tuple cannot enter a parallel region of
Numba. A kernel is named by its walk and its visitor, in profilers and in the cache on disk.
"""

import numpy as np
from numba import cuda, get_num_threads, prange
from numba.extending import register_jitable

from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.pieces import TILE, U32, count_pieces, piece_at
from robe.kernels.parts.spans import find_spans, most_spans, own_spans, room_for_spans

ROWS = 16  # of a batch, that a thread of the CPU does in turn
TOGETHER = 8  # vectors of one feature that are walked as if they were a row of the batch


def in_rows(ids, base, *vectors):
    """A batch of one feature, such as the ids of all bags, as longer rows, and what is left of it.

    vectors (B, 1, D), if there are any. What lies ahead is asked for within a row and the next one alone, so
    that without this to look them up took 2 to 3 times as long, and to add them 1.4 times.
    """
    together = ids.shape[1] == 1 and all(array.flags.c_contiguous for array in vectors)
    whole = len(ids) // TOGETHER * TOGETHER if together else 0
    if whole:
        longer = (array[:whole].reshape(-1, TOGETHER, array.shape[2]) for array in vectors)
        yield ids[:whole].reshape(-1, TOGETHER), base.repeat(TOGETHER), *longer
    if whole < len(ids):
        yield ids[whole:], base, *(array[whole:] for array in vectors)


def of(visit):
    """Name a walk by its visitor, such as `rows.gather._read`.

    Numba's cache has files for each name, and a list of the kernels that share them. Two processes that
    compile at a time could mix up the kernels of one list, so no two operations may share a name.
    """

    def named(walk):
        made_by, file = walk.__qualname__.split(".")[0], visit.__module__.split(".")[-1]
        walk.__qualname__ = f"{made_by}.{file}.{visit.__name__}"
        return walk

    return named


def rows(begin, visit):
    """Kernel (state, layout, ids, base): on the CPU, each row of the batch by one thread, in order within 16.

    begin(state, layout, base, b, ids[b]) -> what the thread keeps between rows, called before the first of 16
    visit(state, layout, base, kept, b, ids[b], ids of the next row), so that memory can be fetched ahead
    """

    @parallel()
    @of(visit)
    def walk(state, layout, ids, base):
        count = ids.shape[0]
        for tile in prange((count + ROWS - 1) // ROWS):
            first, last = tile * ROWS, min((tile + 1) * ROWS, count)
            kept = begin(state, layout, base, first, ids[first])
            for b in range(first, last):
                visit(state, layout, base, kept, b, ids[b], ids[min(b + 1, count - 1)])

    return walk


@register_jitable
def nothing(*arguments):
    """A `begin` or `find` for visitors that need none."""
    return 0


def spans(visit):
    """Kernel for `walk_spans`: on the CPU, each span of slots that the batch touches, in its order.

    visit(state, b, element, slot, length, bits): the weights slot .. slot + length - 1 belong to the elements
    from `element` on, of the F * D of row b, with the sign bits `bits`. Each thread owns a range of the
    array, and spans are cut where ranges end: no two threads visit one slot, and results are the same to the
    bit for any number of threads.
    """

    @parallel()
    @of(visit)
    def walk(ids, base, layout, most, owners, array, state):
        rows = ids.shape[0]
        listed, counts = room_for_spans(rows, most)
        for chunk in range(0, rows, len(listed)):
            size = min(len(listed), rows - chunk)
            for k in prange(size):
                counts[k] = find_spans(ids[chunk + k], base, layout, listed[k])
            for owner in prange(owners):
                low = np.uint64(owner * array.size // owners)
                high = np.uint64((owner + 1) * array.size // owners)
                mine = np.empty(most, np.int64)
                for k in range(size):
                    for r in range(own_spans(listed[k], counts[k], low, high, array, mine)):
                        slot, length, bits, element = listed[k, mine[r]]
                        first, last = max(slot, low), min(slot + length, high)
                        skipped = first - slot
                        visit(state, chunk + k, element + skipped, first, last - first, bits >> skipped)

    return walk


def walk_spans(kernel, ids, base, slot_map, array, state, *vectors) -> None:
    """Run a kernel of `spans`. array (M,): the one whose slots the threads share out, and fetch ahead.

    vectors (B, F, D): stand in front of what else the visitor gets as `state`, if there are any.
    """
    most, threads = most_spans(slot_map), get_num_threads()
    for rows, bases, *own in in_rows(ids, base, *vectors):
        # The number of threads is an argument, since Numba cannot cache a kernel that asks for it.
        kernel(rows, bases, slot_map, most * rows.shape[1], threads, array, (*own, *state))


def elements(find, visit):
    """Kernel for `walk_elements`: on a GPU, each element of vectors (B, N, D) by a thread of its own.

    find(state, b, n) -> what the elements of a vector share
    visit(state, found, b, n, d)
    """

    @cuda.jit(cache=True)
    @of(visit)
    def walk(shape, state):
        rows, vectors, width = shape
        first_d, first_b, first_n = cuda.grid(3)
        step_d, step_b, step_n = cuda.gridsize(3)
        n = first_n
        while n < vectors:
            b = first_b
            while b < rows:
                found = find(state, b, n)
                d = first_d
                while d < width:
                    visit(state, found, b, n, d)
                    d += step_d
                b += step_b
            n += step_n

    return walk


def walk_elements(kernel, shape, state) -> None:
    """Run a kernel of `elements` over vectors of that shape."""
    rows, vectors, width = shape
    launch(kernel, (width, rows, vectors), shape, state)


@register_jitable
def same(state):
    """A `begin` for kernels that take their numbers from the host alone."""
    return state


def pieces(visit, begin=same, together=1):
    """Kernel for `walk_pieces`: on a GPU, each element of the batch, or `together` neighbours at a time.

    visit(state, layout, b, column, slot, bits): of the F * D elements of row b, column + k lies at
    around(slot + k, layout), with the sign of bit k. begin(state) makes the state that it gets, once in a
    thread, so that numbers that lie on the device are not read for each element. A thread block hashes a tile
    of pieces into shared memory, and then shares out their elements.
    """

    @cuda.jit(cache=True)
    @of(visit)
    def walk(ids, base, layout, count, shift, state):
        slots = cuda.shared.array(TILE, np.uint64)
        signs = cuda.shared.array(TILE, np.uint64)
        rows = cuda.shared.array(TILE, np.uint32)
        columns = cuda.shared.array(TILE, np.uint32)
        thread, threads, kept = U32(cuda.threadIdx.x), U32(cuda.blockDim.x), begin(state)
        first = U32(cuda.blockIdx.x * TILE)
        while first < count:
            here = min(U32(TILE), U32(count - first))
            p = thread
            while p < here:
                slots[p], signs[p], rows[p], f, element = piece_at(U32(first + p), ids, base, layout, shift)
                columns[p] = f * U32(layout.width) + element
                p = U32(p + threads)
            cuda.syncthreads()
            e = U32(together * thread)
            while e < here << shift:
                p = U32(e >> shift)
                k = U32(e - (p << shift))
                visit(kept, layout, rows[p], U32(columns[p] + k), slots[p] + k, signs[p] >> k)
                e = U32(e + together * threads)
            cuda.syncthreads()  # the next tile takes the same memory
            first = U32(first + cuda.gridDim.x * TILE)

    return walk


def walk_pieces(kernel, ids, base, slot_map, state) -> None:
    """Run a kernel of `pieces`."""
    count, shift = count_pieces(slot_map, ids)
    shape = block_shape(-(-count // TILE))
    launch(kernel, (count,), ids, base, slot_map, U32(count), shift, state, shape=shape)


# In the simulator `cuda` stands for it in the module of a kernel only, so visitors call these.


@register_jitable
def add(array, slot, value):
    """Add atomically, on a GPU."""
    cuda.atomic.add(array, slot, value)


@register_jitable
def take(array, slot):
    """Exchange array[slot], of integers, with 0 on a GPU: of all threads that try, one gets what it held."""
    return cuda.atomic.exch(array, slot, 0)
