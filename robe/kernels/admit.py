"""Find the rows of a batch in the cache, and make room for those that are not there.

    keys, order   the rows of the batch, sorted (sort_rows.py)
    ids, base     as there; or ids (N, 1) are rows already, and base (F,) tells which feature's they are
    least_used    replace the row with the fewest look-ups since it came (LFU), not the one least recently
                  used (LRU)
    step          number of the batch, from 1 on
    tags, used    (sets, WAYS)       of the cache (cache.py), brought up to date
    counters      (F, len(COUNTED))  int64, added to
    entry         (B * F,) int64     of the first look-up of each row in `order`: its entry in the cache, or
                                     DIRECT if there is none; REPEAT for the rest
    before        (B * F,) int64     there: the row that has to leave the entry, NOBODY if it was empty, or
                                     STAYS if the row was there before; elsewhere STAYS

A set first notes which rows of the batch it holds. Then each of the others, in the order of their hash, takes
an empty way, or else that of the row used least (of several the first way), but never that of a row of this
batch. So if one batch wants more rows of a set than there are ways, the last of them stay outside: they are
DIRECT, and stepped in the table itself (cached_step.py). A row is a hit if it was cached before the batch;
then all its look-ups in the batch count as hits.

Only the tags change here; cached_step.py moves the rows.

Versions: `reference` goes from row to row in plain Python. In `cpu` each thread owns a range of the sets,
which is a range of the sorted rows, and `cuda` gives each set to a thread: so there are no races, and results
are the same for any number of threads. (Only the order of the sums in `counters` depends on it, and those are
of integers.)
"""

import numpy as np
from numba import cuda, get_num_threads, prange
from numba.extending import register_jitable

from robe.kernels.parts.cache import EMPTY, WAYS, row_at, set_of, way_of
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.launch import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.kernels.parts.parallel import parallel

# What is counted of each feature: look-ups, twice; then rows.
COUNTED = ("hits", "misses", "loads", "evictions", "direct")
HIT, MISS, LOAD, EVICTION, OUTSIDE = range(len(COUNTED))
DIRECT, REPEAT = -1, -2
NOBODY, STAYS = -1, -2
U32, U64 = np.uint32, np.uint64
MOST = U32(2**32 - 1)


def admit_cost(keys, order, ids, base, least_used, step, tags, used, counters, entry, before) -> Cost:
    """The sorted rows read, their entries written; the tags of a set read for each."""
    moved = keys.nbytes + order.nbytes + ids.nbytes + entry.nbytes + before.nbytes
    return Cost(moved + keys.size * WAYS * tags.itemsize, 0)


def admit_reference(keys, order, ids, base, least_used, step, tags, used, counters, entry, before):
    features, sets = ids.shape[1], len(tags)
    rows = (base[:features] + ids.astype(np.uint64)).ravel()[order]
    of = order % np.uint32(features) if features == len(base) else np.searchsorted(base, rows, "right") - 1
    starts = [p for p in range(len(keys)) if p == 0 or keys[p] != keys[p - 1]]
    counts = dict(zip(starts, np.diff([*starts, len(keys)]).tolist(), strict=True))
    entry[...], before[...] = REPEAT, STAYS
    touched, waiting = set(), []
    for p in starts:
        s = int(set_of(keys[p], sets))
        found = np.flatnonzero(tags[s] == rows[p]) if sets else []
        feature = counters[of[p]]
        feature[HIT if len(found) else MISS] += counts[p]
        if len(found):
            way = int(found[0])
            entry[p] = s * WAYS + way
            touched.add((s, way))
            used[s, way] = min(int(used[s, way]) + counts[p], int(MOST)) if least_used else step
        else:
            waiting.append((p, s))
    for p, s in waiting:
        ways = [way for way in range(WAYS) if (s, way) not in touched] if sets else []
        feature = counters[of[p]]
        if not ways:
            entry[p] = DIRECT
            feature[OUTSIDE] += 1
            continue
        way = min(ways, key=lambda way: -1 if tags[s, way] == EMPTY else int(used[s, way]))
        if tags[s, way] != EMPTY:
            before[p] = tags[s, way]
            counters[np.searchsorted(base, tags[s, way], "right") - 1, EVICTION] += 1
        else:
            before[p] = NOBODY
        feature[LOAD] += 1
        tags[s, way], entry[p] = rows[p], s * WAYS + way
        used[s, way] = counts[p] if least_used else step
        touched.add((s, way))


@register_jitable
def feature_of(base, row):
    """The feature whose table a row is in."""
    f = 0
    while f + 1 < base.size and base[f + 1] <= U64(row):
        f += 1
    return f


@register_jitable
def victim(tags, used, s, touched):
    """The way whose row is to leave; NOWHERE if the batch touched them all, bit by bit."""
    best, least = -1, MOST
    for way in range(WAYS):
        if tags[s, way] == EMPTY:
            return way
        if not touched >> U32(way) & U32(1) and (best < 0 or used[s, way] < least):
            best, least = way, used[s, way]
    return best


@register_jitable
def group_end(keys, p, last):
    """The index behind the last sorted look-up of the row that look-up p is of."""
    end = p + 1
    while end < last and keys[end] == keys[p]:
        end += 1
    return end


