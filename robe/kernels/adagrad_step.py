"""Step of Adagrad on shared weights: each slot that a batch touches once, by the sum of its gradients.

    accumulator[slot] += gradient[slot]^2
    out[slot] -= rate * gradient[slot] / (sqrt(accumulator[slot]) + eps)
    gradient[slot] = 0

    ids, base, slot_map                  which slots: those that a batch touches, as in scatter_add.py
    rate, eps                            as in adagrad.py
    gradient    (M,) float               sums of the batch, made by scatter_add; all 0 afterwards
    accumulator (M,) float, out (M,)     state and weights, stepped in place

Adagrad needs the whole gradient of a slot before it steps, so it is a second walk over the batch: scatter_add
sums into `gradient`, and this walk steps each slot that it meets and clears its gradient. A slot that is met
again finds a gradient of 0 and stays. Slots that no row of the batch touches are never read.

Versions: in `cpu` each thread owns a range of the array, as in scatter_add.py. `reference` and `cuda_sweep`
step the whole array, which is the same since a gradient of 0 changes nothing, but costs as much as the array
is large. In `cuda` each thread exchanges the gradient of its slot with 0, atomically: of all threads that
meet a slot exactly one gets its gradient and steps it. The order of steps does not matter, so scatter_add
alone decides whether training repeats.
"""

from numba.extending import register_jitable

from robe.kernels.adagrad import adagrad_cuda, adagrad_reference, step_weight
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.lanes import adagrad_span
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.pieces import around
from robe.kernels.parts.walks import pieces, spans, take, walk_pieces, walk_spans


def adagrad_step_cost(ids, base, slot_map, rate, eps, gradient, accumulator, out) -> Cost:
    """When no slot repeats: gradient, accumulator and weight read and written."""
    elements = ids.size * int(slot_map.width)
    return Cost(ids.nbytes + 6 * elements * out.itemsize, 7 * elements)


def adagrad_step_reference(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    adagrad_reference(gradient, rate, eps, accumulator, out)
    gradient[...] = 0


@register_jitable(forceinline=True)
def _step(state, b, element, slot, length, bits):
    gradient, rate, eps, accumulator, out = state
    adagrad_span(gradient, rate, eps, accumulator, out, slot, length)


_adagrad_step = spans(_step)


def adagrad_step_cpu(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    number = out.dtype.type
    state = (gradient, number(rate), number(eps), accumulator, out)
    walk_spans(_adagrad_step, ids, base, slot_map, gradient, state)


def adagrad_step_cuda_sweep(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    adagrad_cuda(gradient, rate, eps, accumulator, out)
    gradient[...] = 0


@register_jitable
def _begin(state):
    gradient, rate, eps, accumulator, out = state
    return gradient, value_of(rate), eps, accumulator, out


@register_jitable
def _step_piece(state, slot_map, b, column, slot, bits):
    gradient, rate, eps, accumulator, out = state
    slot = around(slot, slot_map)
    taken = take(gradient, slot).view(out.dtype)
    if taken != 0:
        step_weight(slot, taken, rate, eps, accumulator, out)


_adagrad_step_kernel = pieces(_step_piece, _begin)


def adagrad_step_cuda(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    numbers = typed(rate, out.dtype), out.dtype.type(eps)
    # Numba exchanges integers only, so the kernel sees the gradient's bits.
    state = (gradient.view(f"u{gradient.itemsize}"), *numbers, accumulator, out)
    walk_pieces(_adagrad_step_kernel, ids, base, slot_map, state)
