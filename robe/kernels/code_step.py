"""Step of the optimizer on weights of which codes alone are kept: touched groups are rounded at random.

    g = sum of the gradients of the batch that fall into the group, in the order of the batch
    x = what its codes stand for - rate * g                                                SGD
    a <- a + mean of g^2;  x = what its codes stand for - rate / (sqrt(a) + eps) * g       Adagrad, by group
    the group = codes of x, rounded up or down

    d_vectors (B, F, D) float32   gradient of the loss by the vectors; may be a strided view
    ids, base, slot_map           where their weights lie, as in scatter_add.py
    rate, eps                     as in adagrad.py
    key                           rounding_key(seed, step) of half.py
    form                          of the groups (groups.py), in 8 bits or 4; not stochastic: to the nearest
    accumulator (R,) float32      one number a group, or (0,): the step is that of SGD
    memory      (R, S) uint8      stepped in place

Scale and bias of a group stay as long as its stepped weights lie between its outer levels, and take more than
SHARE of the way between these. A weight is then its code less its step in units of the scale, and a step of
0 leaves the code as it is: nothing is lost or moved by being stored again and again. Else scale and bias are
made anew (codes.py), for the range of the stepped weights and MARGIN of it at either side, and all weights
of the group are rounded on the new grid, each right on average. That adds noise of up to scale^2 / 4 to
each, so it should be rare. Without the margin it would not be: the outermost weight lies on the outer level
then, and every second step of it leads beyond.

A weight between two codes becomes the upper one if u < its distance from the lower one, u a hash of (key,
group, element) as in codes.py. So results do not depend on the number of threads, and training repeats and
resumes.

Versions: `reference` sums all gradients in an array as large as that of the weights. `cpu` lists the parts of
the batch's spans that lie in one group each, and sorts the list by group; a thread then sums one group, steps
it and goes on, so no sums of the array are kept, whatever its size. `cuda` adds up the gradients of the array
in float32, in scratch that it keeps, lists the groups of the batch, each by the first piece that sets a bit
for it, and has a warp step one after the other, in whatever order. `cuda_deterministic` adds gradients up as
scatter_add_cuda_deterministic does.
"""

import math

import numpy as np
from numba import cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.parts.codes import (
    LEAST,
    MOST,
    NO_ROW,
    NOTHING,
    ONE,
    TEAM,
    U16,
    U32,
    code_bytes,
    draw,
    levels_of,
    ordered,
    scale_and_bias,
    scale_at,
    store_half,
    team_shape,
    unordered,
)
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import expanded, group_length, group_of
from robe.kernels.parts.half import from_half
from robe.kernels.parts.hashing import LOW32, S32, TABLE, U64, ZERO, slots_reference
from robe.kernels.parts.hashing import ONE as ONE64
from robe.kernels.parts.lanes import add_span, require_rows_together
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel
from robe.kernels.parts.pieces import count_pieces, piece_at
from robe.kernels.parts.scratch import scratch, zeros
from robe.kernels.parts.spans import row_walk
from robe.kernels.quantise_touched import GROUPS, LISTED, note_groups
from robe.kernels.scatter_add import (
    scatter_add_cuda,
    scatter_add_cuda_deterministic,
    scatter_add_reference,
)
from robe.kernels.sort_rows import DIGIT, sort_pairs

SHARE = np.float32(0.6)
MARGIN = np.float32(1 / 13)  # in 4 bits it is one code at either side, in 8 bits 17
CHUNK = 32  # of the list, that a thread of the CPU does in turn
WORD, LAST_BIT = U32(5), U32(31)


def code_step_cost(d_vectors, ids, base, slot_map, rate, eps, key, form, accumulator, memory) -> Cost:
    """When no group repeats, and rows fill their groups: gradients read, codes read and written."""
    codes = d_vectors.size * memory.shape[1] // form.width
    sums = 8 * (d_vectors.size // form.width) * (accumulator.size > 0)
    return Cost(ids.nbytes + d_vectors.nbytes + 2 * codes + sums, 12 * d_vectors.size)


def code_step_reference(d_vectors, ids, base, slot_map, rate, eps, key, form, accumulator, memory):
    sums = np.zeros((len(memory), int(form.width)), np.float32)
    scatter_add_reference(d_vectors, ids, base, slot_map, 1, sums.reshape(-1))
    slots, _ = slots_reference(slot_map, base + ids.astype(np.uint64))
    groups = np.unique(slots // int(form.width))
    gradient, numbers, element = sums[groups], groups[:, None].astype(np.uint64), np.arange(form.width)
    x, codes = expanded(memory, groups, form), _codes_reference(memory[groups], form)
    factor = np.full((len(groups), 1), rate, np.float32)
    if accumulator.size:
        accumulator[groups] += (gradient * gradient).sum(1) / np.float32(form.width)
        factor /= np.sqrt(accumulator[groups, None]) + np.float32(eps)
    x -= factor * gradient
    draws = np.broadcast_to(draw(key, numbers, element.astype(np.uint64), form), x.shape)
    for n, group in enumerate(groups):
        before = ends_at(memory, group, form)
        ends = ends_after(before, x[n].min(), x[n].max(), form)
        scale, bias = from_half(ends[0]), from_half(ends[1])
        if ends == before:
            y = codes[n] - slope(factor[n, 0], scale) * gradient[n]
        else:
            y = (x[n] - bias) / divisor(scale)
        for i in element:
            codes[n, i] = rounded(y[i], draws[n, i], levels_of(form))
        for k in range(code_bytes(form)):
            memory[group, k] = packed(codes[n], k, form)
        store_ends_at(memory, group, ends, form)


def _codes_reference(groups, form):
    codes = groups[:, : code_bytes(form)]
    if form.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), 2 * codes.shape[1])
        codes = codes[:, : form.width]
    return codes.astype(np.float32)


