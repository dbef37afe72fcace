"""Step of the optimizer on shared weights in half precision: each touched slot once, rounded at random.

    out[slot] = rounded(out[slot] - step)       in float32, then as half.py says
    step = rate * gradient[slot]                                                    SGD
    accumulator[slot] += gradient[slot]^2
    step = rate * gradient[slot] / (sqrt(accumulator[slot]) + eps)                  Adagrad

    ids, base, slot_map    which slots: those that a batch touches, as in scatter_add.py
    rate, eps              as in adagrad.py
    key                    rounding_key(seed, step) of half.py
    gradient    (M,) float32   sums of the batch, made by scatter_add; all 0 afterwards
    accumulator (M,) float32   sum of squared gradients, or (0,): the step is that of SGD
    out         (M,) float16   stepped in place

Halves cannot take the gradients of a batch one by one, as scatter_add does for float32: each would be
rounded. So they are summed first, and the gradient of a slot is cleared with its step. Met again, or not
touched at all, a slot has the gradient 0, which changes nothing: a half is rounded to itself.

Versions: `reference` steps the whole array. In `cpu` each thread owns a range of it, and `cuda` exchanges the
gradient of each slot it meets with 0, both as in adagrad_scatter.py. In which order slots are stepped does
not matter, so from the same gradient all come to the same bits (on a GPU but for a product that is fused with
a sum, which may move a float32 by an ulp); scatter_add alone decides whether training repeats.
"""

import math

import numpy as np
from numba import cuda, get_num_threads, njit, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.half import from_half, random_bits, to_half, words
from robe.kernels.parts.hashing import U64
from robe.kernels.parts.launch import block_shape, launch
from robe.kernels.parts.pieces import TILE, U32, around, count_pieces, piece_at
from robe.kernels.parts.spans import find_runs, most_runs, own_runs, room_for_runs


def half_step_cost(ids, base, slot_map, rate, eps, key, gradient, accumulator, out) -> Cost:
    """When no slot repeats: gradient, weight and accumulator read and written; a conversion counts as one."""
    elements, adagrad = ids.size * int(slot_map.width), accumulator.size > 0
    return Cost(ids.nbytes + elements * (12 + 8 * adagrad), elements * (4 + 5 * adagrad))


def half_step_reference(ids, base, slot_map, rate, eps, key, gradient, accumulator, out):
    step = np.float32(rate) * gradient
    if accumulator.size:
        accumulator += gradient * gradient
        step /= accumulator**0.5 + np.float32(eps)
    out.view(np.uint16)[...] = to_half(out.astype(np.float32) - step, random_bits(key, np.arange(out.size)))
    gradient[...] = 0


@register_jitable
def stepped(weight, step, key, slot):
    return to_half(from_half(weight) - step, random_bits(key, slot))


# Division in NumPy's way does not look for 0, and no branch passes over gradients of 0: so the innermost loop
# becomes vector code, which is two to four times as fast.
@njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _half_step(ids, base, slot_map, rate, eps, key, most, owners, gradient, accumulator, out):
    rows = ids.shape[0]
    runs, counts = room_for_runs(rows, most)
    for chunk in range(0, rows, len(runs)):
        size = min(len(runs), rows - chunk)
        for k in prange(size):
            counts[k] = find_runs(ids[chunk + k], base, slot_map, runs[k])
        for owner in prange(owners):
            low, high = np.uint64(owner * out.size // owners), np.uint64((owner + 1) * out.size // owners)
            mine = np.empty(most, np.int64)
            for k in range(size):
                for r in range(own_runs(runs[k], counts[k], low, high, gradient, mine)):
                    first, length = runs[k, mine[r], 0], runs[k, mine[r], 1]
                    for slot in range(max(first, low), min(first + length, high)):
                        step = rate * gradient[slot]
                        if accumulator.size > 0:
                            accumulator[slot] += gradient[slot] * gradient[slot]
                            step /= math.sqrt(accumulator[slot]) + eps
                        out[slot] = stepped(out[slot], step, key, slot)
                        gradient[slot] = 0


def half_step_cpu(ids, base, slot_map, rate, eps, key, gradient, accumulator, out):
    number, most = np.float32, most_runs(slot_map) * ids.shape[1]
    _half_step(
        *(ids, base, slot_map, number(rate), number(eps), key, most, get_num_threads()),
        *(gradient, accumulator, words(out)),
    )


@cuda.jit
def _half_step_kernel(ids, base, slot_map, pieces, shift, rate, eps, key, gradient, accumulator, out):
    slots = cuda.shared.array(TILE, np.uint64)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    first = U32(cuda.blockIdx.x * TILE)
    while first < pieces:
        count = min(U32(TILE), U32(pieces - first))
        p = thread
        while p < count:
            slots[p], _, _, _, _ = piece_at(U32(first + p), ids, base, slot_map, shift)
            p = U32(p + threads)
        cuda.syncthreads()
        e = thread
        while e < count << shift:
            p = U32(e >> shift)
            slot = around(slots[p] + U64(e - (p << shift)), out.size)
            taken = cuda.atomic.exch(gradient, slot, 0).view(np.float32)
            if taken != 0:
                step = rate * taken
                if accumulator.size > 0:
                    accumulator[slot] += taken * taken
                    step /= math.sqrt(accumulator[slot]) + eps
                out[slot] = stepped(out[slot], step, key, slot)
            e = U32(e + threads)
        cuda.syncthreads()  # the next tile takes the same place
        first = U32(first + cuda.gridDim.x * TILE)


def half_step_cuda(ids, base, slot_map, rate, eps, key, gradient, accumulator, out):
    pieces, shift = count_pieces(slot_map, ids)
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    state = (np.float32(rate), np.float32(eps), key, gradient.view("uint32"), accumulator, words(out))
    shape = block_shape(-(-pieces // TILE))
    launch(_half_step_kernel, (pieces,), ids, base, slot_map, U32(pieces), shift, *state, shape=shape)
