"""Step of row-wise Adagrad on shared weights: each group that a batch touches once, by the sums of gradients.

    accumulator[group] += mean over the group of gradient^2
    out[slot] -= rate * gradient[slot] / (sqrt(accumulator[group]) + eps)
    gradient[slot] = 0

    ids, base, slot_map                  which slots: those that a batch touches, as in scatter_add.py
    rate, eps                            as in adagrad.py
    gradient    (M,) float               sums of the batch, made by scatter_add; all 0 afterwards
    accumulator (R,) float, out (M,)     state and weights, stepped in place

A group is a row of a table, as in FBGEMM's exact row-wise Adagrad, or GROUP weights of a ROBE array
(groups.py), of which none is read alone: the last one counts as full. A group whose gradients are all 0 is
not changed, so a group may be stepped that no row of the batch touches.

Versions: in `cpu` each row of the batch lists its groups, and a thread steps one group after the other of
those that are listed for the first time. `reference` steps all groups. `cuda` lists the groups of the batch
as code_step.py does, and has a warp step one after the other, in whatever order.
"""

import math

import numpy as np
from numba import cuda, njit, prange

from robe.kernels.code_step import list_groups
from robe.kernels.parts.codes import TEAM, U32, team_shape
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import group_length
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel
from robe.kernels.quantise_touched import GROUPS, touched_groups


def rowwise_step_cost(ids, base, slot_map, rate, eps, gradient, accumulator, out) -> Cost:
    """When no group repeats, and rows fill their groups: gradient and weight read and written, and state."""
    elements = ids.size * int(slot_map.width)
    state = 2 * elements // int(group_length(slot_map))
    return Cost(ids.nbytes + (4 * elements + state) * out.itemsize, 4 * elements)


def rowwise_step_reference(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    number, size = out.dtype.type, int(group_length(slot_map))
    groups = np.pad(gradient, (0, -gradient.size % size)).reshape(-1, size)
    accumulator += (groups * groups).sum(axis=1) / number(size)
    factor = number(rate) / (accumulator**0.5 + number(eps))
    out -= np.repeat(factor, size)[: out.size] * gradient
    gradient[...] = 0


@njit(nogil=True, cache=True)
def _once(listed, counts, met, groups):
    """Write each group that rows have listed to `groups` once; returns how many there are."""
    n = 0
    for b in range(listed.shape[0]):
        for i in range(counts[b]):
            group = listed[b, i]
            if met[group] == 0:
                met[group], groups[n] = 1, group
                n += 1
    return n


@parallel()
def _step_groups(groups, size, rate, eps, gradient, accumulator, out):
    for n in prange(groups.size):
        group = np.int64(groups[n])
        last = min((group + 1) * size, out.size)
        pulls, weights = gradient[group * size : last], out[group * size : last]
        total = pulls[0] * pulls[0]
        for i in range(1, pulls.size):
            total += pulls[i] * pulls[i]
        accumulator[group] += total / accumulator.dtype.type(size)
        factor = rate / (math.sqrt(accumulator[group]) + eps)
        for i in range(pulls.size):
            weights[i] -= factor * pulls[i]
            pulls[i] = 0


def rowwise_step_cpu(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    number, size = out.dtype.type, int(group_length(slot_map))
    listed, counts = touched_groups(ids, base, slot_map, size)
    groups = np.empty(min(listed.size, accumulator.size), np.uint32)
    # Pages of zeros take no memory before they are written to.
    found = _once(listed, counts, np.zeros(accumulator.size, np.uint8), groups)
    _step_groups(groups[:found], size, number(rate), number(eps), gradient, accumulator, out)


@cuda.jit(cache=True)
def _rowwise_step_kernel(listed, counted, size, rate, eps, gradient, accumulator, out):
    squares = cuda.shared.array(TEAM, np.float32)
    thread, threads = U32(cuda.threadIdx.x), U32(cuda.blockDim.x)
    rate, n, count = value_of(rate), U32(cuda.blockIdx.x), counted[0]
    while n < count:
        group = listed[n]
        first = np.uint64(group) * np.uint64(size)
        length = U32(min(np.uint64(size), np.uint64(out.size) - first))
        square, i = np.float32(0), thread
        while i < length:
            taken = gradient[first + i]
            square += taken * taken
            i = U32(i + threads)
        squares[thread] = square
        cuda.syncthreads()
        total = np.float32(0)
        for t in range(threads):
            total += squares[t]
        total = accumulator[group] + total / np.float32(size)
        cuda.syncthreads()  # all have read the accumulator, and the sums
        if thread == 0:
            accumulator[group] = total
        factor, i = rate / (math.sqrt(total) + eps), thread
        while i < length:
            out[first + i] -= factor * gradient[first + i]
            gradient[first + i] = 0
            i = U32(i + threads)
        n = U32(n + cuda.gridDim.x)


def rowwise_step_cuda(ids, base, slot_map, rate, eps, gradient, accumulator, out):
    groups = accumulator.size
    listed, counted, count = list_groups(out, groups, ids, base, slot_map)
    numbers = U32(group_length(slot_map)), typed(rate, out.dtype), out.dtype.type(eps)
    shape = team_shape(min(groups, GROUPS * count))
    arrays = gradient, accumulator, out
    launch(_rowwise_step_kernel, (count,), listed, counted, *numbers, *arrays, shape=shape)
