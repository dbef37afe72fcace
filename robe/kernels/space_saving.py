"""Which ids are hot: a sketch of the most important ones, some of which have a row of their own.

    ids        (B, F)  uint32        the batch, as in gather.py
    base       (F,)    uint64        token = base[f] + id
    tags       (sets, WAYS) uint64   the token of each bucket, or EMPTY
    importance (sets, WAYS) float32  of the token, never below 0
    halved     (sets,) uint32        the period that the importances of a set were last seen in

A token belongs to one set, by its hash. The first HOT buckets of a set have a row each, row set * HOT + way,
and hold its most important tokens; the others are candidates, whose importance is only noted.

`hot_rows` looks up, and changes nothing:

    out        (B, F) uint32         the row of each token, or NO_ROW

`space_saving` (Metwally, Agrawal and El Abbadi, 2005) brings the sketch up to date by the batch:

    keys, order                      the look-ups, sorted by the hash of their tokens (sort_rows.py)
    d_vectors  (B, F, D) float       gradient of the loss by the vectors; may be a strided view
    scale      (F,) float32          how much a look-up of each feature counts; where 0, none does
    by_count                         each look-up is as important as another; else the norm of its gradient
    period     uint32                all importances are halved from one period to the next
    moved      (B * F,) int64        rows that have another token now, each once; NOWHERE for the rest

A set takes its look-ups in the order of their hashes. A token that the set holds gains the importance of the
look-up. One that it does not hold takes the place of the least important candidate (of several the first),
inherits its importance and gains that of the look-up: so no importance is too low, and none is too high by
more than the least one. After the batch the most important candidate changes places with the least important
token that has a row, as long as it is more important. Before the batch none was, so a set has no more changes
than look-ups, and no token loses its row and gains another in one batch.

Halving is exact, so it may wait until a set is met again: only sets of the batch are touched.

Versions: each set is worked on by one thread, as in admit.py, so results are the same for any number of
threads, and nothing is atomic.
"""

import math

import numpy as np
from numba import cuda, get_num_threads, prange
from numba.extending import register_jitable

from robe.kernels.parts.cache import NOWHERE, hash_token, look_up_at, set_of
from robe.kernels.parts.codes import NO_ROW
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel

WAYS, HOT = 32, 8  # buckets of a set, and those that have a row
EMPTY = np.uint64(2**64 - 1)
MOST_HALVINGS = np.uint32(300)  # leave 0 of any number
U32, U64 = np.uint32, np.uint64
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


def hot_rows_cost(ids, base, tags, out) -> Cost:
    """Ids read, rows written; the tags of the rows of a set read for each."""
    return Cost(ids.nbytes + out.nbytes + ids.size * HOT * tags.itemsize, 0)


def hot_rows_reference(ids, base, tags, out):
    out[...] = NO_ROW
    if len(tags):
        tokens = base + ids.astype(np.uint64)
        sets = set_of(hash_token(tokens), len(tags))
        b, f, way = np.nonzero(tags[sets, :HOT] == tokens[..., None])
        out[b, f] = sets[b, f] * HOT + way


@register_jitable
def row_of(tags, token):
    """The row of a token; NO_ROW if it has none."""
    sets = tags.shape[0]
    if sets > 0:
        s = set_of(hash_token(token), sets)
        for way in range(HOT):
            if tags[s, way] == token:
                return U32(s * HOT + way)
    return U32(NO_ROW)


@parallel()
def _hot_rows(ids, base, tags, out):
    for b in prange(ids.shape[0]):
        for f in range(ids.shape[1]):
            out[b, f] = row_of(tags, base[f] + U64(ids[b, f]))


def hot_rows_cpu(ids, base, tags, out):
    _hot_rows(ids, base, tags, out)


@cuda.jit(cache=True)
def _hot_rows_kernel(ids, base, tags, out):
    p = U32(cuda.grid(1))
    while p < U32(ids.size):
        b, f = look_up_at(p, ids.shape[1])
        out[b, f] = row_of(tags, base[f] + U64(ids[b, f]))
        p = U32(p + cuda.gridsize(1))


def hot_rows_cuda(ids, base, tags, out):
    launch(_hot_rows_kernel, (ids.size,), ids, base, tags, out)


def space_saving_cost(
    keys, order, ids, base, d_vectors, scale, by_count, period, tags, importance, halved, moved
) -> Cost:
    """The sorted look-ups and gradients read, what moved written; the buckets of a set read for each."""
    gradients = 0 if by_count else d_vectors.nbytes
    buckets = keys.size * WAYS * (tags.itemsize + importance.itemsize)
    moved_bytes = keys.nbytes + order.nbytes + ids.nbytes + moved.nbytes
    return Cost(moved_bytes + gradients + buckets, 0 if by_count else 2 * d_vectors.size)


def space_saving_reference(
    keys, order, ids, base, d_vectors, scale, by_count, period, tags, importance, halved, moved
):
    moved[...] = NOWHERE
    features, sets = ids.shape[1], len(tags)
    of = set_of(keys, sets)
    for s in np.unique(of).tolist() if sets else []:
        first, last = np.searchsorted(of, (s, s + 1)).tolist()
        for _ in range(min(period - halved[s], MOST_HALVINGS)):
            importance[s] *= HALF
        halved[s] = period
        for look_up in order[first:last].tolist():
            b, f = divmod(look_up, features)
            token = int(base[f]) + int(ids[b, f])
            weight = scale[f] * (ONE if by_count else norm(d_vectors, b, f))
            if not weight > 0:
                continue
            found = np.flatnonzero(tags[s] == np.uint64(token))
            way = int(found[0]) if len(found) else HOT + int(importance[s, HOT:].argmin())
            tags[s, way] = token
            importance[s, way] += weight
        for p in range(first, last):
            way, candidate = int(importance[s, :HOT].argmin()), HOT + int(importance[s, HOT:].argmax())
            if importance[s, candidate] <= importance[s, way]:
                break
            moved[p] = s * HOT + way
            for array in (tags[s], importance[s]):
                array[[way, candidate]] = array[[candidate, way]]