@register_jitable
def code_at(memory, group, i, form):
    """The code of element i of a group in 8 bits or 4, as a float."""
    if form.bits == 8:
        return np.float32(memory[group, i])
    return np.float32(U32(memory[group, i >> 1]) >> U32(4 * (i & 1)) & U32(15))


@register_jitable
def packed(codes, k, form):
    """Byte k of the codes of a group, which are floats."""
    if form.bits == 8:
        return U32(codes[k])
    high = U32(codes[2 * k + 1]) if 2 * k + 1 < form.width else U32(0)
    return U32(U32(codes[2 * k]) | high << U32(4))


@register_jitable
def ends_at(memory, group, form):
    """(scale, bias) of a group, as bits of halves."""
    at = code_bytes(form)
    scale = U16(U32(memory[group, at]) | U32(memory[group, at + 1]) << U32(8))
    return scale, U16(U32(memory[group, at + 2]) | U32(memory[group, at + 3]) << U32(8))


@register_jitable
def store_ends_at(memory, group, ends, form):
    store_half(memory[group], code_bytes(form), ends[0])
    store_half(memory[group], code_bytes(form) + 2, ends[1])


@register_jitable
def ends_after(ends, low, high, form):
    """Scale and bias for a group of stepped weights from `low` to `high`, which had `ends` before."""
    levels, bias = levels_of(form), from_half(ends[1])
    way = np.float32(from_half(ends[0]) * levels)
    fits = low >= bias and high <= np.float32(bias + way)
    if fits and np.float32(high - low) >= np.float32(SHARE * way):
        return ends
    margin = np.float32(MARGIN * np.float32(high - low))
    return scale_and_bias(np.float32(low - margin), np.float32(high + margin), levels)


@register_jitable
def divisor(scale):
    """What differences are divided by; with a scale of 0 there is nothing to tell apart."""
    return scale if scale > NOTHING else ONE


@register_jitable
def slope(factor, scale):
    """How many codes a gradient of 1 moves a weight."""
    return np.float32(factor / divisor(scale))


@register_jitable
def rounded(y, u, levels):
    """A weight in units of the scale as a code, of floats: up with the chance of what is beyond the lower."""
    y = y if y > NOTHING else NOTHING  # NaN is not
    y = y if y < levels else levels
    below = np.float32(np.int32(y))
    return below + np.float32(u < np.float32(y - below))


@register_jitable(forceinline=True)
def _count_span(state, slot_map, count, slot, length, bits, element):
    first, _ = group_of(slot_map, slot)
    last, _ = group_of(slot_map, slot + length - ONE64)
    return count + np.int64(last - first) + 1


@register_jitable(forceinline=True)
def _list_span(state, slot_map, n, slot, length, bits, element):
    pairs, parts, first = state
    while length > ZERO:
        group, at = group_of(slot_map, slot)
        here = min(length, group_length(slot_map) - at)
        pairs[n, 0], pairs[n, 1] = group, n
        parts[n, 0], parts[n, 1], parts[n, 2] = at << S32 | here, bits, first + element
        slot, element, length, bits = slot + here, element + here, length - here, bits >> (here & U64(63))
        n += 1
    return n


_count_row, _list_row = row_walk(_count_span), row_walk(_list_span)


