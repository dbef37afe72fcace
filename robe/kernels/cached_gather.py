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
from numba.extending import register_jitable

from robe.kernels.gather import AHEAD
from robe.kernels.parts.cache import NOWHERE, WAYS, entry_of, hash_row, set_of, way_of
from robe.kernels.parts.codes import element_at, scale_at
from robe.kernels.parts.cost import Cost
from robe.kernels.parts.groups import expand, expanded
from robe.kernels.parts.hashing import ZERO
from robe.kernels.parts.lanes import copy_span, prefetch_span, require_rows_together
from robe.kernels.parts.walks import elements, in_rows, rows, walk_elements


def cached_gather_cost(table, form, tags, values, ids, base, out) -> Cost:
    """Each id, the tags of its set and its quantised row read, each element written; a product and a sum."""
    read = ids.nbytes + ids.size * (table.shape[1] + WAYS * tags.itemsize * (len(tags) > 0))
    return Cost(read + out.nbytes, 2 * out.size)


def cached_gather_reference(table, form, tags, values, ids, base, out):
    looked_up = (base + ids.astype(np.uint64)).ravel()
    vectors = expanded(table, looked_up, form)
    if len(tags):
        s = set_of(hash_row(looked_up), len(tags))
        there = tags[s] == looked_up[:, None]
        hit = there.any(axis=1)
        vectors[hit] = values[s[hit] * WAYS + there[hit].argmax(axis=1)]
    out[...] = vectors.reshape(out.shape)


@register_jitable
def find_entry(tags, row):
    """`entry_of`, or NOWHERE without a cache."""
    return entry_of(tags, row) if tags.shape[0] else np.int64(NOWHERE)


@register_jitable
def prefetch_row(table, values, width, row, entry):
    if entry >= 0:
        prefetch_span(values, np.uint64(entry) * width, width)
    else:
        size = np.uint64(table.shape[1])
        prefetch_span(table, row * size, size)


@register_jitable
def begin(state, form, base, b, ids):
    """Where in the cache the rows of two rows of the batch are, (2, F): those of row b are found."""
    tags, entries = state[1], np.empty((2, ids.size), np.int64)
    for f in range(ids.size):
        entries[b % 2, f] = find_entry(tags, base[f] + np.uint64(ids[f]))
    return entries


@register_jitable
def read(state, form, base, entries, b, ids, following, out):
    """The vectors of row b of the batch, out (F, D).

    While they are copied, the rows of the next one are looked for in the cache, so that prefetching can run
    on into it.
    """
    table, tags, values = state[0], state[1], state[2]
    here, ahead = entries[b % 2], entries[1 - b % 2]
    features, width = ids.size, np.uint64(form.width)
    for f in range(features):
        ahead[f] = find_entry(tags, base[f] + np.uint64(following[f]))
        g = f + AHEAD - features
        if g < 0:
            prefetch_row(table, values, width, base[f + AHEAD] + np.uint64(ids[f + AHEAD]), here[f + AHEAD])
        elif g <= f:
            prefetch_row(table, values, width, base[g] + np.uint64(following[g]), ahead[g])
        if here[f] >= 0:
            copy_span(values, np.uint64(here[f]) * width, ZERO, out, np.uint64(f) * width, width)
        else:
            expand(table, base[f] + np.uint64(ids[f]), form, out[f])


@register_jitable
def _read(state, form, base, entries, b, ids, following):
    read(state, form, base, entries, b, ids, following, state[3][b])


_cached_gather = rows(begin, _read)


def cached_gather_cpu(table, form, tags, values, ids, base, out):
    require_rows_together(out)
    for longer, bases, written in in_rows(ids, base, out):
        _cached_gather((table, tags, values.reshape(-1), written), form, longer, bases)


@register_jitable
def _find(state, b, f):
    """(row, its entry in the cache or NOWHERE, scale, bias) of a look-up."""
    table, form, tags, _, ids, base, _ = state
    row, entry = base[f] + np.uint64(ids[b, f]), np.int64(NOWHERE)
    if tags.shape[0]:
        s = set_of(hash_row(row), tags.shape[0])
        way = way_of(tags, s, np.uint32(row))
        entry = s * WAYS + way if way >= 0 else entry
    scale, bias = scale_at(table, row, form) if entry < 0 else (np.float32(1), np.float32(0))
    return row, entry, scale, bias


@register_jitable
def _read_element(state, found, b, f, i):
    table, form, _, values, _, _, out = state
    row, entry, scale, bias = found
    out[b, f, i] = values[entry, i] if entry >= 0 else element_at(table, row, i, scale, bias, form)


_cached_gather_kernel = elements(_find, _read_element)


def cached_gather_cuda(table, form, tags, values, ids, base, out):
    walk_elements(_cached_gather_kernel, out.shape, (table, form, tags, values, ids, base, out))