@register_jitable
def norm(d_vectors, b, f):
    """Of the gradient by one vector, added up in order."""
    total = d_vectors[b, f, 0] * d_vectors[b, f, 0]
    for i in range(1, d_vectors.shape[2]):
        total += d_vectors[b, f, i] * d_vectors[b, f, i]
    return np.float32(math.sqrt(total))


@register_jitable
def halve(importance, s, times):
    """Halve the importances of a set so many times."""
    for _ in range(min(times, MOST_HALVINGS)):
        for way in range(WAYS):
            importance[s, way] *= HALF


@register_jitable
def holder(tags, importance, s, token):
    """The way of a token, or of the candidate that is to give way to it."""
    least = HOT
    for way in range(WAYS):
        if tags[s, way] == token:
            return way
        if way > HOT and importance[s, way] < importance[s, least]:
            least = way
    return least


@register_jitable
def promote(p, tags, importance, s, moved):
    """Give one candidate the row of a less important token, and note it at p; whether there was one."""
    way, candidate = 0, HOT
    for other in range(1, HOT):
        if importance[s, other] < importance[s, way]:
            way = other
    for other in range(HOT + 1, WAYS):
        if importance[s, other] > importance[s, candidate]:
            candidate = other
    if not importance[s, candidate] > importance[s, way]:
        return False
    moved[p] = s * HOT + way
    token, much = tags[s, candidate], importance[s, candidate]
    tags[s, candidate], importance[s, candidate] = tags[s, way], importance[s, way]
    tags[s, way], importance[s, way] = token, much
    return True


@register_jitable
def note_set(
    first,
    last,
    keys,
    order,
    ids,
    base,
    d_vectors,
    scale,
    by_count,
    period,
    tags,
    importance,
    halved,
    moved,
):
    """The look-ups `first` to `last`, all of one set."""
    s = set_of(keys[first], tags.shape[0])
    if period != halved[s]:
        halve(importance, s, U32(period - halved[s]))
        halved[s] = period
    for p in range(first, last):
        moved[p] = NOWHERE
        b, f = look_up_at(order[p], ids.shape[1])
        weight = scale[f]
        if not by_count:
            weight *= norm(d_vectors, b, f)
        if weight > ZERO:
            token = base[f] + U64(ids[b, f])
            way = holder(tags, importance, s, token)
            tags[s, way] = token
            importance[s, way] += weight
    p = first
    while p < last and promote(p, tags, importance, s, moved):
        p += 1


@register_jitable
def set_end(keys, p, sets):
    """The index behind the last sorted look-up of the set that look-up p is of."""
    end = p + 1
    while end < keys.size and set_of(keys[end], sets) == set_of(keys[p], sets):
        end += 1
    return end


@parallel()
def _space_saving(
    keys, order, ids, base, d_vectors, scale, by_count, period, owners, tags, importance, halved, moved
):
    sets, n = tags.shape[0], keys.size
    for owner in prange(owners):
        p, last = owner * n // owners, (owner + 1) * n // owners
        # A set belongs to the owner of its first look-up.
        while 0 < p < n and set_of(keys[p], sets) == set_of(keys[p - 1], sets):
            p += 1
        while p < last:
            end = set_end(keys, p, sets)
            note_set(
                p,
                end,
                keys,
                order,
                ids,
                base,
                d_vectors,
                scale,
                by_count,
                period,
                tags,
                importance,
                halved,
                moved,
            )
            p = end


def space_saving_cpu(
    keys, order, ids, base, d_vectors, scale, by_count, period, tags, importance, halved, moved
):
    if not len(tags):
        moved[...] = NOWHERE
        return
    # The number of owners is an argument since Numba cannot cache a kernel that asks for it.
    batch = (keys, order, ids, base, d_vectors, scale, by_count, period, get_num_threads())
    _space_saving(*batch, tags, importance, halved, moved)


@cuda.jit(cache=True)
def _space_saving_kernel(
    keys, order, ids, base, d_vectors, scale, by_count, period, tags, importance, halved, moved
):
    sets, n, period = tags.shape[0], keys.size, value_of(period)
    p = cuda.grid(1)
    while p < n:
        if p == 0 or set_of(keys[p - 1], sets) != set_of(keys[p], sets):
            note_set(
                p,
                set_end(keys, p, sets),
                keys,
                order,
                ids,
                base,
                d_vectors,
                scale,
                by_count,
                period,
                tags,
                importance,
                halved,
                moved,
            )
        p += cuda.gridsize(1)


def space_saving_cuda(
    keys, order, ids, base, d_vectors, scale, by_count, period, tags, importance, halved, moved
):
    if not len(tags):
        moved[...] = NOWHERE
        return
    batch = (keys, order, ids, base, d_vectors, scale, by_count, typed(period, halved.dtype))
    launch(_space_saving_kernel, keys.shape, *batch, tags, importance, halved, moved)
