"""Look up rows in the cache where they are there, and else in the quantised table.

    table    (R, S)          uint8    quantised rows (codes.py)
    form                              how they are stored
    tags     (sets, WAYS)    uint32   of the cache (cache.py); no sets, no cache
    values   (sets * WAYS, D) float32
    ids      (B, F)  uint32, base (F,) uint64   row = base[f] + id
    out      (B, F, D) float32        written in full; may be a view whose rows out[b] are contiguous

Nothing but `out` changes. A row that is not in the cache is read as admit.py and cached_step.py would put it
there, so training may look up first and admit afterwards, and evaluating a model in mid-training leaves it
alone.

Versions: `reference` is the formula. `cpu` compares all tags of a set at once, asks for rows ahead of their
turn, as gather.py does, and then copies or widens them in vector registers. `cuda` gives a thread to each
element; the threads of one row read the same tags.
"""

import numpy as np
from numba import cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.gather import AHEAD
from robe.kernels.interaction import ROWS
from robe.kernels.parts.cache import NOWHERE, WAYS, hash_row, place_of, set_of, way_of
from robe.kernels.parts.codes import element_at, scale_at
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import expand, expanded
from robe.kernels.parts.hashing import ZERO
from robe.kernels.parts.lanes import copy_run, prefetch_run, require_rows_together
from robe.kernels.parts.launch import launch


def cached_gather_cost(table, form, tags, values, ids, base, out) -> Cost:
    """Each id, the tags of its set and its quantised row read, each element written; a product and a sum."""
    read = ids.nbytes + ids.size * (table.shape[1] + WAYS * tags.itemsize * (len(tags) > 0))
    return Cost(read + out.nbytes, 2 * out.size)


def cached_gather_reference(table, form, tags, values, ids, base, out):
    rows = (base + ids.astype(np.uint64)).ravel()
    vectors = expanded(table, rows, form)
    if len(tags):
        s = set_of(hash_row(rows), len(tags))
        there = tags[s] == rows[:, None]
        hit = there.any(axis=1)
        vectors[hit] = values[s[hit] * WAYS + there[hit].argmax(axis=1)]
    out[...] = vectors.reshape(out.shape)


@register_jitable
def find_place(tags, row):
    """`place_of`, or NOWHERE without a cache."""
    return place_of(tags, row) if tags.shape[0] else np.int64(NOWHERE)


@register_jitable
def find_places(tags, ids, base, places):
    """Write where in the cache each of the rows of one row of the batch is, ids (F,), to places (F,)."""
    for f in range(ids.size):
        places[f] = find_place(tags, base[f] + np.uint64(ids[f]))


@register_jitable
def prefetch_row(table, values, width, row, place):
    if place >= 0:
        prefetch_run(values, np.uint64(place) * width, width)
    else:
        size = np.uint64(table.shape[1])
        prefetch_run(table, row * size, size)


@register_jitable
def cached_row(table, form, tags, values, ids, places, following, following_places, base, out):
    """The vectors of one row of the batch: ids (F,), their places (F,), out (F, D).

    The places of the row that comes next, `following` (F,), are found on the way; what is asked for ahead at
    the end of this row are vectors of that one.
    """
    features, width = ids.size, np.uint64(form.width)
    for f in range(features):
        following_places[f] = find_place(tags, base[f] + np.uint64(following[f]))
        g = f + AHEAD - features
        if g < 0:
            prefetch_row(table, values, width, base[f + AHEAD] + np.uint64(ids[f + AHEAD]), places[f + AHEAD])
        elif g <= f:
            prefetch_row(table, values, width, base[g] + np.uint64(following[g]), following_places[g])
        if places[f] >= 0:
            copy_run(values, np.uint64(places[f]) * width, ZERO, out, np.uint64(f) * width, width)
        else:
            expand(table, base[f] + np.uint64(ids[f]), form, out[f])


@njit(parallel=True, nogil=True, cache=True)
def _cached_gather(table, form, tags, values, ids, base, out):
    rows = ids.shape[0]
    for tile in prange((rows + ROWS - 1) // ROWS):
        first, last = tile * ROWS, min((tile + 1) * ROWS, rows)
        places = np.empty((2, ids.shape[1]), np.int64)
        find_places(tags, ids[first], base, places[0])
        for b in range(first, last):
            k, following = (b - first) % 2, ids[min(b + 1, last - 1)]
            cached_row(table, form, tags, values, ids[b], places[k], following, places[1 - k], base, out[b])


def cached_gather_cpu(table, form, tags, values, ids, base, out):
    require_rows_together(out)
    _cached_gather(table, form, tags, values.reshape(-1), ids, base, out)


@cuda.jit
def _cached_gather_kernel(table, form, tags, values, ids, base, out):
    first_i, first_f, first_b = cuda.grid(3)
    step_i, step_f, step_b = cuda.gridsize(3)
    b = first_b
    while b < out.shape[0]:
        f = first_f
        while f < out.shape[1]:
            row, place = base[f] + np.uint64(ids[b, f]), -1
            if tags.shape[0]:
                s = set_of(hash_row(row), tags.shape[0])
                way = way_of(tags, s, np.uint32(row))
                place = s * WAYS + way if way >= 0 else -1
            i = first_i
            if place >= 0:
                while i < out.shape[2]:
                    out[b, f, i] = values[place, i]
                    i += step_i
            else:
                scale, bias = scale_at(table, row, form)
                while i < out.shape[2]:
                    out[b, f, i] = element_at(table, row, i, scale, bias, form)
                    i += step_i
            f += step_f
        b += step_b


def cached_gather_cuda(table, form, tags, values, ids, base, out):
    rows, features, width = out.shape
    launch(_cached_gather_kernel, (width, features, rows), table, form, tags, values, ids, base, out)
