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

The gradients of a batch cannot be added to halves one by one, as scatter_add adds them to float32: each sum
would be rounded. So they are summed first, and the step of a slot clears its gradient. A slot that the batch
names twice, or not at all, meets the gradient 0, which changes nothing: a half is rounded to itself.

Versions: `reference` steps the whole array. In `cpu` each thread owns a range of it, and `cuda` exchanges the
gradient of each slot it meets with 0, both as in adagrad_step.py. The order in which
slots are stepped does not matter, so from the same gradient all versions compute the same bits (except that a
GPU may fuse a product with a sum, which may change a float32 by an ulp). Training is reproducible if
scatter_add is.
"""

import math

import numpy as np
from numba.extending import register_jitable

from robe.kernels.adagrad import descent
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.half import from_half, random_bits, to_half, words
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.pieces import around
from robe.kernels.parts.walks import pieces, spans, take, walk_pieces, walk_spans


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


@register_jitable(forceinline=True)
def _step(state, b, element, slot, length, bits):
    # This loop becomes vector code, two to four times as fast, if no branch passes over gradients of 0
    # and no function takes the arrays: with `descent` in it, the whole step took 1.4 to 1.8 times as long.
    gradient, rate, eps, key, accumulator, out = state
    for i in range(slot, slot + length):
        step = rate * gradient[i]
        if accumulator.size > 0:
            accumulator[i] += gradient[i] * gradient[i]
            step /= math.sqrt(accumulator[i]) + eps
        out[i] = stepped(out[i], step, key, i)
        gradient[i] = 0


_half_step = spans(_step)


def half_step_cpu(ids, base, slot_map, rate, eps, key, gradient, accumulator, out):
    state = (gradient, np.float32(rate), np.float32(eps), key, accumulator, words(out))
    walk_spans(_half_step, ids, base, slot_map, gradient, state)


@register_jitable
def _begin(state):
    gradient, rate, eps, key, accumulator, out = state
    return gradient, value_of(rate), eps, value_of(key), accumulator, out


@register_jitable
def _step_piece(state, slot_map, b, column, slot, bits):
    gradient, rate, eps, key, accumulator, out = state
    slot = around(slot, slot_map)
    taken = take(gradient, slot).view(np.float32)
    if taken != 0:
        step = descent(slot, taken, rate, eps, accumulator) if accumulator.size > 0 else rate * taken
        out[slot] = stepped(out[slot], step, key, slot)


_half_step_kernel = pieces(_step_piece, _begin)


def half_step_cuda(ids, base, slot_map, rate, eps, key, gradient, accumulator, out):
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    numbers = typed(rate, gradient.dtype), np.float32(eps), key
    state = (gradient.view("uint32"), *numbers, accumulator, words(out))
    walk_pieces(_half_step_kernel, ids, base, slot_map, state)
