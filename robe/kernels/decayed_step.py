"""Step of SGD or Adagrad on shared weights, with L2 penalty and weight decay: each touched slot once.

    g = gradient[slot] + l2 * out[slot]
    accumulator[slot] += g^2                                                    Adagrad
    out[slot] -= rate * (decay * out[slot] + g / (sqrt(accumulator[slot]) + eps))    or + g of SGD
    gradient[slot] = 0

    ids, base, slot_map                  which slots: those that a batch touches, as in scatter_add.py
    rate, eps                            as in adagrad.py
    l2, decay                            L2 penalty, and decoupled weight decay (Loshchilov and Hutter, 2019)
    gradient    (M,) float               sums of the batch, made by scatter_add; all 0 afterwards
    accumulator (M,) float               sum of squares, or (0,): the step is that of SGD
    out         (M,) float               stepped in place

Weights that no row of the batch reads, whose gradient is 0, keep their size: a rare id is not forgotten for
being rare, and a step costs what the batch touches. Frameworks that add the norm of all weights to the loss
shrink these too, so their l2 is smaller by about the share of steps that touch a weight.

Versions: as in adagrad_step.py.
"""

import math

import numpy as np
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.pieces import around
from robe.kernels.parts.walks import pieces, spans, take, walk_pieces, walk_spans


def decayed_step_cost(ids, base, slot_map, rate, eps, l2, decay, gradient, accumulator, out) -> Cost:
    """When no slot repeats: gradient, weight and accumulator read and written."""
    elements, adagrad = ids.size * int(slot_map.width), accumulator.size > 0
    return Cost(ids.nbytes + elements * (4 + 2 * adagrad) * out.itemsize, elements * (6 + 5 * adagrad))


def decayed_step_reference(ids, base, slot_map, rate, eps, l2, decay, gradient, accumulator, out):
    number, touched = out.dtype.type, np.flatnonzero(gradient)
    weights = out[touched]
    g = step = gradient[touched] + number(l2) * weights
    if accumulator.size:
        accumulator[touched] += g * g
        step = g / (accumulator[touched] ** 0.5 + number(eps))
    out[touched] -= number(rate) * (number(decay) * weights + step)
    gradient[...] = 0


@register_jitable(forceinline=True)
def _step(state, b, element, slot, length, bits):
    # As half_step.py says: without branches, and functions that take arrays, this becomes vector code.
    gradient, rate, eps, l2, decay, accumulator, out = state
    for i in range(slot, slot + length):
        used, w = gradient[i] != 0, out[i]
        g = step = gradient[i] + l2 * w
        if accumulator.size > 0:
            total = accumulator[i] + g * g
            step = g / (math.sqrt(total) + eps)
            accumulator[i] = total if used else accumulator[i]
        out[i] = w - rate * (decay * w + step) if used else w
        gradient[i] = 0


_decayed_step = spans(_step)


def decayed_step_cpu(ids, base, slot_map, rate, eps, l2, decay, gradient, accumulator, out):
    numbers = map(out.dtype.type, (rate, eps, l2, decay))
    walk_spans(_decayed_step, ids, base, slot_map, gradient, (gradient, *numbers, accumulator, out))


@register_jitable
def _begin(state):
    gradient, rate, eps, l2, decay, accumulator, out = state
    return gradient, value_of(rate), eps, l2, decay, accumulator, out


@register_jitable
def _step_piece(state, slot_map, b, column, slot, bits):
    gradient, rate, eps, l2, decay, accumulator, out = state
    slot = around(slot, slot_map)
    taken = take(gradient, slot).view(out.dtype)
    if taken != 0:
        w = out[slot]
        step = taken + l2 * w
        if accumulator.size > 0:
            accumulator[slot] += step * step
            step /= math.sqrt(accumulator[slot]) + eps
        out[slot] = w - rate * (decay * w + step)


_decayed_step_kernel = pieces(_step_piece, _begin)


def decayed_step_cuda(ids, base, slot_map, rate, eps, l2, decay, gradient, accumulator, out):
    numbers = typed(rate, out.dtype), *map(out.dtype.type, (eps, l2, decay))
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    state = (gradient.view(f"u{gradient.itemsize}"), *numbers, accumulator, out)
    walk_pieces(_decayed_step_kernel, ids, base, slot_map, state)