@register_jitable
def admit_set(first, last, keys, order, ids, base, least_used, step, tags, used, entry, before):
    """The look-ups `first` to `last`, all of one set."""
    s, touched, missing, p = set_of(keys[first], tags.shape[0]), U32(0), False, first
    while p < last:
        end = group_end(keys, p, last)
        for q in range(p, end):
            entry[q], before[q] = REPEAT, STAYS
        entry[p] = DIRECT
        row, _ = row_at(ids, base, order[p])
        way = way_of(tags, s, row)
        if way < 0:
            missing = True
        else:
            entry[p], touched = s * WAYS + way, U32(touched | U32(1) << U32(way))
            used[s, way] = min(U64(used[s, way]) + U64(end - p), U64(MOST)) if least_used else U64(step)
        p = end
    p = first
    while missing and p < last:
        if entry[p] == DIRECT:
            way = victim(tags, used, s, touched)
            if way < 0:
                return
            before[p] = NOBODY if tags[s, way] == EMPTY else np.int64(tags[s, way])
            entry[p], touched = s * WAYS + way, U32(touched | U32(1) << U32(way))
            tags[s, way], _ = row_at(ids, base, order[p])
            used[s, way] = U64(group_end(keys, p, last) - p) if least_used else U64(step)
        p += 1


@register_jitable
def admit_none(p, keys, entry, before):
    """Look-up p of those sorted, where there is no cache."""
    entry[p] = REPEAT if p > 0 and keys[p - 1] == keys[p] else DIRECT
    before[p] = STAYS


@register_jitable
def what_happened(p, keys, order, ids, base, entry, before):
    """(feature, look-ups, whether they hit) of the row whose first look-up is p."""
    row, f = row_at(ids, base, order[p])
    if ids.shape[1] != base.size:
        f = feature_of(base, row)
    hit = entry[p] != DIRECT and before[p] == STAYS
    return f, group_end(keys, p, keys.size) - p, hit


@parallel()
def _admit(keys, order, ids, base, least_used, step, owners, tags, used, counters, entry, before):
    sets, n = tags.shape[0], keys.size
    counts = np.zeros((owners, counters.shape[0], counters.shape[1]), np.int64)
    for owner in prange(owners):
        p, last = owner * n // owners, (owner + 1) * n // owners
        # A set belongs to the owner of its first look-up.
        while sets and 0 < p < n and set_of(keys[p], sets) == set_of(keys[p - 1], sets):
            p += 1
        while p < last:
            end = p + 1
            if sets:
                while end < n and set_of(keys[end], sets) == set_of(keys[p], sets):
                    end += 1
                admit_set(p, end, keys, order, ids, base, least_used, step, tags, used, entry, before)
            else:
                admit_none(p, keys, entry, before)
            for q in range(p, end):
                if entry[q] != REPEAT:
                    f, look_ups, hit = what_happened(q, keys, order, ids, base, entry, before)
                    counts[owner, f, HIT if hit else MISS] += look_ups
                    counts[owner, f, LOAD] += before[q] != STAYS
                    counts[owner, f, OUTSIDE] += entry[q] == DIRECT
                    if before[q] >= 0:
                        counts[owner, feature_of(base, before[q]), EVICTION] += 1
            p = end
    for owner in range(owners):
        counters += counts[owner]


def admit_cpu(keys, order, ids, base, least_used, step, tags, used, counters, entry, before):
    # The number of owners is an argument since Numba cannot cache a kernel that asks for it.
    owners, step = get_num_threads(), typed(step, used.dtype)
    _admit(keys, order, ids, base, least_used, step, owners, tags, used, counters, entry, before)


@cuda.jit(cache=True)
def _admit_kernel(keys, order, ids, base, least_used, step, tags, used, entry, before):
    sets, n, step = tags.shape[0], U32(keys.size), value_of(step)
    p = U32(cuda.grid(1))
    while p < n:
        if sets == 0:
            admit_none(p, keys, entry, before)
        else:
            s = set_of(keys[p], sets)
            if p == 0 or set_of(keys[p - 1], sets) != s:
                end = U32(p + 1)
                while end < n and set_of(keys[end], sets) == s:
                    end = U32(end + 1)
                admit_set(p, end, keys, order, ids, base, least_used, step, tags, used, entry, before)
        p = U32(p + cuda.gridsize(1))


@cuda.jit(cache=True)
def _count_kernel(keys, order, ids, base, entry, before, counters):
    p = U32(cuda.grid(1))
    while p < U32(keys.size):
        if entry[p] != REPEAT:
            f, look_ups, hit = what_happened(p, keys, order, ids, base, entry, before)
            cuda.atomic.add(counters, (f, HIT if hit else MISS), look_ups)
            if before[p] != STAYS:
                cuda.atomic.add(counters, (f, LOAD), 1)
            if entry[p] == DIRECT:
                cuda.atomic.add(counters, (f, OUTSIDE), 1)
            if before[p] >= 0:
                cuda.atomic.add(counters, (feature_of(base, before[p]), EVICTION), 1)
        p = U32(p + cuda.gridsize(1))


def admit_cuda(keys, order, ids, base, least_used, step, tags, used, counters, entry, before):
    batch = (keys, order, ids, base)
    launch(_admit_kernel, keys.shape, *batch, least_used, typed(step, used.dtype), tags, used, entry, before)
    launch(_count_kernel, keys.shape, *batch, entry, before, counters)