@parallel()
def _list_parts(ids, base, slot_map):
    """The parts of the spans of a batch that lie in one group each.

    Returns pairs (n, 2), the group of a part and its number, and parts (n, 3): its first element in the group
    and its length, 32 bits each; sign bits; the row b and the element of the F * D that it begins with, 32
    bits each.
    """
    rows, features = ids.shape
    starts = np.zeros(rows + 1, np.int64)
    for b in prange(rows):
        count = 0
        for f in range(features):
            count = _count_row(slot_map, base[f] + U64(ids[b, f]), 0, count)
        starts[b + 1] = count
    for b in range(rows):
        starts[b + 1] += starts[b]
    pairs, parts = np.empty((starts[rows], 2), np.uint32), np.empty((starts[rows], 3), np.uint64)
    for b in prange(rows):
        n = starts[b]
        for f in range(features):
            first = U64(b) << S32 | U64(f) * slot_map.width
            n = _list_row(slot_map, base[f] + U64(ids[b, f]), (pairs, parts, first), n)
    return pairs, parts


@njit(nogil=True, cache=True)
def _sort_parts(pairs, turns):
    return sort_pairs(pairs, turns)


# Division in NumPy's way does not look for 0, so loops become vector code.
@parallel()
def _step_groups(pairs, parts, d_vectors, rate, eps, key, form, accumulator, memory):
    count, size = len(pairs), form.width
    for chunk in prange((count + CHUNK - 1) // CHUNK):
        gradient, values = np.empty(size, np.float32), np.empty(size, np.float32)
        for p in range(chunk * CHUNK, min((chunk + 1) * CHUNK, count)):
            group = pairs[p, 0]
            if p > 0 and pairs[p - 1, 0] == group:
                continue
            gradient[:] = NOTHING
            end = p
            while end < count and pairs[end, 0] == group:
                part = parts[pairs[end, 1]]
                vectors, first = d_vectors[part[2] >> S32], part[2] & LOW32
                add_span(vectors, first, part[1], ONE, gradient, part[0] >> S32, part[0] & LOW32)
                end += 1
            factor = rate
            if accumulator.size > 0:
                total = NOTHING
                for i in range(size):
                    total += gradient[i] * gradient[i]
                accumulator[group] += total / np.float32(size)
                factor = rate / (np.float32(math.sqrt(accumulator[group])) + eps)
            _step_group(gradient, values, group, factor, key, form, memory)


@register_jitable
def _step_group(gradient, values, group, factor, key, form, memory):
    size, levels = form.width, levels_of(form)
    scale, bias = scale_at(memory, group, form)
    low, high = MOST, LEAST
    for i in range(size):
        values[i] = code_at(memory, group, i, form)
    for i in range(size):
        order = ordered(np.float32(bias + scale * values[i]) - factor * gradient[i])
        low, high = min(low, order), max(high, order)
    before = ends_at(memory, group, form)
    ends = ends_after(before, unordered(low), unordered(high), form)
    if ends == before:
        codes = slope(factor, scale)
        for i in range(size):
            values[i] -= codes * gradient[i]
    else:
        new_bias, step = from_half(ends[1]), divisor(from_half(ends[0]))
        for i in range(size):
            stepped = np.float32(bias + scale * values[i]) - factor * gradient[i]
            values[i] = np.float32(stepped - new_bias) / step
        store_ends_at(memory, group, ends, form)
    for i in range(size):
        values[i] = rounded(values[i], draw(key, group, i, form), levels)
    for k in range(code_bytes(form)):
        memory[group, k] = packed(values, k, form)


def code_step_cpu(d_vectors, ids, base, slot_map, rate, eps, key, form, accumulator, memory):
    require_rows_together(d_vectors)
    pairs, parts = _list_parts(ids, base, slot_map)
    pairs = _sort_parts(pairs, -(-len(memory).bit_length() // DIGIT))
    numbers = np.float32(rate), np.float32(eps), key
    _step_groups(pairs, parts, d_vectors, *numbers, form, accumulator, memory)


@cuda.jit(cache=True)
def _list_groups_kernel(ids, base, slot_map, count, shift, marks, listed, counted):
    """List each group of a batch once: by the piece that is the first to set its bit of `marks`."""
    groups = cuda.shared.array(LISTED, np.uint32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    piece, at = U32(cuda.grid(1)), GROUPS * thread
    while piece < count:
        slot, _, _, _, element = piece_at(piece, ids, base, slot_map, shift)
        # A row of a table is one group, which its first piece stands for.
        if slot_map.family != TABLE or element == 0:
            note_groups(slot_map, slot, U32(1) << shift, groups, at)
            for i in range(at, at + GROUPS):
                group = groups[i]
                if group != NO_ROW:
                    bit = U32(1) << (group & LAST_BIT)
                    if cuda.atomic.or_(marks, group >> WORD, bit) & bit == U32(0):
                        listed[cuda.atomic.add(counted, 0, U32(1))] = group
        piece = U32(piece + cuda.gridDim.x * threads)


@cuda.jit(cache=True)
def _code_step_kernel(listed, counted, rate, eps, key, form, sums, accumulator, memory):
    lows = cuda.shared.array(TEAM, np.int32)
    highs = cuda.shared.array(TEAM, np.int32)
    squares = cuda.shared.array(TEAM, np.float32)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    numbers, shared = (value_of(rate), eps, value_of(key)), (lows, highs, squares)
    n, count = U32(cuda.blockIdx.x), counted[0]
    while n < count:
        group = listed[n]
        step_team(sums[group], group, numbers, form, accumulator, memory, shared, thread, threads)
        cuda.syncthreads()  # the next group takes the same memory
        n = U32(n + cuda.gridDim.x)


@register_jitable
def step_team(gradient, group, numbers, form, accumulator, memory, shared, thread, threads):
    """Step a group by 32 threads; its gradients are 0 afterwards."""
    (factor, eps, key), (lows, highs, squares) = numbers, shared
    if accumulator.size > 0:
        square, i = NOTHING, thread
        while i < form.width:
            square += gradient[i] * gradient[i]
            i += threads
        squares[thread] = square
        cuda.syncthreads()
        total = NOTHING
        for t in range(threads):
            total += squares[t]
        total = accumulator[group] + total / np.float32(form.width)
        factor = factor / (math.sqrt(total) + eps)
        cuda.syncthreads()  # all have read the accumulator
        if thread == 0:
            accumulator[group] = total
    before, levels = ends_at(memory, group, form), levels_of(form)
    scale, bias = from_half(before[0]), from_half(before[1])
    low, high, i = MOST, LEAST, thread
    while i < form.width:
        stepped = np.float32(bias + scale * code_at(memory, group, i, form)) - factor * gradient[i]
        order = ordered(stepped)
        low, high = min(low, order), max(high, order)
        i += threads
    lows[thread], highs[thread] = low, high
    cuda.syncthreads()
    for t in range(threads):
        low, high = min(low, lows[t]), max(high, highs[t])
    ends = ends_after(before, unordered(low), unordered(high), form)
    kept, new_bias, step = ends == before, from_half(ends[1]), divisor(from_half(ends[0]))
    k, each = thread, 1 if form.bits == 8 else 2
    while k < code_bytes(form):
        byte = U32(0)
        for j in range(each):
            i = each * k + j
            if i < form.width:
                y = code_at(memory, group, i, form)
                if kept:
                    y -= slope(factor, scale) * gradient[i]
                else:
                    y = np.float32(np.float32(bias + scale * y) - factor * gradient[i] - new_bias) / step
                gradient[i] = NOTHING
                byte |= U32(rounded(y, draw(key, group, i, form), levels)) << U32(4 * j)
        memory[group, k] = byte
        k += threads
    if thread == 0:
        store_ends_at(memory, group, ends, form)


def list_groups(like, groups, ids, base, slot_map):
    """(listed (groups,), counted (1,), pieces): the groups of a batch, once each, and how many there are, on
    the device of `like`; and from how many pieces they come."""
    count, shift = count_pieces(slot_map, ids)
    marks = scratch(like, "marks", (groups // 32 + 1,), np.uint32)
    counted = scratch(like, "counted groups", (1,), np.uint32)
    marks[...] = counted[...] = 0
    listed = scratch(like, "listed groups", (groups,), np.uint32)
    rows, shape = (ids, base, slot_map), team_shape(-(-count // TEAM))
    launch(_list_groups_kernel, (count,), *rows, U32(count), shift, marks, listed, counted, shape=shape)
    return listed, counted, count


def _code_step(scatter_add, d_vectors, rows, rate, eps, key, form, accumulator, memory):
    """rows: ids, base and slot_map."""
    slot_map, groups = rows[2], len(memory)
    listed, counted, count = list_groups(memory, groups, *rows)
    with zeros(memory, "gradients", (groups, int(form.width)), np.float32) as sums:
        scatter_add(d_vectors, *rows, 1, sums.reshape(-1)[: int(slot_map.memory)])
        numbers, state = (typed(rate, sums.dtype), np.float32(eps), key, form), (sums, accumulator, memory)
        shape = team_shape(min(groups, GROUPS * count))
        launch(_code_step_kernel, (count,), listed, counted, *numbers, *state, shape=shape)


def code_step_cuda(d_vectors, ids, base, slot_map, rate, eps, key, form, accumulator, memory):
    rows = ids, base, slot_map
    _code_step(scatter_add_cuda, d_vectors, rows, rate, eps, key, form, accumulator, memory)


def code_step_cuda_deterministic(d_vectors, ids, base, slot_map, rate, eps, key, form, accumulator, memory):
    rows, add = (ids, base, slot_map), scatter_add_cuda_deterministic
    _code_step(add, d_vectors, rows, rate, eps, key, form, accumulator, memory)
