"""Step of SGD with momentum (Polyak, 1964), of all parameters or of the slots that a batch touches, in place:

    velocity = momentum * velocity + gradient + l2 * out
    out -= rate * (decay * out + velocity)

    gradient, velocity, out (N,) float
    rate                       the learning rate
    momentum                   how much of the velocity stays in a step
    l2, decay                  of momentum_step: L2 penalty, and decoupled weight decay (AdamW's)
    ids, base, slot_map        of momentum_step: which slots a batch touches, as in scatter_add.py

`momentum` steps all parameters, as torch.optim.SGD does (without dampening, not Nesterov's). `momentum_step`
is lazy: it steps the slots whose gradient is not 0, once each, and clears their gradients; velocities and
weights of all others stay as they are.

Versions: in `cpu` each thread owns a range of the array, and in `cuda` exactly one of the threads that meet a
slot gets its gradient, both as in adagrad_step.py.
"""

import numpy as np
from numba import cuda, prange
from numba.extending import register_jitable

from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.pieces import around
from robe.kernels.parts.walks import pieces, spans, take, walk_pieces, walk_spans


def momentum_cost(gradient, rate, momentum, velocity, out) -> Cost:
    """Gradient read, velocity and parameter read and written."""
    return Cost(5 * out.nbytes, 4 * out.size)


def momentum_reference(gradient, rate, momentum, velocity, out):
    number = out.dtype.type
    velocity[...] = number(momentum) * velocity + gradient
    out -= number(rate) * velocity


@parallel()
def _momentum(gradient, rate, momentum, velocity, out):
    for i in prange(out.size):
        v = momentum * velocity[i] + gradient[i]
        velocity[i] = v
        out[i] -= rate * v


def momentum_cpu(gradient, rate, momentum, velocity, out):
    number = out.dtype.type
    _momentum(gradient, number(rate), number(momentum), velocity, out)


@cuda.jit(cache=True)
def _momentum_kernel(gradient, rate, momentum, velocity, out):
    i = np.uint64(cuda.grid(1))  # unsigned: see sgd.py
    rate = value_of(rate)
    while i < np.uint64(out.size):
        v = momentum * velocity[i] + gradient[i]
        velocity[i] = v
        out[i] -= rate * v
        i += np.uint64(cuda.gridsize(1))


def momentum_cuda(gradient, rate, momentum, velocity, out):
    numbers = typed(rate, out.dtype), out.dtype.type(momentum)
    launch(_momentum_kernel, out.shape, gradient, *numbers, velocity, out)


def momentum_step_cost(ids, base, slot_map, rate, momentum, l2, decay, gradient, velocity, out) -> Cost:
    """When no slot repeats: gradient, velocity and weight read and written."""
    elements = ids.size * int(slot_map.width)
    return Cost(ids.nbytes + 6 * elements * out.itemsize, 8 * elements)


def momentum_step_reference(ids, base, slot_map, rate, momentum, l2, decay, gradient, velocity, out):
    number, touched = out.dtype.type, np.flatnonzero(gradient)
    v, weights = velocity[touched], out[touched]
    g, left = gradient[touched] + number(l2) * weights, weights - number(rate * decay) * weights
    momentum_reference(g, rate, momentum, v, left)
    velocity[touched], out[touched] = v, left
    gradient[...] = 0


@register_jitable(forceinline=True)
def _step(state, b, element, slot, length, bits):
    # As half_step.py says: without branches, and functions that take arrays, this becomes vector code.
    gradient, rate, momentum, l2, decay, velocity, out = state
    for i in range(slot, slot + length):
        g, v, w = gradient[i], velocity[i], out[i]
        new_v = momentum * v + (g + l2 * w)
        new_w = w - rate * (decay * w + new_v)
        velocity[i] = new_v if g != 0 else v
        out[i] = new_w if g != 0 else w
        gradient[i] = 0


_momentum_step = spans(_step)


def momentum_step_cpu(ids, base, slot_map, rate, momentum, l2, decay, gradient, velocity, out):
    numbers = map(out.dtype.type, (rate, momentum, l2, decay))
    walk_spans(_momentum_step, ids, base, slot_map, gradient, (gradient, *numbers, velocity, out))


@register_jitable
def _begin(state):
    gradient, rate, momentum, l2, decay, velocity, out = state
    return gradient, value_of(rate), momentum, l2, decay, velocity, out


@register_jitable
def _step_piece(state, slot_map, b, column, slot, bits):
    gradient, rate, momentum, l2, decay, velocity, out = state
    slot = around(slot, slot_map)
    taken = take(gradient, slot).view(out.dtype)
    if taken != 0:
        w = out[slot]
        v = momentum * velocity[slot] + (taken + l2 * w)
        velocity[slot] = v
        out[slot] = w - rate * (decay * w + v)


_momentum_step_kernel = pieces(_step_piece, _begin)


def momentum_step_cuda(ids, base, slot_map, rate, momentum, l2, decay, gradient, velocity, out):
    numbers = typed(rate, out.dtype), *map(out.dtype.type, (momentum, l2, decay))
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    state = (gradient.view(f"u{gradient.itemsize}"), *numbers, velocity, out)
    walk_pieces(_momentum_step_kernel, ids, base, slot_map, state)
