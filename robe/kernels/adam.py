"""Step of Adam (Kingma and Ba, 2015), of all parameters or of the slots that a batch touches, in place:

    g = gradient + l2 * out
    mean = beta1 * mean + (1 - beta1) * g;   square = beta2 * square + (1 - beta2) * g^2
    out -= rate * (decay * out + first * mean / (second * sqrt(square) + eps))

    gradient, mean, square, out (N,) float: mean and square are the moments, running means of g and of g^2
    rate                       the learning rate
    first, second              1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) in step t = 1, 2, ...
    beta1, beta2, eps          eps: keeps 0 / 0 away
    l2, decay                  of adam_step: L2 penalty, and decoupled weight decay (AdamW's)
    ids, base, slot_map        of adam_step: which slots a batch touches, as in scatter_add.py

`adam` steps all parameters, as torch.optim.Adam does. `adam_step` is lazy: it steps the slots whose gradient
is not 0, once each, and clears their gradients; moments and weights of all others stay as they are. That is
torch.optim.SparseAdam, but for L2 and decay, which it has not.

Versions: in `cpu` each thread owns a range of the array, and in `cuda` exactly one of the threads that meet a
slot gets its gradient, both as in adagrad_step.py.
"""

import math

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.pieces import around
from robe.kernels.parts.walks import pieces, spans, take, walk_pieces, walk_spans


def adam_cost(gradient, rate, first, second, beta1, beta2, eps, mean, square, out) -> Cost:
    """Gradient read, moments and parameter read and written; root and division count as one each."""
    return Cost(7 * out.nbytes, 14 * out.size)


def adam_reference(gradient, rate, first, second, beta1, beta2, eps, mean, square, out):
    number = out.dtype.type
    mean[...] = number(beta1) * mean + number(1 - beta1) * gradient
    square[...] = number(beta2) * square + number(1 - beta2) * gradient * gradient
    root = number(second) * square**0.5 + number(eps)
    out -= number(rate) * (number(first) * mean / root)


@register_jitable
def moments(g, m, v, keep1, new1, keep2, new2):
    """The moments after a gradient g, of which so much is kept and so much new."""
    return keep1 * m + new1 * g, keep2 * v + new2 * g * g


@register_jitable
def descent(m, v, first, second, eps):
    """What is taken from a weight, by the rate."""
    return first * m / (second * math.sqrt(v) + eps)


def _shares(number, beta1, beta2):
    return number(beta1), number(1 - beta1), number(beta2), number(1 - beta2)


@parallel()
def _adam(gradient, rate, first, second, keep1, new1, keep2, new2, eps, mean, square, out):
    for i in prange(out.size):
        m, v = moments(gradient[i], mean[i], square[i], keep1, new1, keep2, new2)
        mean[i], square[i] = m, v
        out[i] -= rate * descent(m, v, first, second, eps)


def adam_cpu(gradient, rate, first, second, beta1, beta2, eps, mean, square, out):
    number = out.dtype.type
    numbers = number(rate), number(first), number(second), *_shares(number, beta1, beta2), number(eps)
    _adam(gradient, *numbers, mean, square, out)


@cuda.jit(cache=True)
def _adam_kernel(gradient, rate, first, second, keep1, new1, keep2, new2, eps, mean, square, out):
    i = np.uint64(cuda.grid(1))  # unsigned: see sgd.py
    rate, first, second = value_of(rate), value_of(first), value_of(second)
    while i < np.uint64(out.size):
        m, v = moments(gradient[i], mean[i], square[i], keep1, new1, keep2, new2)
        mean[i], square[i] = m, v
        out[i] -= rate * descent(m, v, first, second, eps)
        i += np.uint64(cuda.gridsize(1))


def adam_cuda(gradient, rate, first, second, beta1, beta2, eps, mean, square, out):
    number = out.dtype.type
    changing = (typed(each, out.dtype) for each in (rate, first, second))
    numbers = *changing, *_shares(number, beta1, beta2), number(eps)
    launch(_adam_kernel, out.shape, gradient, *numbers, mean, square, out)


def adam_step_cost(
    ids, base, slot_map, rate, first, second, beta1, beta2, eps, l2, decay, gradient, mean, square, out
) -> Cost:
    """When no slot repeats: gradient, moments and weight read and written."""
    elements = ids.size * int(slot_map.width)
    return Cost(ids.nbytes + 8 * elements * out.itemsize, 18 * elements)


def adam_step_reference(
    ids, base, slot_map, rate, first, second, beta1, beta2, eps, l2, decay, gradient, mean, square, out
):
    number, touched = out.dtype.type, np.flatnonzero(gradient)
    m, v, weights = mean[touched], square[touched], out[touched]
    g, left = gradient[touched] + number(l2) * weights, weights - number(rate * decay) * weights
    adam_reference(g, rate, first, second, beta1, beta2, eps, m, v, left)
    mean[touched], square[touched], out[touched] = m, v, left
    gradient[...] = 0


@register_jitable(forceinline=True)
def _step(state, b, element, slot, length, bits):
    # As half_step.py says: without branches, and functions that take arrays, this becomes vector code.
    gradient, rate, first, second, keep1, new1, keep2, new2, eps, l2, decay, mean, square, out = state
    for i in range(slot, slot + length):
        g, m, v, w = gradient[i], mean[i], square[i], out[i]
        new_m, new_v = moments(g + l2 * w, m, v, keep1, new1, keep2, new2)
        new_w = w - rate * (decay * w + descent(new_m, new_v, first, second, eps))
        mean[i] = new_m if g != 0 else m
        square[i] = new_v if g != 0 else v
        out[i] = new_w if g != 0 else w
        gradient[i] = 0


_adam_step = spans(_step)


def adam_step_cpu(
    ids, base, slot_map, rate, first, second, beta1, beta2, eps, l2, decay, gradient, mean, square, out
):
    number = out.dtype.type
    numbers = number(rate), number(first), number(second), *_shares(number, beta1, beta2)
    numbers = *numbers, *map(number, (eps, l2, decay))
    state = gradient, *numbers, mean, square, out
    walk_spans(_adam_step, ids, base, slot_map, gradient, state)


@register_jitable
def _begin(state):
    gradient, rate, first, second, keep1, new1, keep2, new2, eps, l2, decay, mean, square, out = state
    rate, first, second = value_of(rate), value_of(first), value_of(second)
    return gradient, rate, first, second, keep1, new1, keep2, new2, eps, l2, decay, mean, square, out


@register_jitable
def _step_piece(state, slot_map, b, column, slot, bits):
    gradient, rate, first, second, keep1, new1, keep2, new2, eps, l2, decay, mean, square, out = state
    slot = around(slot, slot_map)
    taken = take(gradient, slot).view(out.dtype)
    if taken != 0:
        w = out[slot]
        m, v = moments(taken + l2 * w, mean[slot], square[slot], keep1, new1, keep2, new2)
        mean[slot], square[slot] = m, v
        out[slot] = w - rate * (decay * w + descent(m, v, first, second, eps))


_adam_step_kernel = pieces(_step_piece, _begin)


def adam_step_cuda(
    ids, base, slot_map, rate, first, second, beta1, beta2, eps, l2, decay, gradient, mean, square, out
):
    number = out.dtype.type
    changing = (typed(each, out.dtype) for each in (rate, first, second))
    numbers = *changing, *_shares(number, beta1, beta2), *map(number, (eps, l2, decay))
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    state = (gradient.view(f"u{gradient.itemsize}"), *numbers, mean, square, out)
    walk_pieces(_adam_step_kernel, ids, base, slot_map, state)
