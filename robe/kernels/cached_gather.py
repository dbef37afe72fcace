"""Look up rows in the cache where they are there, and else in the quantised table.

    table    (R, S)          uint8    quantised rows (quantise.py)
    form                              how they are stored
    tags     (sets, WAYS)    uint32   of the cache (cache.py); no sets, no cache
    values   (sets * WAYS, D) float32
    ids      (B, F)  uint32, base (F,) uint64   row = base[f] + id
    out      (B, F, D) float32        written in full; may be a view whose rows out[b] are contiguous

Nothing but `out` changes. A row that is not in the cache is read as admit.py and cached_step.py would put it
there, so training may look up first and admit afterwards, and evaluating a model in mid-training leaves it
alone.

Versions: `reference` is the formula. `cpu` compares all tags of a set at once, and then copies or widens the
row in vector registers. `cuda` gives a thread to each element; the threads of one row read the same tags.
"""

import numpy as np
from numba import cuda, njit, prange
from numba.extending import register_jitable

from robe.kernels.cache import WAYS, hash_row, place_of, set_of, way_of
from robe.kernels.cost import Cost
from robe.kernels.groups import expand, expanded
from robe.kernels.hashing import ZERO
from robe.kernels.lanes import copy_run, require_rows_together
from robe.kernels.launch import launch
from robe.kernels.quantise import element_at, scale_at


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
def cached_row(table, form, tags, values, ids, base, out):
    """The vectors of one row of the batch: ids (F,), out (F, D)."""
    for f in range(ids.size):
        row = base[f] + np.uint64(ids[f])
        place = np.int64(-1)
        if tags.shape[0]:
            place = place_of(tags, row)
        if place >= 0:
            start = np.uint64(place) * np.uint64(form.width)
            copy_run(values, start, ZERO, out, np.uint64(f * form.width), np.uint64(form.width))
        else:
            expand(table, row, form, out[f])


@njit(parallel=True, nogil=True, cache=True)
def _cached_gather(table, form, tags, values, ids, base, out):
    for b in prange(ids.shape[0]):
        cached_row(table, form, tags, values, ids[b], base, out[b])


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
